"""A card that is none: tensors that are brought to it say so, and compute where they were."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

CARD = torch.device("cuda:0")
_DEVICE, _SET_DATA = torch.Tensor.device.__get__, torch.Tensor.data.__set__  # type: ignore[attr-defined]
_OF_MODULE_TO = ("_parse_to", "_has_compatible_shallow_copy_type")  # which move nothing
_ON_CARD = WeakTensorKeyDictionary()


class Card(TorchFunctionMode):
    """Inside, `tensor.to(CARD)` marks a tensor as being there, and what is computed from it is there too.

    Operations that mix the card's tensors with others, which a card refuses, end in an error. It knows forward passes
    only.

    Attributes:
        passes: types of modules, with the devices of their parameters at each forward pass.
        moves: types of modules that were brought somewhere, and where to, in turn.
    """

    def __init__(self) -> None:
        super().__init__()
        self.passes: dict[str, list[str]] = defaultdict(list)
        self.moves: list[tuple[str, str]] = []

    def __enter__(self) -> Card:
        move = nn.Module.to

        def to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
            places = [str(arg) for arg in (*args, *kwargs.values()) if isinstance(arg, str | torch.device)]
            self.moves += [(type(module).__name__, place) for place in places]
            return move(module, *args, **kwargs)

        def watch(module: nn.Module, given: Any) -> None:
            if (parameter := next(module.parameters(), None)) is not None:
                self.passes[type(module).__name__].append(str(parameter.device))

        self._undo = register_module_forward_pre_hook(watch).remove
        self._move, nn.Module.to = move, to  # type: ignore[method-assign]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._undo()
        nn.Module.to = self._move  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _OF_MODULE_TO:
            return func(*args, **kwargs)
        if func == _DEVICE:
            return CARD if _is_there(args[0]) else func(*args)
        if func == _SET_DATA:  # by which modules move their parameters
            func(*args)
            return _mark(args[0], _is_there(args[1]))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        there = any(map(_is_there, tensors))
        wanted = next((leaf for leaf in tree_leaves((args, kwargs)) if _is_device(leaf)), None)
        if wanted is None:
            if there and any(tensor.dim() and not _is_there(tensor) for tensor in tensors):
                raise RuntimeError(f"{func.__name__} mixes tensors of the card with others")
            return tree_map(lambda leaf: _mark(leaf, there), func(*args, **kwargs))
        result = func(*tree_map(_here, args), **tree_map(_here, kwargs))
        goes = torch.device(wanted) == CARD
        moved = result.clone() if isinstance(result, torch.Tensor) and goes != there else result
        return tree_map(lambda leaf: _mark(leaf, goes), moved)


def _is_there(tensor: torch.Tensor) -> bool:
    return tensor in _ON_CARD


def _mark(leaf: Any, there: bool) -> Any:
    if isinstance(leaf, torch.Tensor):
        if there:
            _ON_CARD[leaf] = True
        else:
            _ON_CARD.pop(leaf, None)
    return leaf


def _is_device(leaf: Any) -> bool:
    return isinstance(leaf, str | torch.device) and str(leaf).split(":")[0] in ("cpu", "cuda")


def _here(leaf: Any) -> Any:
    return "cpu" if _is_device(leaf) else leaf
