"""Training and validation with disjoint prompts, or disjoint images."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dpo_sd.data.samples import Samples
from dpo_sd.data.source import Found
from dpo_sd.data.usable import some
from dpo_sd.errors import UserError
from dpo_sd.noise import order

ENOUGH = 128  # prompts for a validation grid; more would cost more than the training where pairs are many
GRID_IMAGES = 16  # training images in the grid, where none are held back
_WORD, _ARTICLES = re.compile(r"[^\W_]+"), {"a", "an", "the"}


@dataclass(frozen=True)
class Split:
    """Samples for training and for validation.

    Args:
        train, validation: samples with disjoint prompts or, of single images, with disjoint images.
        report: what is used and what is left out, one line each.
        held_back: whether the validation samples are kept from training; otherwise they are some of those of `train`.
        outside: weight of a pixel where its mask is black, in [0, 1).
    """

    train: Samples
    validation: Samples
    report: list[str]
    held_back: bool = True
    outside: float = 0.0

    @property
    def prompts(self) -> list[str]:
        """The different prompts."""
        return sorted({*self.train.prompts, *self.validation.prompts})

    @property
    def held_out(self) -> list[str]:
        """The prompts that only validation has, or all of its prompts where it has no others than training."""
        prompts = set(self.validation.prompts)
        return sorted(prompts - set(self.train.prompts) or prompts)

    def found(self) -> Found:
        """Amount of the samples."""
        both = int(self.train.originals.sum()) + (len(self.validation) if self.held_back else 0)
        return Found(len(self.train), len(self.validation), both, self.prompts, self.report, self.held_out)


def essence(prompt: str) -> str:
    """A prompt without case, punctuation, white space, articles and the order of its tags, the parts between commas.

    Prompts of one essence are one prompt in other spellings. Every other word counts, and its place in its tag too: of
    "a red fox" and "a blue fox" one may well be new to a model that has learnt the other.
    """
    tags = unicodedata.normalize("NFKC", prompt).casefold().split(",")
    words = (" ".join(word for word in _WORD.findall(tag) if word not in _ARTICLES) for tag in tags)
    return ",".join(sorted({tag for tag in words if tag})) or prompt


def split(samples: Samples, validation: float, seed: int, report: Sequence[str] = (), what: str = "pairs") -> Split:
    """Training and validation with disjoint prompts; those of one `essence` stay together, and count once.

    Args:
        validation: share or number of the prompts, as in `held_back`.
        report: lines that go before the one on the numbers of samples.
        what: the samples, in the plural.

    Raises:
        UserError: if there are not two prompts, and as `held_back`.
    """
    group = {prompt: essence(prompt) for prompt in sorted(set(samples.prompts))}
    groups = list(dict.fromkeys(group.values()))  # in the order of their first prompts
    if len(groups) < 2:
        raise UserError(
            f"the data has {len(samples)} {what} on {len(groups)} prompts, and validation needs prompts of its own: "
            f"add {what} for other prompts"
        )
    apart = {groups[i] for i in order(seed, 0, len(groups))[: held_back(validation, len(groups))]}
    train, held = _parts(samples, np.array([group[prompt] in apart for prompt in samples.prompts]))
    if len(groups) < len(group):
        first = dict(zip(reversed(group.values()), reversed(group), strict=True))
        same = [f"{prompt[:100]!r} with {first[key][:100]!r}" for prompt, key in group.items() if prompt != first[key]]
        line = "prompts differ from another only in case, punctuation, articles or the order of tags, and stay with it"
        report = [*report, f"{len(same)} {line}: {some(same)}"]
    counted = f"training: {len(train)} {what} on {len(groups) - len(apart)} prompts; "
    return Split(train, held, [*report, f"{counted}validation: {len(held)} on {len(apart)} others"])


def split_images(samples: Samples, validation: float, seed: int, report: Sequence[str] = ()) -> Split:
    """Training and validation with different images; with none held back, validation is on some of those of training.

    Args:
        validation: 0, or share or number of the images as in `held_back`.
        report: lines that go before the one on the numbers of samples.

    Raises:
        UserError: as `held_back`.
    """
    images = np.unique(samples.chosen.sha256)
    shuffled = images[order(seed, 0, len(images))]
    if validation == 0 or len(images) == 1:
        grid = _held(samples, np.isin(samples.chosen.sha256, shuffled[:GRID_IMAGES]))
        line = (
            f"training: {len(samples)} pictures, none held back: the validation grid is of {len(grid)} of them, "
            "and does not show whether the training learns them by heart"
        )
        return Split(samples, grid, [*report, line], held_back=False)
    apart = shuffled[: held_back(validation, len(images))]
    train, held = _parts(samples, np.isin(samples.chosen.sha256, apart))
    return Split(train, held, [*report, f"training: {len(train)} pictures; validation: {len(held)} others"])


def _parts(samples: Samples, is_held_back: np.ndarray) -> tuple[Samples, Samples]:
    return samples.take(np.flatnonzero(~is_held_back)), _held(samples, is_held_back)


def _held(samples: Samples, wanted: np.ndarray) -> Samples:
    # a sample is validated once, however often it is trained on
    return replace(samples.take(np.flatnonzero(wanted & samples.originals)), copies=None)


def check_validation(validation: float, most: int | None = None) -> None:
    """Refuses a value that is neither a share nor a number, or more than half of the data.

    Args:
        most: prompts or images there can be, if that is known.

    Raises:
        UserError: if it is so.
    """
    if not (0 < validation <= 0.5 or (validation >= 1 and validation == int(validation))):
        raise UserError(
            f"validation must be a share above 0 and at most 0.5, or how many, from 1 on, got {validation:g}"
        )
    if most is not None:
        held_back(validation, most)


def held_back(validation: float, n: int) -> int:
    """How many of n prompts or images are for validation, at least one.

    Args:
        validation: a share, in (0, 0.5], that is taken as far as `ENOUGH`; or a number, from 1 to n // 2.

    Raises:
        UserError: if it is more than half of them.
    """
    if validation < 1:
        return max(1, min(ENOUGH, int(validation * n)))
    if validation > n // 2:
        raise UserError(f"validation={validation:g} holds back more than half of {n}: use at most {n // 2}, or a share")
    return int(validation)


def at_most(rows: int | None, wanted: int | None, what: str, validation: float, unknown: str = "") -> Found:
    """The most that there can be in a dataset of which nothing has been read yet.

    Args:
        rows: rows that the dataset has; None where that is not known.
        wanted: samples that are taken at most; None takes all.
        what: the samples, in the plural.
        validation: 0, or share or number as in `held_back`.
        unknown: what else only reading will show, in words that end a sentence.

    Raises:
        UserError: as `held_back`.
    """
    most = min((n for n in (rows, wanted) if n is not None), default=None)
    coming = f"to be {'fetched' if rows is None else 'read'}{unknown}"
    if most is None:
        return Found(None, 0, 0, 0, [f"all there are: {coming}"], fetched=False)
    apart = held_back(validation, most) if validation and most > 1 else 0
    counted = ("rows" if most == rows else what).removesuffix("s" if most == 1 else "")
    line = f"at most {most} {counted}, {apart or 'none'} of them held back: {coming}"
    return Found(most - apart, apart or min(GRID_IMAGES, most), most, most, [line], fetched=False)
