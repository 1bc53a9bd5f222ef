from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from dpo_sd.errors import UserError
from dpo_sd.statistics import (
    FEW,
    MeanDifference,
    WinRate,
    flip_rate,
    krippendorff_alpha,
    mean_difference,
    minimal_detectable_rate,
    position_bias,
    votes_to_detect,
    wilson,
    win_rate,
    win_shares,
)

# win_shares


def test_the_first_argument_wins_where_its_score_is_higher():
    assert win_shares([2.0, 1.0, 1.0], [1.0, 2.0, 1.0]).tolist() == [1.0, 0.0, 0.5]


def test_the_shares_of_both_sides_add_up_to_one():
    a, b = np.random.default_rng(0).integers(0, 4, (2, 50, 3)).astype(float)
    np.testing.assert_array_equal(win_shares(a, b) + win_shares(b, a), np.ones((50, 3)))


def test_scores_within_the_band_are_a_tie():
    assert win_shares([1.25, 1.0, 1.5], [1.0, 1.25, 1.0], tie_band=0.25).tolist() == [0.5, 0.5, 1.0]


@pytest.mark.parametrize("tie_band", [-0.1, math.nan, math.inf])
def test_a_tie_band_out_of_range_is_refused(tie_band: float):
    with pytest.raises(UserError, match=f"tie_band must be at least 0 and finite, got {tie_band}"):
        win_shares([1.0], [0.0], tie_band)


# win_rate


def test_the_win_rate_is_the_mean_over_prompts():
    result = win_rate([1, 1, 1, 0, 0.5, 1, 0, 1])
    assert result.rate == 5.5 / 8
    assert result.n == 8
    assert result.low < result.rate < result.high


def test_a_challenger_that_scores_higher_has_a_win_rate_above_a_half():
    rng = np.random.default_rng(0)
    challenger, baseline = rng.normal(1.0, 1.0, 200), rng.normal(0.0, 1.0, 200)
    assert win_rate(win_shares(challenger, baseline)).low > 0.5
    assert win_rate(win_shares(baseline, challenger)).high < 0.5


def test_the_interval_of_many_coins_is_near_the_normal_one():
    """400 wins of 800: 0.5 ± 1.96 · √(0.25 / 800) = 0.5 ± 0.0346."""
    result = win_rate([0, 1] * 400)
    assert (result.low, result.high) == pytest.approx((0.4654, 0.5346), abs=0.003)


def test_seeds_are_averaged_first_so_that_copies_of_a_prompt_are_no_new_evidence():
    one_seed = np.random.default_rng(0).integers(0, 2, (40, 1))
    assert win_rate(np.repeat(one_seed, 8, axis=1)) == win_rate(one_seed)
    assert win_rate(one_seed) == win_rate(one_seed[:, 0])


def test_more_confidence_needs_a_wider_interval():
    shares = [0, 1, 1] * 20
    narrow, wide = win_rate(shares, confidence=0.8), win_rate(shares, confidence=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_the_same_seed_gives_the_same_interval():
    shares = np.random.default_rng(0).random(30)
    assert win_rate(shares, resamples=200, seed=3) == win_rate(shares, resamples=200, seed=3)
    assert win_rate(shares, resamples=200, seed=3) != win_rate(shares, resamples=200, seed=4)


@pytest.mark.parametrize("seeds", [1, 4])
@pytest.mark.parametrize("rate", [0.5, 0.8])
def test_the_interval_covers_the_truth_as_often_as_it_says(rate: float, seeds: int):
    """200 evaluations of 40 prompts that differ in difficulty: 95 % ± 4 standard errors of 1.5 %, less 1 % of bias."""
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        difficulty = rng.beta(4 * rate, 4 * (1 - rate), (40, 1))
        result = win_rate(rng.random((40, seeds)) < difficulty, resamples=500, seed=trial)
        covered += result.low <= rate <= result.high
    assert 0.88 <= covered / 200 <= 0.995


@pytest.mark.parametrize(("share", "n"), [(1.0, 128), (0.0, 128), (0.5, 10), (0.3, 8)])
def test_equal_shares_have_wilsons_interval(share: float, n: int):
    result = win_rate([share] * n)
    assert tuple(result) == pytest.approx(tuple(wilson(share * n, n)))
    assert 0 <= result.low <= result.rate <= result.high <= 1
    assert result.high - result.low > 0.01


def test_all_wins_do_not_prove_that_every_prompt_is_won():
    """Wilson at rate 1: low = n / (n + z²) = 16 / (16 + 3.8415) = 0.8064."""
    assert win_rate([1.0] * 16).low == pytest.approx(0.8064, abs=1e-4)


@pytest.mark.parametrize("shares", [[0, 1], [1, 1, 0], [0.5, 0.6], [1] * 127 + [0.5]])
@pytest.mark.filterwarnings("error")
def test_few_or_nearly_equal_shares_have_a_finite_interval_without_warnings(shares: list[float]):
    result = win_rate(shares)
    assert 0 <= result.low <= result.rate <= result.high <= 1


@pytest.mark.filterwarnings("error")
def test_shares_that_are_equal_but_for_rounding_have_wilsons_interval():
    result = win_rate([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]] * 4)  # the sums differ in the last bit
    assert tuple(result) == pytest.approx(tuple(wilson(1.6, 8)))


