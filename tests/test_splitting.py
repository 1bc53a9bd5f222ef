"""Training and validation: nothing that is trained on is asked again, in whatever spelling."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from dpo_sd.data.samples import ImageFiles, Samples
from dpo_sd.data.splitting import Split, essence, split
from dpo_sd.errors import UserError
from dpo_sd.noise import order
from dpo_sd.shapes.captions import split_prompts


def parts(prompts: Sequence[str], validation: float = 0.25, seed: int = 0) -> Split:
    n = len(prompts)
    files = ImageFiles(Path(), [""] * n, np.zeros(n, "S64"), np.ones((n, 2), np.int32))
    return split(Samples(prompts, files, files, np.ones(n), np.ones(n)), validation, seed)


@pytest.mark.parametrize(
    "other", ["A red fox.", "red fox, a", " a  red\tfox ", "the Red-Fox!", "red_fox", "ｒｅｄ fox"]
)
def test_another_spelling_is_the_same_prompt(other: str):
    assert essence(other) == essence("a red fox")


@pytest.mark.parametrize("other", ["a blue fox", "fox red", "a red fox, smiling", "two red foxes", "???", ""])
def test_another_word_or_place_is_another_prompt(other: str):
    assert essence(other) != essence("a red fox")


def test_tags_may_come_in_any_order_and_what_has_no_words_is_itself():
    assert essence("1girl, red hair, smile") == essence("Smile, 1girl,red_hair")
    assert essence("???") == "???" != essence("!!!") and essence("the") == "the"


def test_captions_of_the_shapes_world_are_all_different():
    prompts = [prompt for part in split_prompts(0) for prompt in part]
    assert len(set(map(essence, prompts))) == len(set(prompts)) > 500


@pytest.mark.parametrize("seed", range(4))
def test_spellings_of_one_prompt_land_in_one_part_and_the_report_names_them(seed: int):
    prompts = [spelling.format(name) for name in "bcdefghi" for spelling in ("red {}", "A red {}.", "{}, red")]
    found = parts(prompts, seed=seed)
    training, validation = ({essence(prompt) for prompt in part.prompts} for part in (found.train, found.validation))
    assert training.isdisjoint(validation)
    said, counted = found.report
    assert said.startswith("8 prompts differ from another only in case") and "'red b' with 'A red b.'" in said
    assert counted.endswith("on 4 others")  # of 16 different ones, as "{}, red" is another prompt than "red {}"


@pytest.mark.parametrize("seed", range(3))
def test_a_split_of_different_prompts_is_that_of_their_sorted_order(seed: int):
    prompts = [f"prompt {i}" for i in range(40)] * 2
    unique = sorted(set(prompts))
    found = parts(prompts, seed=seed)
    assert set(found.validation.prompts) == {unique[i] for i in order(seed, 0, 40)[:10]} and len(found.report) == 1


def test_spellings_of_a_single_prompt_cannot_be_split():
    with pytest.raises(UserError, match="2 pairs on 1 prompts, and validation needs prompts of its own"):
        parts(["a red fox", "A red fox."])
