"""Training and validation with disjoint prompts or images."""

from __future__ import annotations

import numpy as np

from dpo_sd.data.samples import Found, Samples
from dpo_sd.errors import UserError
from dpo_sd.noise import order

ENOUGH = 128  # prompts for a validation grid; more would cost more than the training where pairs are many


def split(samples: Samples, validation: float, seed: int, report: list[str], what: str = "pairs") -> Found:
    """Training and validation with disjoint prompts.

    Args:
        validation: as in `held_back`, of the prompts.

    Raises:
        UserError: when there are not two prompts, and as `held_back`.
    """
    prompts = sorted(set(samples.prompts))
    if len(prompts) < 2:
        raise UserError(
            f"the data has {len(samples)} {what} on {len(prompts)} prompts, and validation needs prompts of its own: "
            f"add {what} for other prompts"
        )
    shuffled = [prompts[i] for i in order(seed, 0, len(prompts))]
    apart = set(shuffled[: held_back(validation, len(prompts))])
    is_held_back = np.array([prompt in apart for prompt in samples.prompts])
    found = Found(samples.take(np.flatnonzero(~is_held_back)), samples.take(np.flatnonzero(is_held_back)), report)
    report.append(
        f"training: {len(found.train)} {what} on {len(prompts) - len(apart)} prompts; "
        f"validation: {len(found.validation)} on {len(apart)} others"
    )
    return found


def check_validation(validation: float, most: int | None = None) -> None:
    """Refuse what is neither a share nor a number, and more than half of what there is at most, if that is known."""
    if not (0 < validation <= 0.5 or (validation >= 1 and validation == int(validation))):
        raise UserError(
            f"validation must be a share above 0 and at most 0.5, or how many, from 1 on, got {validation:g}"
        )
    if most is not None:
        held_back(validation, most)


def held_back(validation: float, n: int) -> int:
    """How many of n prompts or pictures are for validation, at least one.

    Args:
        validation: a share, in (0, 0.5], that is taken as far as `ENOUGH`; or how many, from 1 to half of them.

    Raises:
        UserError: when it is more than half of them.
    """
    if validation < 1:
        return max(1, min(ENOUGH, int(validation * n)))
    if validation > n // 2:
        raise UserError(f"validation={validation:g} holds back more than half of {n}: use at most {n // 2}, or a share")
    return int(validation)


GRID_PICTURES = 16  # of the training pictures, where none are held back


def split_pictures(samples: Samples, validation: float, seed: int, report: list[str]) -> Found:
    """Training and validation with different pictures; with no share held back, validation is on those of the training.

    Args:
        validation: 0, or as in `held_back`, of the pictures.
    """
    pictures = np.unique(samples.chosen.sha256)
    shuffled = pictures[order(seed, 0, len(pictures))]
    if validation == 0 or len(pictures) == 1:
        shown = np.flatnonzero(np.isin(samples.chosen.sha256, shuffled[:GRID_PICTURES]))
        report.append(
            f"training: {len(samples)} pictures, none held back: the validation grid is of {len(shown)} of them, "
            "and does not show whether the training learns them by heart"
        )
        return Found(samples, samples.take(shown), report)
    is_held_back = np.isin(samples.chosen.sha256, shuffled[: held_back(validation, len(pictures))])
    found = Found(samples.take(np.flatnonzero(~is_held_back)), samples.take(np.flatnonzero(is_held_back)), report)
    report.append(f"training: {len(found.train)} pictures; validation: {len(found.validation)} others")
    return found
