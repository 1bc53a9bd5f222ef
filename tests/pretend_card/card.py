"""A CUDA card that is none: its tensors say `cuda:0`, hold their values on the host and compute there.

What a card refuses is refused: operations on tensors of both places. Copies between the places and what makes the host
wait are counted by the function of the package that asked for them. Kernels, speed, memory and several cards are not
pretended.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import safetensors.torch
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

PLACE = torch.device("cuda:0")
PACKAGE = str(Path(__file__).parents[2] / "dpo_sd")
TRANSFERS = ("aten::_to_copy", "aten::copy_", "aten::_foreach_copy_", "aten::set_")
INDEXING = (
    "aten::index",
    "aten::index_put",
    "aten::index_put_",
    "aten::_index_put_impl_",
)  # also by indices on the host
WAITING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select")

copies: Counter[str] = Counter()  # by "to card" and "to host", and the asking function
waits: Counter[str] = Counter()  # by the asking function


class CardTensor(torch.Tensor):
    """A tensor that is on the card; `host` has its values."""

    host: torch.Tensor

    @staticmethod
    def __new__(cls, host: torch.Tensor, requires_grad: bool = False) -> CardTensor:
        layout = {"dtype": host.dtype, "layout": host.layout, "strides": host.stride()}
        with torch.inference_mode(False):
            tensor = torch.Tensor._make_wrapper_subclass(
                cls,
                host.size(),
                storage_offset=host.storage_offset(),
                device=PLACE,
                requires_grad=requires_grad,
                **layout,
            )
        tensor.host = host
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"CardTensor({self.host})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().to("cpu").__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> CardTensor:
        copy = CardTensor(self.host.detach().clone(), self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copy._is_param = True  # type: ignore[attr-defined]
        return copy

    def tolist(self) -> Any:
        return self.detach().to("cpu").tolist()


class Card(TorchDispatchMode):
    """Inside, `device="cuda"` is this card."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The result of an operation, on the card where it would be there."""
    name, leaves = func._schema.name, tree_leaves((args, kwargs))
    there = [leaf for leaf in leaves if isinstance(leaf, CardTensor)]
    asked = kwargs.get("device", next((leaf for leaf in leaves if isinstance(leaf, torch.device)), None))
    to_card = asked is not None and torch.device(asked).type == "cuda"
    if name in ("aten::pin_memory", "aten::_pin_memory"):
        return args[0].clone()
    if name == "aten::is_pinned":
        return False
    if not there and not to_card:
        return func(*args, **kwargs)
    if name == "aten::_fused_sdp_choice":
        return 0  # attention by plain operations
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        with Card():
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
    _refuse_mixed(name, args, leaves, there)
    _count(name, args, there, asked, to_card)
    if asked is not None:
        kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"} | {"device": torch.device("cpu")}
    result = func(*tree_map(_host, args), **tree_map(_host, kwargs))
    if func._schema.is_mutable and there:
        changed = [
            arg
            for arg, told in zip(args, func._schema.arguments, strict=False)
            if told.alias_info and told.alias_info.is_write
        ]
        return changed[0] if isinstance(result, torch.Tensor) and len(changed) == 1 else result
    if asked is not None and not to_card:
        return result
    return tree_map(lambda leaf: CardTensor(leaf) if isinstance(leaf, torch.Tensor) else leaf, result)


def _refuse_mixed(name: str, args: Any, leaves: list[Any], there: list[CardTensor]) -> None:
    if not there or name in TRANSFERS:
        return
    others = [
        leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, CardTensor) and leaf.dim()
    ]
    if name in INDEXING and isinstance(args[0], CardTensor):
        others = [other for other in others if not any(other is index for index in args[1])]
    if others:
        raise RuntimeError(
            f"{name} mixes tensors of the card with others of {[tuple(other.shape) for other in others]}"
        )


def _count(name: str, args: Any, there: list[CardTensor], asked: Any, to_card: bool) -> None:
    if name == "aten::_to_copy" and asked is not None and isinstance(args[0], CardTensor) != to_card:
        copies[f"to {'card' if to_card else 'host'}: {_asking()}"] += 1
    elif name == "aten::copy_" and isinstance(args[0], CardTensor) != isinstance(args[1], CardTensor):
        copies[f"to {'card' if isinstance(args[0], CardTensor) else 'host'}: {_asking()}"] += 1
    if name in WAITING and there:
        waits[_asking()] += 1


def _asking() -> str:
    """The innermost function of the package."""
    frame = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    if frame is None:
        return "elsewhere"
    return f"{Path(frame.f_code.co_filename).relative_to(PACKAGE)} {frame.f_code.co_name}"


def _host(leaf: Any) -> Any:
    if isinstance(leaf, CardTensor):
        return leaf.host
    return torch.device("cpu") if isinstance(leaf, torch.device) else leaf


def insert(gib: float = 24) -> None:
    """Puts the card into this process, for good."""
    total = int(gib * 2**30)
    gpu = SimpleNamespace(name="a pretended card", total_memory=total, major=9, minor=0, multi_processor_count=100)
    state = torch.zeros(16, dtype=torch.uint8)
    values = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": gpu,
        "get_device_name": gpu.name,
        "get_device_capability": (gpu.major, gpu.minor),
        "mem_get_info": (total, total),
        "get_per_process_memory_fraction": 1.0,
        "memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_allocated": 0,
        "get_rng_state": state,
        "get_rng_state_all": [state],
        **dict.fromkeys(
            (
                "_lazy_init",
                "set_device",
                "synchronize",
                "empty_cache",
                "manual_seed",
                "manual_seed_all",
                "set_rng_state",
            )
        ),
        "set_rng_state_all": None,
        "reset_peak_memory_stats": None,
    }
    for name, value in values.items():
        setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    torch._C._cuda_getCurrentRawStream = lambda *_: 0  # which bitsandbytes imports
    torch.autograd.set_multithreading_enabled(False)  # the engine would start a thread for the card
    torch.__future__.set_swap_module_params_on_conversion(True)  # `param.data =` cannot change a tensor's class
    torch._C._set_only_lift_cpu_tensors(True)
    safetensors.torch.save_file = _saving(safetensors.torch.save_file)
    Card().__enter__()


def _saving(save_file: Any) -> Any:
    """It asks for the place of a tensor's values in memory, which these have only on the host."""

    def save(tensors: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        return save_file({name: tensor.detach().to("cpu") for name, tensor in tensors.items()}, *args, **kwargs)

    return save
