"""The cache of encoded images and prompts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from dpo_sd.files.tensors import TensorStore

Keep = Literal["all", "latents", "off"]


@dataclass(frozen=True)
class Cache:
    """The folder where encoded images and prompts are kept by content, for all runs.

    Args:
        folder: the folder itself, made when something is first kept.
        keep: "all" encodes images and prompts once; "latents" encodes prompts at every step, which training the text
            encoder and varied captions need; "off" encodes images at every step too, which random crops need.
        half: keeps tensors in half precision instead of single.
    """

    folder: Path
    keep: Keep = "all"
    half: bool = False

    def store(self, what: str) -> TensorStore:
        """The part of the cache for latents, or for prompts.

        Args:
            what: name of the part, to which the precision of the tensors is added.
        """
        import torch

        from dpo_sd.files.tensors import TensorStore

        dtype = torch.float16 if self.half else torch.float32
        return TensorStore(self.folder / f"{what}-{'fp16' if self.half else 'fp32'}", dtype)
