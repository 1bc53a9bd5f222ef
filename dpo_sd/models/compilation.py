"""Regional torch.compile: the UNet's transformer blocks, which are alike, compiled one by one for training steps."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

MOST = 1024  # graphs: each block compiles for each shape, with and without gradients, with and without adapters


def compile_blocks(unet: Any, backend: str = "inductor", sizes: int = 1) -> None:
    """Compiles the transformer blocks at their first call.

    Shapes are constants of a graph, and another number of images compiles again; so a resumed run computes the same as
    an uninterrupted one. Images of several sizes share their graphs instead, whose rounding may depend on the size that
    comes first. Fused operations round where those of their own would, so that the policy and the reference, whose
    graphs differ, still agree to the bit while they are the same network.

    Args:
        sizes: how many sizes the images have.
    """
    import torch._inductor.config
    from torch.fx.experimental import _config as shapes

    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = MOST
    torch._inductor.config.emulate_precision_casts = True
    shapes.use_duck_shape = False  # a square image has two sides that happen to be equal
    unet.compile_repeated_blocks(fullgraph=True, dynamic=sizes > 1, backend=backend)


def eager() -> AbstractContextManager[Any]:
    """Inside, nothing is compiled: validation and drawing have shapes of their own, and too few calls to earn it."""
    return torch.compiler.set_stance("force_eager")


def blocks(unet: Any) -> int:
    """How many blocks are compiled."""
    return sum(type(module).__name__ in unet._repeated_blocks for module in unet.modules())


def graphs() -> int:
    """How many graphs this process has compiled: more than blocks if sizes of images vary."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