@pytest.mark.parametrize("n", range(1, FEW + 1))
def test_the_interval_of_few_prompts_covers_the_truth_as_often_as_it_says(n: int):
    """Counted, not drawn: every number of wins with its probability. An average over rates is above 94 % at each n."""
    intervals = [win_rate([1.0] * wins + [0.0] * (n - wins), resamples=2000) for wins in range(n + 1)]
    covered = []
    for rate in np.linspace(0.02, 0.98, 49):
        within = [result.low <= rate <= result.high for result in intervals]
        covered.append(stats.binom.pmf(range(n + 1), n, rate)[within].sum())
    assert np.mean(covered) >= 0.94 and (n == FEW or min(covered) >= 0.95)


@pytest.mark.parametrize("n", [2, 4, 7])
def test_few_prompts_that_differ_have_an_interval_that_covers_the_truth_too(n: int):
    """Two seeds a prompt, of difficulties that spread evenly, and differences of scores that are normal."""
    rng = np.random.default_rng(n)
    shares = (rng.random((500, n, 2)) < rng.beta(2.8, 1.2, (500, n, 1))).mean(axis=2)
    assert np.mean([result.low <= 0.7 <= result.high for result in map(win_rate, shares)]) >= 0.94
    changes = (mean_difference(np.zeros(n), scores) for scores in rng.normal(1.0, 1.0, (500, n)))
    assert np.mean([change.low <= 1 <= change.high for change in changes]) >= 0.93  # 95 % less 2 standard errors


