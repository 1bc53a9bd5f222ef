"""Answers of the simulated annotator: Bradley-Terry, with the faults that it is told to have."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dpo_sd.annotation.simulated import SimulatedAnnotator
from dpo_sd.errors import UserError

PAIRS = [f"pair {i}" for i in range(2000)]
FIVE_SIGMA = 5 * 0.5 / math.sqrt(len(PAIRS))  # bound on five standard errors of any share of PAIRS


def share_of_image_0(annotator: SimulatedAnnotator, score_0: float, score_1: float) -> float:
    return float(np.mean([annotator.choose(pair, score_0, score_1) == "image_0" for pair in PAIRS]))


def share_of_left(annotator: SimulatedAnnotator, score_0: float, score_1: float) -> float:
    return float(np.mean([annotator.choose(pair, score_0, score_1) == annotator.left_image(pair) for pair in PAIRS]))


def test_at_temperature_zero_the_higher_score_always_wins():
    annotator = SimulatedAnnotator()
    assert share_of_image_0(annotator, 0.5 + 1e-9, 0.5) == 1
    assert share_of_image_0(annotator, 0.5, 0.5 + 1e-9) == 0


@pytest.mark.parametrize("temperature", [0.1, 1.0])
@pytest.mark.parametrize("log_odds", [-2.0, -0.5, 0.5, 2.0])
def test_answers_follow_bradley_terry(temperature: float, log_odds: float):
    share = share_of_image_0(SimulatedAnnotator(temperature), log_odds * temperature, 0.0)
    assert share == pytest.approx(1 / (1 + math.exp(-log_odds)), abs=FIVE_SIGMA)


def test_at_a_high_temperature_the_scores_hardly_matter():
    assert share_of_image_0(SimulatedAnnotator(temperature=1e6), 1.0, 0.0) == pytest.approx(0.5, abs=FIVE_SIGMA)


def test_a_more_distant_score_never_loses_a_pair_that_was_won():
    annotator = SimulatedAnnotator(temperature=1.0)
    for pair in PAIRS[:200]:
        answers = [annotator.choose(pair, score, 0.0) for score in (0.1, 0.5, 1.0, 3.0)]
        assert answers == sorted(answers, reverse=True)  # image_1 … image_1, image_0 … image_0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_scores_within_the_band_are_a_tie_and_beyond_it_are_not(temperature: float):
    annotator = SimulatedAnnotator(temperature, tie_band=0.25)
    assert {annotator.choose(pair, 1.0, 1.25) for pair in PAIRS} == {"tie"}
    assert {annotator.choose(pair, 1.25, 1.0) for pair in PAIRS} == {"tie"}
    assert "tie" not in {annotator.choose(pair, 1.0, 1.26) for pair in PAIRS}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_equal_scores_are_a_tie(temperature: float):
    assert SimulatedAnnotator(temperature).choose("pair", 0.5, 0.5) == "tie"


def test_sides_are_drawn_evenly_and_by_pair():
    annotator = SimulatedAnnotator()
    sides = [annotator.left_image(pair) for pair in PAIRS]
    assert sides == [annotator.left_image(pair) for pair in PAIRS]
    assert np.mean([side == "image_0" for side in sides]) == pytest.approx(0.5, abs=FIVE_SIGMA)


@pytest.mark.parametrize("side_bias", [-1.0, 0.0, 1.0])
def test_side_bias_shows_in_how_often_the_left_image_wins(side_bias: float):
    annotator = SimulatedAnnotator(temperature=1.0, side_bias=side_bias)
    share = share_of_left(annotator, 1e-9, 0.0)
    assert share == pytest.approx(1 / (1 + math.exp(-side_bias)), abs=FIVE_SIGMA)


def test_side_bias_favours_neither_image():
    annotator = SimulatedAnnotator(temperature=1.0, side_bias=3.0)
    assert share_of_image_0(annotator, 1e-9, 0.0) == pytest.approx(0.5, abs=FIVE_SIGMA)


@pytest.mark.parametrize("flip_rate", [0.0, 0.1, 1.0])
def test_the_flip_rate_is_the_share_of_reversed_answers(flip_rate: float):
    share = share_of_image_0(SimulatedAnnotator(flip_rate=flip_rate), 0.0, 1.0)
    assert share == pytest.approx(flip_rate, abs=FIVE_SIGMA if 0 < flip_rate < 1 else 0)


def test_a_tie_is_not_flipped():
    assert SimulatedAnnotator(flip_rate=1.0).choose("pair", 1.0, 1.0) == "tie"


def test_answers_do_not_depend_on_the_order_of_asking():
    def answers(pairs: list[str]) -> dict[str, str]:
        annotator = SimulatedAnnotator(temperature=1.0, side_bias=0.5, flip_rate=0.2)
        return {pair: annotator.choose(pair, 0.3, 0.0) for pair in pairs}

    assert answers(PAIRS) == answers(PAIRS[::-1])
    assert answers(PAIRS[::2]) == {pair: answer for pair, answer in answers(PAIRS).items() if pair in set(PAIRS[::2])}


def test_another_seed_is_another_annotator():
    one, two = (SimulatedAnnotator(temperature=1e6, seed=seed) for seed in (0, 1))
    agreement = np.mean([one.choose(pair, 1.0, 0.0) == two.choose(pair, 1.0, 0.0) for pair in PAIRS])
    assert agreement == pytest.approx(0.5, abs=FIVE_SIGMA)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("tie_band", -0.1),
        ("tie_band", math.nan),
        ("tie_band", math.inf),
        ("side_bias", math.nan),
        ("side_bias", math.inf),
        ("flip_rate", -0.1),
        ("flip_rate", 1.1),
        ("flip_rate", math.nan),
        ("seed", -1),
        ("seed", 2**64),
    ],
)
def test_settings_out_of_range_are_refused(name: str, value: float):
    with pytest.raises(UserError, match=rf"{name} must be .*, got {value}"):
        SimulatedAnnotator(**{name: value})  # pyright: ignore[reportArgumentType]


def test_a_side_bias_without_effect_is_refused():
    with pytest.raises(UserError, match=r"side_bias=1\.0 has no effect at temperature 0"):
        SimulatedAnnotator(side_bias=1.0)


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_refused(score: float):
    with pytest.raises(UserError, match=f"scores must be finite, got 0.0 and {score} for pair a-0"):
        SimulatedAnnotator().choose("a-0", 0.0, score)
