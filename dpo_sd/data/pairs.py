"""Pairs of pictures in a folder, with what people prefer, as training data."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dpo_sd.data.source import PreparedData, checked_dropout, encode, too_long
from dpo_sd.errors import UserError
from dpo_sd.noise import order, sample_id
from dpo_sd.pairs import check_image, image_file, load_image
from dpo_sd.preferences import Preference, read_preferences
from dpo_sd.shapes.captions import split_prompts

if TYPE_CHECKING:
    from PIL import Image

    from dpo_sd.data.batches import EncodedPairs
    from dpo_sd.models import StableDiffusion
    from dpo_sd.sampling import Sampler


class Pairs:
    """A pair folder as `python -m dpo_sd.annotate` leaves it, or any folder with a `metadata.jsonl` of that kind.

    Args:
        pairs: the folder.
        validation: share of the prompts held back for the validation grid, in (0, 0.5]; at least one prompt is.
        soft_labels: where several people voted, P(chosen is better) is their share; otherwise the majority decides.
        ties: trains on ties too, with P = 1/2.
        weight_by_prompt: weighs each pair by one over the number of pairs with its prompt.
        caption_dropout: share of visits that train on the empty prompt, in [0, 1].
        judge: taste of the oracle that judges the verdict, a name in `dpo_sd.shapes.oracle.UTILITIES`, for pictures of
            the shapes world; None where only people can judge.
        style: that the oracle reads the pictures in.
        seed: of the split into training and validation.

    Raises:
        UserError: when a setting is out of range, the folder cannot be read, nothing in it is decided, or there is only
            one prompt.
    """

    has_pairs: ClassVar[bool] = True

    def __init__(
        self,
        pairs: str,
        validation: float = 0.1,
        soft_labels: bool = False,
        ties: bool = False,
        weight_by_prompt: bool = False,
        caption_dropout: float = 0.0,
        judge: str | None = None,
        style: str = "flat",
        seed: int = 0,
    ):
        if not 0 < validation <= 0.5:
            raise UserError(f"validation must be above 0 and at most 0.5, got {validation}")
        self.folder = Path(pairs).expanduser()
        self.validation, self.seed = validation, seed
        self.soft_labels, self.weight_by_prompt = soft_labels, weight_by_prompt
        self.caption_dropout = checked_dropout(caption_dropout)
        self.judge = None
        if judge is not None:
            from dpo_sd.shapes.oracle import Oracle

            self.judge = Oracle(judge, style)
        preferences = read_preferences(self.folder)
        self.report = [f"{self.folder}: {counted(preferences)}"]
        usable = [p for p in preferences if p.status in ("image_0", "image_1") or (ties and p.status == "tie")]
        if not usable:
            raise UserError(
                f"{self.folder} has no {'decided or tied' if ties else 'decided'} pair ({counted(preferences)}): "
                f"choose the better pictures with python -m dpo_sd.annotate pairs={self.folder}"
            )
        self.usable = self._those_that(self._check, usable)
        self._check_prompts(self.usable)

    def prepare(self, model: StableDiffusion, sampler: Sampler, cache_dir: Path) -> PreparedData:
        """Reads and encodes the pictures."""
        usable = self._those_that(self._pictures, self.usable)
        prompts = self._check_prompts(usable)
        prompts = [prompts[i] for i in order(self.seed, 0, len(prompts))]
        held_back = set(prompts[: max(1, math.floor(self.validation * len(prompts)))])
        train = self._encoded(model, [p for p in usable if p.pair.prompt not in held_back])
        validation = self._encoded(model, [p for p in usable if p.pair.prompt in held_back])
        held_out = split_prompts(self.seed).held_out if self.judge is not None else sorted(held_back)
        known = set(train.prompts)
        split = (
            f"training: {len(train)} pairs on {len(known)} prompts; "
            f"validation: {len(validation)} pairs on {len(held_back)} others"
        )
        report = [*self.report, *too_long(model, prompts), split]
        return PreparedData(train, validation, [prompt for prompt in held_out if prompt not in known], report)

    def _those_that(self, work: Callable[[Preference], Any], preferences: Sequence[Preference]) -> list[Preference]:
        """Those on which `work` finds nothing unreadable; the others are named in the report."""
        kept, complaints = [], []
        for preference in preferences:
            try:
                work(preference)
                kept.append(preference)
            except UserError as error:
                complaints.append(str(error))
        if complaints:
            named = "; ".join(complaints[:5])
            self.report.append(f"left out {len(complaints)} of {len(preferences)} pairs that cannot be read: {named}")
        return kept

    def _check(self, preference: Preference) -> None:
        """By the headers alone."""
        pair = preference.pair
        sizes = {check_image(image_file(self.folder, image)) for image in (pair.image_0, pair.image_1)}
        if len(sizes) > 1:
            raise UserError(f"{pair.image_0} and {pair.image_1} differ in size")

    def _check_prompts(self, usable: Sequence[Preference]) -> list[str]:
        prompts = sorted({p.pair.prompt for p in usable})
        if not prompts:
            raise UserError(f"no decided pair of {self.folder} can be read: {self.report[-1]}")
        if len(prompts) < 2:
            raise UserError(
                f"{self.folder} has decided pairs on {len(prompts)} prompt only, and validation needs another: "
                "generate and annotate pairs for more prompts"
            )
        return prompts

    def _pictures(self, preference: Preference) -> tuple[Image.Image, Image.Image]:
        """The chosen and the rejected one."""
        first, second = (load_image(self.folder, image) for image in (preference.pair.image_0, preference.pair.image_1))
        return (second, first) if preference.status == "image_1" else (first, second)

    def _encoded(self, model: StableDiffusion, preferences: Sequence[Preference]) -> EncodedPairs:
        chosen, rejected = zip(*(self._pictures(preference) for preference in preferences), strict=True)
        size = (model.resolution, model.resolution)
        if other := next((picture for picture in chosen if picture.size != size), None):
            raise UserError(
                f"{self.folder} has pictures of {other.width}x{other.height} pixels, and {model.name} is trained at "
                f"{size[0]}x{size[1]}: generate the pairs with this model"
            )
        prompts = [p.pair.prompt for p in preferences]
        counts = Counter(prompts)
        return encode(
            model,
            prompts,
            chosen,
            rejected,
            sample_ids=[sample_id(p.pair.prompt, p.pair.image_0_uid, p.pair.image_1_uid) for p in preferences],
            label=[self._label(p) for p in preferences],
            weight=[1 / counts[prompt] for prompt in prompts] if self.weight_by_prompt else None,
        )

    def _label(self, preference: Preference) -> float:
        if preference.status == "tie":
            return 0.5
        return max(preference.label_0, 1 - preference.label_0) if self.soft_labels else 1.0


def counted(preferences: Sequence[Preference]) -> str:
    """What the votes come to, in words: `412 pairs: 380 decided, 20 tie, 12 skipped`."""
    counts = Counter("decided" if p.status in ("image_0", "image_1") else p.status for p in preferences)
    named = ", ".join(f"{n} {status.replace('_', ' ')}" for status, n in counts.most_common())
    return f"{len(preferences)} pairs" + (f": {named}" if named else "")
