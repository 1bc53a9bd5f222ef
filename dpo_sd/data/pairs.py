"""Pairs of pictures in a folder, with what people prefer, as training data."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

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
        self.soft_labels, self.weight_by_prompt, self.seed = soft_labels, weight_by_prompt, seed
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
        self.usable, unreadable = self._readable(usable)
        self.report += unreadable
        prompts = sorted({p.pair.prompt for p in self.usable})
        if len(prompts) < 2:
            raise UserError(
                f"{self.folder} has decided pairs on {len(prompts)} prompt only, and validation needs another: "
                "generate and annotate pairs for more prompts"
            )
        prompts = [prompts[i] for i in order(seed, 0, len(prompts))]
        self.validation_prompts = set(prompts[: max(1, math.floor(validation * len(prompts)))])

    def _readable(self, preferences: Sequence[Preference]) -> tuple[list[Preference], list[str]]:
        kept, complaints = [], []
        for preference in preferences:
            pair = preference.pair
            try:
                sizes = {check_image(image_file(self.folder, image)) for image in (pair.image_0, pair.image_1)}
                if len(sizes) > 1:
                    raise UserError(f"{pair.image_0} and {pair.image_1} differ in size")
                kept.append(preference)
            except UserError as error:
                complaints.append(str(error))
        return kept, _unreadable(complaints, len(preferences))

    def prepare(self, model: StableDiffusion, sampler: Sampler, cache_dir: Path) -> PreparedData:
        """Reads and encodes the pictures."""
        train, report = self._encoded(model, [p for p in self.usable if p.pair.prompt not in self.validation_prompts])
        validation, more = self._encoded(model, [p for p in self.usable if p.pair.prompt in self.validation_prompts])
        held_out = validation.prompts
        if self.judge is not None:
            held_out = split_prompts(self.seed).held_out
        known = set(train.prompts)
        held_out = [prompt for prompt in dict.fromkeys(held_out) if prompt not in known]
        split = (
            f"training: {len(train)} pairs on {len(known)} prompts; "
            f"validation: {len(validation)} pairs on {len(set(validation.prompts))} others"
        )
        return PreparedData(train, validation, held_out, [*self.report, *report, *more, split])

    def _encoded(self, model: StableDiffusion, preferences: Sequence[Preference]) -> tuple[EncodedPairs, list[str]]:
        kept: list[Preference] = []
        chosen: list[Image.Image] = []
        rejected: list[Image.Image] = []
        complaints = []
        for preference in preferences:
            pair = preference.pair
            try:
                pictures = [load_image(self.folder, image) for image in (pair.image_0, pair.image_1)]
            except UserError as error:
                complaints.append(str(error))
                continue
            first = 1 if preference.status == "image_1" else 0
            kept.append(preference)
            chosen.append(pictures[first])
            rejected.append(pictures[1 - first])
        report = _unreadable(complaints, len(preferences))
        if not kept:
            raise UserError(f"none of {len(preferences)} pairs in {self.folder} can be read: {complaints[0]}")
        size = (model.resolution, model.resolution)
        if other := next((picture for picture in chosen if picture.size != size), None):
            raise UserError(
                f"{self.folder} has pictures of {other.width}x{other.height} pixels, and {model.name} is trained at "
                f"{size[0]}x{size[1]}: generate the pairs with this model"
            )
        prompts = [p.pair.prompt for p in kept]
        counts = Counter(prompts)
        pairs = encode(
            model,
            prompts,
            chosen,
            rejected,
            sample_ids=[sample_id(p.pair.prompt, p.pair.image_0_uid, p.pair.image_1_uid) for p in kept],
            label=[self._label(p) for p in kept],
            weight=[1 / counts[prompt] for prompt in prompts] if self.weight_by_prompt else None,
        )
        return pairs, [*report, *too_long(model, prompts)]

    def _label(self, preference: Preference) -> float:
        if preference.status == "tie":
            return 0.5
        return max(preference.label_0, 1 - preference.label_0) if self.soft_labels else 1.0


def counted(preferences: Sequence[Preference]) -> str:
    """What the votes come to, in words: `412 pairs: 380 decided, 20 tie, 12 skipped`."""
    counts = Counter("decided" if p.status in ("image_0", "image_1") else p.status for p in preferences)
    named = ", ".join(f"{n} {status.replace('_', ' ')}" for status, n in counts.most_common())
    return f"{len(preferences)} pairs" + (f": {named}" if named else "")


def _unreadable(complaints: Sequence[str], n: int) -> list[str]:
    if not complaints:
        return []
    return [f"left out {len(complaints)} of {n} pairs that cannot be read: {'; '.join(complaints[:5])}"]
