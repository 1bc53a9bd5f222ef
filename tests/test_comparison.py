"""The comparison of two sides by a judge, without a model or a training."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from PIL import Image

from dpo_sd.evaluation.comparison import compare, power
from dpo_sd.evaluation.drawing import questions
from dpo_sd.judges.judge import Judge

PROMPTS = ["a", "b", "c", "d"]


class Brightness(Judge):
    """Likes bright images; darkness must not fall."""

    name = "brightness"

    def scores(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        return [float(image.getpixel((0, 0))) for image in images]  # type: ignore[arg-type]

    def properties(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, list[float]]:
        return {"dark": [1 - score / 255 for score in self.scores(images, prompts)]}


def painted(*greys: int) -> list[Image.Image]:
    return [Image.new("L", (8, 8), grey) for grey in greys]


def test_a_tie_counts_half_and_means_and_differences_are_those_of_the_scores():
    """Brighter twice, equal once, darker once: 2.5 of 4."""
    found = compare(Brightness(), PROMPTS, painted(0, 51, 51, 102), painted(51, 102, 51, 51))
    assert found.win.rate == pytest.approx(2.5 / 4) and found.win.n == 4
    assert (found.score_before, found.score_after) == (51, 63.75)
    dark = found.properties["dark"]
    assert (dark.before, dark.after) == (pytest.approx(0.8), pytest.approx(0.75))
    assert dark.difference.mean == pytest.approx(-0.05) and dark.difference.n == 4


def test_two_sides_that_are_the_same_win_half_each():
    images = painted(3, 1, 4, 1)
    assert compare(Brightness(), PROMPTS, images, images).win.rate == 0.5


def test_swapping_the_sides_mirrors_the_win_rate_and_negates_the_differences():
    before, after = painted(0, 51, 51, 102), painted(51, 102, 51, 51)
    there, back = compare(Brightness(), PROMPTS, before, after), compare(Brightness(), PROMPTS, after, before)
    assert there.win.rate == pytest.approx(1 - back.win.rate)
    differences = [found.properties["dark"].difference.mean for found in (there, back)]
    assert differences[0] == pytest.approx(-differences[1])


def test_the_prompt_is_the_unit_and_the_control_compares_the_side_before_with_itself():
    prompts, _ = questions(PROMPTS, 2, seed=0)
    found = compare(Brightness(), prompts, painted(9, 1, 9, 1, 9, 1, 1, 9), painted(*[10] * 8))
    assert found.win == (1.0, found.win.low, 1.0, 4)
    assert found.seeds_per_prompt == 2
    assert found.control is not None and found.control.rate == pytest.approx(0.25)  # the second seed is brighter once
    assert compare(Brightness(), PROMPTS, painted(*[0] * 4), painted(*[1] * 4)).control is None


def test_the_record_has_the_keys_of_a_verdict_in_their_order():
    prompts, _ = questions(PROMPTS, 2, seed=0)
    record = compare(Brightness(), prompts, painted(*range(8)), painted(*range(8)), "anna").record()
    assert list(record) == [
        *("win_rate", "low", "high", "n_prompts", "seeds_per_prompt", "judge", "labelled_by"),
        *("score_before", "score_after", "properties", "a_a"),
    ]
    assert list(record["properties"]["dark"]) == ["before", "after", "mean", "low", "high", "n"]
    assert list(record["a_a"]) == ["rate", "low", "high", "n"]
    assert record["labelled_by"] == "anna"


def test_only_a_judge_that_labelled_too_is_said_to_have():
    same, other = (
        "\n".join(compare(Brightness(), PROMPTS, painted(*range(4)), painted(*range(4)), name).lines())
        for name in ("brightness", None)
    )
    assert "labels        by the same judge" in same and "labels" not in other


def test_every_image_of_a_question_has_a_seed_of_its_own_whatever_other_prompts_are_asked():
    prompts, seeds = questions(PROMPTS, 3, seed=5)
    assert prompts == [prompt for prompt in PROMPTS for _ in range(3)]
    assert len(set(seeds)) == 12
    assert questions(["c"], 3, seed=5).seeds == seeds[6:9]


def test_more_prompts_tell_a_smaller_win_rate_from_chance():
    assert power(128, 128) == "on 128 held-out prompts, a win rate of 62% is told from chance with 80 % power"
    assert power(3, 128) == "3 held-out prompts (there are no 128) cannot tell any win rate from chance"
