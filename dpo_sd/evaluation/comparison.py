"""Comparison of two sides by one judge: win rate, properties that must not fall, and a control, all with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dpo_sd.judges.judge import Judge
from dpo_sd.statistics import MeanDifference, WinRate, mean_difference, minimal_detectable_rate, win_rate, win_shares

if TYPE_CHECKING:
    from PIL import Image


class Change(NamedTuple):
    """Mean of a property on both sides, and the mean difference, paired by prompt."""

    before: float
    after: float
    difference: MeanDifference

    def __str__(self) -> str:
        mean, low, high, _ = self.difference
        return f"{self.before:.3f} → {self.after:.3f}  change {mean:+.3f} [{low:+.3f}, {high:+.3f}]"


@dataclass(frozen=True)
class Comparison:
    """Result of a comparison of the images after a change with those before it.

    Args:
        win: how often the side after wins; a tie counts ½.
        judge: name of the judge.
        labelled_by: name of the judge that labelled the training pairs; None where people did, or nobody.
        score_before, score_after: mean scores, higher is better, in the judge's own unit.
        properties: scores in [0, 1] that must not fall, by name.
        control: win rate of the side before over itself under other seeds (A/A), which shows what a win rate of equals
            looks like here; None with one seed per prompt.
    """

    win: WinRate
    seeds_per_prompt: int
    judge: str
    labelled_by: str | None
    score_before: float
    score_after: float
    properties: Mapping[str, Change]
    control: WinRate | None

    def record(self) -> dict[str, Any]:
        """The result in values that JSON knows, as "verdict" of summary.json holds it."""
        changes = {
            name: {"before": change.before, "after": change.after, **change.difference._asdict()}
            for name, change in self.properties.items()
        }
        return {
            "win_rate": self.win.rate,
            "low": self.win.low,
            "high": self.win.high,
            "n_prompts": self.win.n,
            "seeds_per_prompt": self.seeds_per_prompt,
            "judge": self.judge,
            "labelled_by": self.labelled_by,
            "score_before": self.score_before,
            "score_after": self.score_after,
            "properties": changes,
        } | ({} if self.control is None else {"a_a": self.control._asdict()})

    def lines(self) -> list[str]:
        """All but the win rate in words, one line each."""
        entries = {"judge": self.judge}
        if self.judge == self.labelled_by:
            entries["labels"] = "by the same judge: it says whether its taste was learnt, not whether people share it"
        entries["score"] = f"{self.score_before:.2f} → {self.score_after:.2f}"
        entries |= {name: str(change) for name, change in self.properties.items()}
        if self.control is not None:
            entries["A/A control"] = f"{self.control}: the reference against itself, other seeds"
        return [f"  {name:<13} {text}" for name, text in entries.items()]


def compare(
    judge: Judge,
    prompts: Sequence[str],
    before: Sequence[Image.Image],
    after: Sequence[Image.Image],
    labelled_by: str | None = None,
) -> Comparison:
    """Compare two sides that drew the same prompts with the same seeds; the prompt is the unit of the intervals.

    Args:
        prompts: one per image; all images of a prompt in a row, the same number of each.
        before, after: images of the two sides, (prompts · seeds per prompt,) each.
        labelled_by: name of the judge that labelled the training pairs, if one did.
    """
    n = len(dict.fromkeys(prompts))

    def by_prompt(scores: Sequence[float]) -> np.ndarray:
        return np.array(scores).reshape(n, -1)

    first, second = (by_prompt(judge.scores(images, prompts)) for images in (before, after))
    old, new = (judge.properties(images, prompts) for images in (before, after))
    changes = {
        name: Change(
            float(np.mean(old[name])),
            float(np.mean(new[name])),
            mean_difference(by_prompt(old[name]), by_prompt(new[name])),
        )
        for name in old
    }
    several = first.shape[1] > 1
    return Comparison(
        win=win_rate(win_shares(second, first)),
        seeds_per_prompt=first.shape[1],
        judge=judge.name,
        labelled_by=labelled_by,
        score_before=float(first.mean()),
        score_after=float(second.mean()),
        properties=changes,
        # each image against another seed of its own prompt and side
        control=win_rate(win_shares(first[:, 1:], first[:, :-1])) if several else None,
    )


def too_few(n: int) -> bool:
    """Whether `n` prompts cannot tell any win rate from chance: not even where every one of them is won."""
    return minimal_detectable_rate(n) == 1


def power(n: int, wanted: int) -> str:
    """Sentence on what `n` prompts can show, where `wanted` were asked for."""
    fewer = "" if n == wanted else f" (there are no {wanted})"
    if too_few(n):
        return f"{n} held-out prompts{fewer} cannot tell any win rate from chance"
    rate = minimal_detectable_rate(n)
    return f"on {n} held-out prompts{fewer}, a win rate of {rate:.0%} is told from chance with 80 % power"
