"""Bytes alive and floating-point operations of passes on the `meta` device."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from dpo_sd.models import quantization

GIB = 2**30
CONTEXT = GIB // 2  # CUDA itself and the workspaces of cuBLAS: assumed, not measured
SPARE = 0.1  # of what comes and goes: gaps that the allocator cannot close, workspaces of cuDNN; assumed
OWNED = 0.95  # of what a card is sold with, what its programs get; assumed
ROUND = 512  # bytes that CUDA's allocator rounds up to


class Phase(NamedTuple):
    """One thing that a run does.

    Args:
        name: of it.
        stays: bytes of what is on the card all the while: weights, adapters, gradients, optimiser state.
        passes: bytes of what else there is at its peak.
        flops: its floating-point operations, two for a multiplication and its addition.
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
        """Bytes that the card must have for it: the peak, the allocator's gaps and CUDA itself."""
        return round(self.peak + SPARE * self.passes + CONTEXT)


class Operations(NamedTuple):
    """Floating-point operations for a pair, or a picture of a loss without pairs.

    Args:
        policy: its forward and backward pass, with what checkpointing computes again.
        reference: the forward pass of the reference; 0 for a loss without pairs.
        forward: the forward pass of the policy alone.
        encoding: of its pictures by the VAE.
        text: of its prompt by the text encoders.
    """

    policy: float
    reference: float
    forward: float
    encoding: float
    text: float


class Alive(TorchDispatchMode):
    """Inside, counts the bytes of the tensors that are alive, and floating-point operations as PyTorch does.

    Args:
        tensors: that are there already.
    """

    def __init__(self, tensors: Iterable[Tensor] = ()):
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._storages: dict[int, weakref.ref] = {}
        for tensor in tensors:
            self._count(tensor)
        self.stays = self.now

    def phase(self, name: str) -> Phase:
        """What was counted since the last call."""
        phase = Phase(name, self.stays, self.peak - self.stays, self.flops)
        self.peak, self.flops = self.now, 0
        return phase

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = -(-storage.nbytes() // ROUND) * ROUND

        def freed(_: Any) -> None:
            self.now -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        if count := flop_registry.get(func.overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        return result


@contextmanager
def kernels(half: torch.dtype | None, accelerator: str) -> Iterator[None]:
    """Inside, the `meta` device computes as the accelerator does: fused attention, and autocast's precisions.

    Functions are replaced, because autocast knows no `meta` device and what backward passes compute again is hidden
    from `TorchFunctionMode`.

    Args:
        half: of autocast; None computes in the precision of the inputs.
    """

    def cast(function: Any, dtype: torch.dtype) -> Any:
        def casting(*args: Any, **kwargs: Any) -> Any:
            to = lambda t: t.to(dtype) if t.is_floating_point() else t  # noqa: E731
            return function(*tree_map_only(torch.Tensor, to, args), **tree_map_only(torch.Tensor, to, kwargs))

        return casting

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        if half is not None:
            query, key, value = (tensor.to(half) for tensor in (query, key, value))
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]

    replaced: dict[str, Any] = {"scaled_dot_product_attention": attention}
    if half is not None:
        replaced |= {name: cast(getattr(F, name), half) for name in ("linear", "conv2d")}
        if accelerator == "cuda":  # autocast on the CPU leaves the norms as they are
            replaced |= {name: cast(getattr(F, name), torch.float32) for name in ("group_norm", "layer_norm")}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(F, **replaced))
        if half is not None:
            stack.enter_context(mock.patch.object(quantization, "arithmetic", lambda x: half))
        yield
