"""A judge of the shapes world, which measures pixels."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from dpo_sd.shapes.oracle import UTILITIES, check_known, score, style_score
from dpo_sd.shapes.scenes import STYLES


class Oracle:
    """A taste in pictures of the shapes world: what a simulated annotator goes by, and what a verdict is judged by.

    Args:
        preference: what is better, a name in `UTILITIES`.
        style: that pictures are read in, one of `STYLES`.

    Raises:
        UserError: when either is unknown.
    """

    def __init__(self, preference: str = "centred", style: str = "flat"):
        check_known(preference, UTILITIES, "preference")
        check_known(style, STYLES, "style")
        self.preference, self.style = preference, style

    @property
    def name(self) -> str:
        return f"oracle: {self.preference}" + ("" if self.style == "flat" else f", in the {self.style} style")

    def judge(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """How good each picture is to this taste; higher is better."""
        utility = UTILITIES[self.preference]
        return [utility(image, prompt, self.style) for image, prompt in zip(images, prompts, strict=True)]

    def properties(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, list[float]]:
        """What captions demand, and the style: scores of each picture by name, each in [0, 1]."""
        scores = [score(image, prompt, self.style) for image, prompt in zip(images, prompts, strict=True)]
        names = ("shape", "colour", "size", "background", "clean", "overall", "faithful")
        found = {name: [float(getattr(s, name)) for s in scores] for name in names}
        if self.style != "flat":
            found["style"] = [style_score(image, self.style) for image in images]
        return found