@pytest.mark.parametrize("wins", [0, 2, 5])
def test_the_interval_of_few_prompts_is_the_exact_one(wins: int):
    expected = stats.binomtest(wins, 5).proportion_ci(0.9, method="exact")
    result = win_rate([1.0] * wins + [0.0] * (5 - wins), confidence=0.9)
    assert (result.low, result.high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_shares_outside_the_unit_interval_are_refused(share: float):
    with pytest.raises(UserError, match=r"shares must be in \[0, 1\]"):
        win_rate([share, 0.5])


@pytest.mark.parametrize("resamples", [0, -1, 99])
def test_too_few_resamples_are_refused_even_where_none_are_needed(resamples: int):
    with pytest.raises(UserError, match=f"resamples must be at least 100, got {resamples}"):
        win_rate([1.0, 1.0], resamples=resamples)


# wilson


@pytest.mark.parametrize(("wins", "n"), [(0, 1), (5, 10), (81, 263), (999, 1000), (7, 7)])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_wilson_agrees_with_scipy(wins: int, n: int, confidence: float):
    expected = stats.binomtest(wins, n).proportion_ci(confidence, method="wilson")
    result = wilson(wins, n, confidence)
    assert (result.low, result.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert (result.rate, result.n) == (wins / n, n)


def test_wilson_gives_the_published_interval():
    """81 of 263 at 95 %: 0.2553 to 0.3662 (Newcombe 1998, table I, method 3)."""
    result = wilson(81, 263)
    assert (result.low, result.high) == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_wilson_takes_half_wins_for_ties():
    whole, half, next_whole = wilson(6, 10), wilson(6.5, 10), wilson(7, 10)
    assert whole.low < half.low < next_whole.low


@pytest.mark.parametrize(("wins", "n"), [(0, 0), (0, -1), (-1, 10), (11, 10), (math.nan, 10)])
def test_impossible_counts_are_refused(wins: float, n: int):
    with pytest.raises(UserError, match="got"):
        wilson(wins, n)


# mean_difference


def test_the_mean_difference_is_after_minus_before():
    result = mean_difference([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    assert result.mean == 2.0
    assert result.low < 2.0 < result.high


def test_what_all_prompts_share_does_not_widen_the_paired_interval():
    rng = np.random.default_rng(0)
    prompt, gain = rng.normal(0, 100, 50), rng.normal(1, 0.1, 50)
    result = mean_difference(prompt, prompt + gain)
    assert result.high - result.low < 0.1
    assert (result.low, result.high) == pytest.approx(
        stats.t.interval(0.95, 49, gain.mean(), stats.sem(gain)), abs=5e-3
    )


def test_one_prompt_says_nothing_about_the_spread():
    assert mean_difference([1.0], [3.0]) == MeanDifference(2.0, -math.inf, math.inf, 1)


def test_equal_differences_have_an_interval_of_no_width():
    assert mean_difference([1.0, 2.0], [1.0, 2.0]) == MeanDifference(0.0, 0.0, 0.0, 2)


@pytest.mark.filterwarnings("error")
def test_differences_that_are_equal_but_for_rounding_count_as_equal():
    before = np.random.default_rng(0).random((100, 3))
    for scores in before:
        result = mean_difference(scores, scores + 0.3)
        assert result.low == result.mean == result.high == pytest.approx(0.3)


def test_seeds_are_averaged_before_differences_are_resampled():
    before, after = np.random.default_rng(0).random((2, 30, 1))
    copies = mean_difference(before.repeat(4, axis=1), after.repeat(4, axis=1))
    assert tuple(copies) == pytest.approx(tuple(mean_difference(before, after)))


# minimal_detectable_rate


def test_the_known_sample_size_for_sixty_forty():
    assert minimal_detectable_rate(194) == pytest.approx(0.6, abs=5e-4)


def test_more_prompts_detect_less_and_more_power_needs_more():
    rates = [minimal_detectable_rate(n) for n in (6, 50, 500, 5000)]
    assert rates == sorted(rates, reverse=True)
    assert 0.5 < rates[-1] < rates[0] < 1
    assert minimal_detectable_rate(100, power=0.95) > minimal_detectable_rate(100, power=0.8)
    assert minimal_detectable_rate(100, confidence=0.99) > minimal_detectable_rate(100, confidence=0.95)


def test_the_detectable_rate_is_detected_with_the_promised_power():
    n = 500
    wins = np.random.default_rng(0).binomial(n, minimal_detectable_rate(n), 2000)
    detected = np.mean([wilson(count, n).low > 0.5 for count in wins])
    assert detected == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize("n", [1, 3, 5])
def test_too_few_prompts_detect_nothing(n: int):
    assert minimal_detectable_rate(n) == 1.0 and win_rate([1.0] * n).low < 0.5


def test_six_prompts_detect_nothing_but_a_win_on_each():
    """p⁶ = 0.8."""
    assert minimal_detectable_rate(6) == pytest.approx(0.9635, abs=1e-4)
    assert win_rate([1.0] * 6).low > 0.5 > win_rate([1.0] * 5 + [0.5]).low


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_prompts": 0}, "n_prompts must be at least 1, got 0"),
        ({"n_prompts": 10, "power": 0.4}, r"power must be in \[0.5, 1\), got 0.4"),
        ({"n_prompts": 10, "power": 1.0}, r"power must be in \[0.5, 1\), got 1.0"),
        ({"n_prompts": 10, "power": math.nan}, "got nan"),
    ],
)
def test_an_impossible_design_is_refused(arguments: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        minimal_detectable_rate(**arguments)


# what all of them refuse, and how they print


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0, math.nan])
@pytest.mark.parametrize(
    "function",
    [
        lambda c: win_rate([0.0, 1.0], confidence=c),
        lambda c: wilson(1, 2, confidence=c),
        lambda c: mean_difference([0.0, 1.0], [1.0, 1.0], confidence=c),
        lambda c: minimal_detectable_rate(10, confidence=c),
    ],
)
def test_confidence_out_of_range_is_refused(function: Callable[[float], object], confidence: float):
    with pytest.raises(UserError, match=rf"confidence must be in \(0, 1\), got {confidence}"):
        function(confidence)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "are empty"),
        (np.zeros((3, 0)), "are empty"),
        ([1.0, math.nan], "must be finite, but 1 of 2 are not"),
        ([math.inf, 1.0], "must be finite, but 1 of 2 are not"),
        (np.zeros((2, 2, 2)), r"must have the shape \(prompts,\) or \(prompts, seeds\), got \(2, 2, 2\)"),
        (1.0, r"got \(\)"),
    ],
)
@pytest.mark.parametrize(
    "function", [win_rate, lambda v: win_shares(v, v), lambda v: mean_difference(v, np.zeros_like(v))]
)
def test_unusable_scores_are_refused(function: Callable[[Any], object], values: Any, message: str):
    with pytest.raises(UserError, match=message):
        function(values)


