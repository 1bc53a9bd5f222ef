"""Bytes alive and floating-point operations of passes on the `meta` device, whose tensors have shapes and no bytes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dpo_sd.forecast.units import GIB
from dpo_sd.models import quantization

CONTEXT = GIB // 2  # bytes of CUDA itself and the workspaces of cuBLAS: assumed, not measured
SPARE = 0.1  # share of what passes: gaps that the allocator cannot close, workspaces of cuDNN; assumed
OWNED = 0.95  # share of a card's nominal memory that its programs get; assumed
ROUND = 512  # CUDA's allocator rounds every tensor up to a multiple of so many bytes

_aten = torch.ops.aten
_SLOW_ON_META = {  # most of a count's time, without this; each returns new tensors and no view of its arguments
    *(_aten.add.Tensor, _aten.mul.Tensor, _aten.div.Tensor, _aten.mm.default, _aten.addmm.default),
    *(_aten.native_layer_norm.default, _aten.native_layer_norm_backward.default),
    *(_aten.native_group_norm.default, _aten.native_group_norm_backward.default),
    *(_aten.gelu.default, _aten.gelu_backward.default),
}
_known: dict[Any, tuple[Any, bool]] = {}  # layouts of results, by operation and layouts of arguments


class Phase(NamedTuple):
    """One thing that a run does on the card, with the memory it takes.

    Args:
        name: as the table of the plan shows it, such as "update: backward".
        stays: bytes on the card all the while: weights, adapters, gradients, optimiser state.
        passes: bytes beyond these at the phase's peak.
        flops: floating-point operations; a multiplication and its addition are two.
    """

    name: str
    stays: int
    passes: int
    flops: int = 0

    @property
    def peak(self) -> int:
        return self.stays + self.passes

    @property
    def needs(self) -> int:
        """Bytes that the card must have: the peak, the allocator's gaps and CUDA itself."""
        return round(self.peak + SPARE * self.passes + CONTEXT)


class Alive(TorchDispatchMode):
    """Context that counts the bytes of living tensors, and floating-point operations as PyTorch counts them.

    Args:
        tensors: tensors that are there already.
    """

    def __init__(self, tensors: Iterable[Tensor] = ()):
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._storages: dict[int, weakref.ref] = {}
        for tensor in tensors:
            self._count(tensor)
        self.stays = self.now

    def phase(self, name: str) -> Phase:
        """The peak and the operations since the last call, as a phase of that name."""
        phase = Phase(name, self.stays, self.peak - self.stays, self.flops)
        self.peak, self.flops = self.now, 0
        return phase

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata  # one for a tensor and all views of it
        if key in self._storages:
            return
        size = -(-storage.nbytes() // ROUND) * ROUND  # the next multiple of ROUND

        def freed(_: Any) -> None:
            self.now -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = _result(func, args, kwargs or {})
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        if count := flop_registry.get(func.overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        return result


def _result(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operation returns; on `meta` a slow one is asked once for all arguments of the same layout."""
    if func not in _SLOW_ON_META or not args[0].is_meta:
        return func(*args, **kwargs)
    key = (func, _layout(args), _layout(tuple(kwargs.items())))
    if key not in _known:
        result = func(*args, **kwargs)
        _known[key] = _layout(result if isinstance(result, tuple) else (result,)), isinstance(result, tuple)
        return result
    layouts, several = _known[key]
    made = tuple(map(_made, layouts))
    return made if several else made[0]


def _layout(value: Any) -> Any:
    """Shape, strides and precision of a tensor, those of several in a tuple; of another value its type and itself."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    return tuple(map(_layout, value)) if isinstance(value, list | tuple) else (type(value), value)


def _made(layout: Any) -> Tensor | None:
    if layout == (type(None), None):  # a gradient that nobody asked for
        return None
    shape, strides, dtype = layout
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


@contextmanager
def kernels(half: torch.dtype | None, accelerator: str) -> Iterator[None]:
    """Context in which the `meta` device allocates what the accelerator's kernels and autocast would allocate.

    The functions of `torch.nn.functional` are replaced, because autocast knows no `meta` device and what backward
    passes compute again is hidden from `TorchFunctionMode`: attention by the fused kernel, which never holds its
    (tokens, tokens) matrix; products by ones that first cast to `half`; norms on CUDA by ones that cast to float32.

    Args:
        half: precision of autocast; None computes in the precision of the inputs.
        accelerator: "cpu" or "cuda"; autocast on the CPU leaves the norms as they are.
    """
    replaced: dict[str, Any] = {"scaled_dot_product_attention": _fused_attention(half)}
    if half is not None:
        replaced |= {name: _casting(getattr(F, name), half) for name in ("linear", "conv2d")}
        if accelerator == "cuda":
            replaced |= {name: _casting(getattr(F, name), torch.float32) for name in ("group_norm", "layer_norm")}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(F, **replaced))
        if half is not None:
            stack.enter_context(mock.patch.object(quantization, "arithmetic", lambda x: half))
        yield


def _casting(function: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    def casting(*args: Any, **kwargs: Any) -> Any:
        return function(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})

    return casting


def _fused_attention(half: torch.dtype | None) -> Callable[..., Tensor]:
    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        if half is not None:
            query, key, value = (tensor.to(half) for tensor in (query, key, value))
        # the kernel returns the output first, then what its backward pass reads
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]

    return attention
