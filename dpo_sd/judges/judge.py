"""The contract of a judge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from PIL import Image


class Judge(Protocol):
    """Who says which of two pictures is better, once the training is over."""

    @property
    def name(self) -> str: ...

    def judge(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """How good each picture is; higher is better."""
        ...

    def properties(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, list[float]]:
        """Scores of each picture by name, each in [0, 1]: what must not fall while the judged quality rises."""
        ...
