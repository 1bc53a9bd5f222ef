"""Regional torch.compile: the UNet's transformer blocks, which are alike, compiled one by one for training steps."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

MOST = 1024  # graphs: each block compiles for each shape, with and without gradients, with and without adapters


def compile_blocks(unet: Any, backend: str = "inductor") -> None:
    """Compiles the transformer blocks at their first call, and again for every other shape.

    Shapes stay constants of a graph, so that a resumed run computes the same as an uninterrupted one, in whatever order
    the sizes of images come.
    """
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = MOST
    unet.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=backend)


def eager() -> AbstractContextManager[Any]:
    """Inside, nothing is compiled: validation and drawing have shapes of their own, and too few calls to earn it."""
    return torch.compiler.set_stance("force_eager")


def blocks(unet: Any) -> int:
    """How many blocks are compiled."""
    return sum(type(module).__name__ in unet._repeated_blocks for module in unet.modules())


def graphs() -> int:
    """How many graphs this process has compiled: more than blocks if sizes of images vary."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