@pytest.mark.parametrize("function", [win_shares, mean_difference])
def test_unpaired_scores_are_refused(function: Callable[..., object]):
    with pytest.raises(UserError, match=r"scores must be paired, got the shapes \(3,\) and \(2,\)"):
        function([1.0, 2.0, 3.0], [1.0, 2.0])


def test_a_win_rate_prints_its_interval_and_n():
    assert str(WinRate(0.84, 0.78, 0.9, 128)) == "84 % [78, 90] n=128"


def test_a_mean_difference_prints_its_signs():
    assert str(MeanDifference(0.125, -0.01, 0.26, 64)) == "+0.125 [-0.01, +0.26] n=64"


# ---- annotators


def test_a_side_that_is_favoured_shows_once_there_are_enough_votes():
    few, many = position_bias(12, 8), position_bias(120, 80)
    assert few.share == many.share == 0.6
    assert few.p > 0.05 > many.p and few.low < 0.5 < many.low
    assert position_bias(50, 50).p == 1


def test_position_bias_is_the_same_from_either_side():
    left, right = position_bias(70, 30), position_bias(30, 70)
    assert left.p == pytest.approx(right.p)
    assert (left.low, left.high) == (pytest.approx(1 - right.high), pytest.approx(1 - right.low))


def test_a_habit_of_sixty_to_forty_takes_194_votes_to_see():
    assert votes_to_detect(0.6) == votes_to_detect(0.4) == 194
    assert votes_to_detect(0.7) < 60 < 700 < votes_to_detect(0.55)


def test_so_many_votes_do_see_it_as_often_as_promised():
    rng = np.random.default_rng(0)
    n = votes_to_detect(0.6)
    seen = [position_bias(int(k), n - int(k)).p < 0.05 for k in rng.binomial(n, 0.6, size=400)]
    assert 0.72 < np.mean(seen) < 0.87


@pytest.mark.parametrize(
    ("consistency", "rate"), [(0.75, 0.146), (0.8, 0.113), (0.85, 0.082), (0.9, 0.053), (0.95, 0.026)]
)
def test_the_flip_rate_is_that_of_the_table(consistency, rate):
    assert flip_rate(consistency) == pytest.approx(rate, abs=5e-4)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.25, 0.5])
def test_the_flip_rate_is_what_two_independent_slips_leave(rate):
    assert flip_rate((1 - rate) ** 2 + rate**2) == pytest.approx(rate)
    assert flip_rate(0.3) == 0.5  # below chance is chance


def test_alpha_is_that_of_krippendorffs_examples():
    """Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability": examples A (two observers), B and C (four)."""
    nan = math.nan
    two = [[0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]]
    four = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, nan, nan, nan],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, nan, 3],
        [nan, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, nan],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, nan],
    ]
    assert krippendorff_alpha(two) == pytest.approx(0.095, abs=5e-4)
    assert krippendorff_alpha(four) == pytest.approx(0.743, abs=5e-4)


def test_alpha_at_its_ends():
    assert krippendorff_alpha([[0, 1, 0, 1], [0, 1, 0, 1]]) == 1
    assert krippendorff_alpha([[2, 2], [2, 2]]) == 1
    assert krippendorff_alpha([[0, 1, 0, 1], [1, 0, 1, 0]]) < 0
    assert math.isnan(krippendorff_alpha([[0, math.nan], [math.nan, 1]]))
    rng = np.random.default_rng(0)
    assert abs(krippendorff_alpha(rng.integers(2, size=(2, 5000)))) < 0.05


@pytest.mark.parametrize(
    "call",
    [
        lambda: position_bias(0, 0),
        lambda: votes_to_detect(0.5),
        lambda: votes_to_detect(power=1.0),
        lambda: flip_rate(1.1),
        lambda: krippendorff_alpha([1, 2]),
    ],
)
def test_annotator_statistics_refuse_what_they_cannot_use(call):
    with pytest.raises(UserError):
        call()
