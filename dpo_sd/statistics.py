"""Win rates and differences with their uncertainty; the prompt is the unit that is resampled."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special, stats

from dpo_sd.errors import UserError

FEW = 8  # prompts; on fewer a bootstrap sees too little of the spread, and its 95 % cover the truth 87 % of the time


class WinRate(NamedTuple):
    """A win rate with its interval.

    Args:
        rate, low, high: in [0, 1].
        n: number of prompts or votes.
    """

    rate: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{100 * self.rate:.0f} % [{100 * self.low:.0f}, {100 * self.high:.0f}] n={self.n}"


class MeanDifference(NamedTuple):
    """A mean difference with its interval.

    Args:
        mean, low, high: in the unit of the scores.
        n: number of prompts.
    """

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:+.3g} [{self.low:+.3g}, {self.high:+.3g}] n={self.n}"


def win_shares(challenger: ArrayLike, baseline: ArrayLike, tie_band: float = 0.0) -> np.ndarray:
    """1 where the challenger scores higher, 0 where the baseline does, ½ for a tie, in the shape of the scores.

    Args:
        challenger, baseline: scores of equal shape, finite, higher is better.
        tie_band: scores that differ by at most this much are a tie, at least 0; at 0 only equal scores are.

    Raises:
        UserError: if the scores are unusable or tie_band is out of range.
    """
    if not 0 <= tie_band < math.inf:
        raise UserError(f"tie_band must be at least 0 and finite, got {tie_band}")
    first, second = _paired(challenger, baseline)
    gap = first - second
    return np.where(np.abs(gap) <= tie_band, 0.5, gap > 0)


def win_rate(shares: ArrayLike, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0) -> WinRate:
    """Mean win share over prompts, with a BCa bootstrap interval over prompts (Efron 1987).

    A share within [0, 1] varies at most as a coin of the same mean does. So below `FEW` prompts the interval is the
    exact one of coins (Clopper & Pearson 1934), and where all prompts have the same share, and the bootstrap sees no
    spread at all, Wilson's; both err on the wide side.

    Args:
        shares: (prompts,) or (prompts, seeds), in [0, 1], as `win_shares` gives them; averaged over seeds first.
        confidence: coverage of the interval, in (0, 1).
        resamples: number of bootstrap samples, at least 100.
        seed: seed of the bootstrap.

    Raises:
        UserError: if the shares are unusable or a setting is out of range.
    """
    values = _finite(shares, "shares")
    if values.min() < 0 or values.max() > 1:
        raise UserError(f"shares must be in [0, 1], got {values.min():g} to {values.max():g}")
    _check_confidence(confidence)
    _check_resamples(resamples)
    per_prompt = _per_prompt(values)
    rate, n = float(per_prompt.mean()), len(per_prompt)
    if n < FEW:
        return WinRate(rate, *_exact_interval(rate, n, confidence), n)
    if _all_equal(per_prompt, scale=1.0):
        return WinRate(rate, *_wilson_interval(rate, n, confidence), n)
    return WinRate(rate, *_bootstrap_interval(per_prompt, confidence, resamples, seed), n)


def wilson(wins: float, n: int, confidence: float = 0.95) -> WinRate:
    """Share of wins among n independent votes, with Wilson's score interval (Wilson 1927).

    Args:
        wins: in [0, n]; a tie counts ½.
        n: number of votes, at least 1.
        confidence: coverage of the interval, in (0, 1).

    Raises:
        UserError: if a value is out of range.
    """
    if n < 1:
        raise UserError(f"n must be at least 1, got {n}")
    if not 0 <= wins <= n:
        raise UserError(f"wins must be in [0, {n}], got {wins}")
    _check_confidence(confidence)
    return WinRate(wins / n, *_wilson_interval(wins / n, n, confidence), n)


def mean_difference(
    before: ArrayLike, after: ArrayLike, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> MeanDifference:
    """Mean of after - before over prompts, with a BCa bootstrap interval over prompts (Efron 1987).

    Below `FEW` prompts the interval is Student's. One prompt says nothing about the spread: its interval is infinite.
    Differences that are all equal have an interval of no width.

    Args:
        before, after: (prompts,) or (prompts, seeds), paired, finite; averaged over seeds first.
        confidence: coverage of the interval, in (0, 1).
        resamples: number of bootstrap samples, at least 100.
        seed: seed of the bootstrap.

    Raises:
        UserError: if the scores are unusable or a setting is out of range.
    """
    _check_confidence(confidence)
    _check_resamples(resamples)
    first, second = _paired(before, after)
    per_prompt = _per_prompt(second - first)
    mean, n = float(per_prompt.mean()), len(per_prompt)
    if n == 1:
        return MeanDifference(mean, -math.inf, math.inf, n)
    if _all_equal(per_prompt, scale=max(np.abs(first).max(), np.abs(second).max())):
        return MeanDifference(mean, mean, mean, n)
    if n < FEW:
        low, high = stats.t.interval(confidence, n - 1, mean, stats.sem(per_prompt))
        return MeanDifference(mean, float(low), float(high), n)
    return MeanDifference(mean, *_bootstrap_interval(per_prompt, confidence, resamples, seed), n)


def minimal_detectable_rate(n_prompts: int, confidence: float = 0.95, power: float = 0.8) -> float:
    """The true win rate above ½ that a two-sided test of n prompts finds with the given power; 1 if there is none.

    It is for one vote a prompt without ties; ties and several seeds a prompt only sharpen the test. Below `FEW` prompts
    only a win on every prompt is told from chance, if that is.

    Args:
        n_prompts: number of independent prompts, at least 1.
        confidence: in (0, 1).
        power: in [0.5, 1).

    Raises:
        UserError: if a value is out of range.
    """
    if n_prompts < 1:
        raise UserError(f"n_prompts must be at least 1, got {n_prompts}")
    if not 0.5 <= power < 1:
        raise UserError(f"power must be in [0.5, 1), got {power}")
    _check_confidence(confidence)
    if n_prompts < FEW:
        return power ** (1 / n_prompts) if _exact_interval(1.0, n_prompts, confidence)[0] > 0.5 else 1.0
    z_confidence, z_power = special.ndtri((1 + confidence) / 2), special.ndtri(power)

    def surplus(rate: float) -> float:
        return math.sqrt(n_prompts) * (rate - 0.5) - z_confidence * 0.5 - z_power * math.sqrt(rate * (1 - rate))

    return optimize.root_scalar(surplus, bracket=(0.5, 1.0)).root if surplus(1.0) > 0 else 1.0


class PositionBias(NamedTuple):
    """Share of the choices that fell on the left image.

    Args:
        share: in [0, 1].
        p: p-value of the exact two-sided binomial test that both sides are as good.
        low, high: 95 % interval of the share (Clopper and Pearson 1934).
    """

    share: float
    p: float
    low: float
    high: float


def position_bias(left: int, right: int) -> PositionBias:
    """Whether an annotator favours a side, from votes on images whose sides were drawn at random.

    Args:
        left, right: votes for the image on that side, at least one in all.

    Raises:
        UserError: if there are no votes.
    """
    if left < 0 or right < 0 or left + right < 1:
        raise UserError(f"position_bias needs votes, got {left} and {right}")
    test = stats.binomtest(left, left + right)
    interval = test.proportion_ci(0.95, "exact")
    return PositionBias(left / (left + right), float(test.pvalue), float(interval.low), float(interval.high))


def votes_to_detect(share: float = 0.6, confidence: float = 0.95, power: float = 0.8) -> int:
    """How many votes it takes to see that the left image is chosen with this probability (normal approximation).

    Args:
        share: true probability of the left image, in [0, 1] and not 1/2.
        confidence: in (0, 1).
        power: in [0.5, 1).

    Raises:
        UserError: if a value is out of range.
    """
    if not 0 <= share <= 1 or share == 0.5:
        raise UserError(f"share must be in [0, 1] and not 1/2, got {share}")
    if not 0.5 <= power < 1:
        raise UserError(f"power must be in [0.5, 1), got {power}")
    _check_confidence(confidence)
    z_confidence, z_power = special.ndtri((1 + confidence) / 2), special.ndtri(power)
    spread = z_confidence * 0.5 + z_power * math.sqrt(share * (1 - share))
    return math.ceil((spread / (share - 0.5)) ** 2)


def flip_rate(consistency: float) -> float:
    """Share of votes that are slips, in [0, 1/2], from how often an annotator repeats their choice on the same pair.

    Two votes agree when both or neither are slips: s = (1 - e)² + e². At s = 1/2 and below it is all chance.

    Args:
        consistency: s, share of the repeats with the same choice, in [0, 1].

    Raises:
        UserError: if it is out of range.
    """
    if not 0 <= consistency <= 1:
        raise UserError(f"consistency must be in [0, 1], got {consistency}")
    return (1 - math.sqrt(max(2 * consistency - 1, 0.0))) / 2


def krippendorff_alpha(values: ArrayLike) -> float:
    """Agreement of annotators beyond chance on unordered categories: 1 is perfect, 0 is chance (Krippendorff 2004).

    Args:
        values: (annotators, items), a number per category, nan where an annotator did not judge an item.

    Returns:
        At most 1; nan where no item has two judgements, 1 where all judgements are the same.

    Raises:
        UserError: if the values are no table.
    """
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2:
        raise UserError(f"values must have the shape (annotators, items), got {table.shape}")
    categories = np.unique(table[~np.isnan(table)])
    counts = (table[:, :, None] == categories).sum(axis=0)  # (items, categories)
    counts = counts[counts.sum(axis=1) > 1]
    n = counts.sum()
    if n == 0:
        return math.nan
    judged = counts.sum(axis=1)
    observed = ((judged**2 - (counts**2).sum(axis=1)) / (judged - 1)).sum() / n
    expected = (n**2 - (counts.sum(axis=0) ** 2).sum()) / (n * (n - 1))
    return float(1 - observed / expected) if expected > 0 else 1.0


def _all_equal(values: np.ndarray, scale: float) -> bool:
    # up to the rounding of sums of numbers as large as scale, on which BCa ends in 0/0
    return bool(np.ptp(values) <= 1e-12 * scale)


def _bootstrap_interval(values: np.ndarray, confidence: float, resamples: int, seed: int) -> tuple[float, float]:
    interval = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=resamples,
        batch=256,  # all resamples of 3200 prompts at once would take 256 MB
        confidence_level=confidence,
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def _exact_interval(rate: float, n: int, confidence: float) -> tuple[float, float]:
    # scipy's binomtest does the same for whole numbers of wins only, and ties are halves
    wins, tail = rate * n, (1 - confidence) / 2
    low = 0.0 if wins == 0 else stats.beta.ppf(tail, wins, n - wins + 1)
    high = 1.0 if wins == n else stats.beta.isf(tail, wins + 1, n - wins)
    return float(low), float(high)


def _wilson_interval(rate: float, n: int, confidence: float) -> tuple[float, float]:
    # scipy's binomtest has whole numbers of wins only, here too
    z = special.ndtri((1 + confidence) / 2)
    centre = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half_width = z / (1 + z**2 / n) * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    # the interval holds the rate and stays within [0, 1]: min and max only undo rounding
    return float(max(0, min(rate, centre - half_width))), float(min(1, max(rate, centre + half_width)))


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise UserError(f"confidence must be in (0, 1), got {confidence}")


def _check_resamples(resamples: int) -> None:
    if resamples < 100:
        raise UserError(f"resamples must be at least 100, got {resamples}")


def _finite(values: ArrayLike, name: str) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim not in (1, 2):
        raise UserError(f"{name} must have the shape (prompts,) or (prompts, seeds), got {array.shape}")
    if array.size == 0:
        raise UserError(f"{name} are empty: there is nothing to compare")
    if not np.isfinite(array).all():
        raise UserError(f"{name} must be finite, but {np.count_nonzero(~np.isfinite(array))} of {array.size} are not")
    return array


def _paired(first: ArrayLike, second: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    pair = _finite(first, "scores"), _finite(second, "scores")
    if pair[0].shape != pair[1].shape:
        raise UserError(f"scores must be paired, got the shapes {pair[0].shape} and {pair[1].shape}")
    return pair


def _per_prompt(values: np.ndarray) -> np.ndarray:
    return values.reshape(len(values), -1).mean(axis=1)
