"""A judge of the shapes world, which measures pixels."""

from __future__ import annotations

from collections.abc import Sequence

from PIL.Image import Image

from dpo_sd.errors import UserError
from dpo_sd.judges.judge import Judge
from dpo_sd.shapes.captions import parse
from dpo_sd.shapes.oracle import UTILITIES, check_known, score, style_score
from dpo_sd.shapes.scenes import RESOLUTION, STYLES


class Oracle(Judge):
    """Judges images of the shapes world by a known taste.

    Args:
        preference: the taste, a name in `UTILITIES`.
        style: the style in which the images are read, one of `STYLES`.

    Raises:
        UserError: if either is unknown.
    """

    def __init__(self, preference: str = "centred", style: str = "flat"):
        check_known(preference, UTILITIES, "preference")
        check_known(style, STYLES, "style")
        self.preference, self.style = preference, style
        self.name = f"oracle: {preference}" + ("" if style == "flat" else f", in the {style} style")

    def check(self, size: tuple[int, int], prompts: Sequence[str]) -> None:
        if size != (RESOLUTION, RESOLUTION):
            raise UserError(
                f"the oracle measures pictures of {RESOLUTION}x{RESOLUTION} pixels, got {size[0]}x{size[1]}: "
                "use judge=none, or a judge for such pictures"
            )
        for prompt in prompts:
            parse(prompt)

    def scores(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        utility = UTILITIES[self.preference]
        return [utility(image, prompt, self.style) for image, prompt in zip(images, prompts, strict=True)]

    def properties(self, images: Sequence[Image], prompts: Sequence[str]) -> dict[str, list[float]]:
        """How far the captions are kept, by what all of them ask for; and the style, if it is another than flat."""
        measured = [score(image, prompt, self.style) for image, prompt in zip(images, prompts, strict=True)]
        kept = [each.named | {"overall": each.overall, "faithful": float(each.faithful)} for each in measured]
        names = ("shape", "colour", "size", "background", "clean", "overall", "faithful")
        found = {name: [each[name] for each in kept] for name in names if all(name in each for each in kept)}
        if self.style != "flat":
            found["style"] = [style_score(image, self.style) for image in images]
        return found
