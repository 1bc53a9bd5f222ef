"""Where encoded images and prompts are kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from dpo_sd.files.tensors import TensorStore

Keep = Literal["all", "latents", "off"]


@dataclass(frozen=True)
class Cache:
    """Where encoded pictures and prompts are kept, by content, for all runs.

    Args:
        folder: of the cache.
        keep: "all" encodes pictures and prompts once; "latents" encodes prompts at every step, which training the text
            encoder and varied captions need; "off" encodes pictures at every step too, which random crops need.
        half: keeps tensors in half precision instead of single.
    """

    folder: Path
    keep: Keep = "all"
    half: bool = False

    def store(self, what: str) -> TensorStore:
        """The part of the cache for latents, or for prompts.

        Args:
            what: its name, the precision of the tensors is added to it.
        """
        import torch

        from dpo_sd.files.tensors import TensorStore

        dtype = torch.float16 if self.half else torch.float32
        return TensorStore(self.folder / f"{what}-{'fp16' if self.half else 'fp32'}", dtype)
