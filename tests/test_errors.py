"""Settings as they are written on a command line come back from it as they were."""

from __future__ import annotations

import itertools

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from dpo_sd.errors import override


def read_back(value: str) -> str:
    """The value after Hydra has parsed it and OmegaConf has resolved it, in a composition that has a seed."""
    parsed = OverridesParser.create().parse_override(override("data.pairs", value))
    assert parsed.key_or_group == "data.pairs"
    composed = OmegaConf.create({"seed": 7, "data": {"pairs": None}})
    OmegaConf.update(composed, "data.pairs", parsed.value())
    return composed.data.pairs


WITH_A_MEANING = ["a=b", "a,b", "[a]", "{a: b}", "f(x)", "a#b", "a:1", "~/x", "*", "${", "$", "}", "ü", "a\nb", "a\tb"]
NO_TEXTS = ["null", "True", "1", "1e3", ".5", "-inf", "NaN", "2031-05-17", ""]
SPACED = ["a b", "a  b", " a", "a "]


@pytest.mark.parametrize("value", [*WITH_A_MEANING, *NO_TEXTS, *SPACED])
def test_whatever_a_path_holds_it_is_read_as_that_text(value: str):
    assert read_back(value) == value


def test_whatever_stands_beside_backslashes_quotes_and_interpolations():
    signs = ("\\", "'", '"', "$", "${seed}", "x", "\n")
    texts = ["".join(chosen) for length in (1, 2, 3, 4) for chosen in itertools.product(signs, repeat=length)]
    assert [read_back(text) for text in texts] == texts


@pytest.mark.parametrize("value", ["pairs/style", "sd15", "my pairs/of 2031", "/data/pairs-2_b.x"])
def test_plain_values_are_written_without_quotes(value: str):
    assert override("data.pairs", value) == f"data.pairs={value}"
