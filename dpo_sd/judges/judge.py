"""The contract of a judge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


class Judge:
    """Base class of the group `judge`: scores images, so that the better of two can be told without a person.

    Attributes:
        name: stands beside every result that this judge decided.
    """

    name: str

    def check(self, size: tuple[int, int], prompts: Sequence[str]) -> None:
        """Refuses images or prompts that cannot be judged, before anything expensive; by default nothing is refused.

        Args:
            size: width and height of the images, in pixels.
            prompts: the texts that they are drawn for.

        Raises:
            UserError: if the judge cannot work with such images or one of the prompts.
        """

    def scores(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        """One finite score per image; higher is better.

        Args:
            images: all of one size.
            prompts: one per image.
        """
        raise NotImplementedError

    def properties(self, images: Sequence[Image], prompts: Sequence[str]) -> dict[str, list[float]]:
        """Properties that must not fall while the score rises: by name, one value in [0, 1] per image.

        Args:
            images, prompts: as for `scores`.
        """
        return {}
