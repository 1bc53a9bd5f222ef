"""The benchmark: its ways to train do the same work, and its table holds what is claimed from it."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import pytest
import torch
from conftest import run_forked
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from dpo_sd import benchmark
from dpo_sd.composition.application import entry_point
from dpo_sd.composition.schema import CONF_DIR
from dpo_sd.forecast import card
from dpo_sd.forecast.side_by_side import Case, PublicWay, of_case, table
from dpo_sd.forecast.side_by_side import bench as bench_of
from dpo_sd.lora.adapters import adapter_state

SMALL = Case("tiny", 64, 2, 2, 1)


@pytest.fixture
def bench() -> Any:
    """`bench()`: a fresh one, always with the same weights."""
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("benchmark", ["lora.rank=2"])
    return lambda: bench_of(cfg, SMALL)


def test_ours_and_the_bare_loop_train_to_the_same_weights(bench):
    trained = []
    for way in ("ours", "bare"):
        each = bench()
        assert len(each.ways[way]()) == SMALL.updates
        trained.append(torch.cat([v.flatten() for k, v in adapter_state(each.model).items() if "lora_B" in k]))
    assert trained[0].abs().max() > 1e-5
    # Adam's first steps turn the rounding of a vanishing gradient into a whole step
    assert torch.nn.functional.cosine_similarity(*trained, dim=0) > 0.99


def test_the_public_way_leaves_our_networks_as_they_were_but_for_the_policy(bench):
    each = bench()
    before = {name: value.clone() for name, value in each.model.unet.named_parameters() if "lora_" not in name}
    assert len(PublicWay(each).updates()) == SMALL.updates
    assert all(torch.equal(value, before[name]) for name, value in each.model.unet.named_parameters() if name in before)


def test_a_way_that_runs_out_of_memory_is_none_and_the_others_are_told(bench):
    def full() -> list[float]:
        raise torch.OutOfMemoryError("no room")

    each = bench()
    rows = each.compare({**each.ways, "public": full}) | {"memory_gib": {"planned": 1.0, "measured": 1.0}}
    assert rows["speedup_over_public"] is None and rows["public_s"] is None
    assert rows["step_over_bare_loop"]["median"] > 0
    assert "  speedup_over_public       runs out of memory" in table("small", rows)


def test_a_case_takes_what_the_preset_says_of_its_model():
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("benchmark", ["hardware=1x8gb", "model=tiny"])
    hardware = instantiate(of_case(cfg, Case("sdxl", 1024, 1, 1, 1)).hardware)
    assert (hardware.weights, hardware.gradient_checkpointing, hardware.micro_batch) == ("int8", True, 1)


def test_fine_tuning_has_no_reference_to_compare(command, tmp_path):
    ended = command("loss=sft", f"hydra.run.dir={tmp_path}", program="benchmark")
    assert ended.code == 1 and "the benchmark compares ways of Diffusion-DPO: use loss=dpo" in ended.err


def test_the_table_holds_what_is_claimed_from_it(tmp_path):
    def small() -> None:
        sys.argv = ["benchmark", f"hydra.run.dir={tmp_path}/run", f"cache_dir={tmp_path}/cache"]
        entry_point("benchmark")(lambda cfg: benchmark.run(cfg, [SMALL]))()

    ended = run_forked(small, tmp_path)
    assert ended.code == 0, ended.err
    results = json.loads((tmp_path / "run" / "benchmark.json").read_text())
    for name in ("step_over_bare_loop", "speedup_over_public", "speedup_cached_reference"):
        assert 0 < results[name]["low"] <= results[name]["median"] <= results[name]["high"]
    case = results[str(SMALL)]
    assert 1 < case["allowed_over_public"] < case["allowed_cached_reference"]  # VAE, then the pass of the reference
    memory = case["memory_gib"]
    assert memory["planned"] == pytest.approx(memory["measured"], rel=0.1)
    assert results["data loading, pairs/s"] > 0 and len(results["cost"]) == 4


def test_a_whole_card_is_measured_only_where_one_is(command, tmp_path):
    ended = command("card=true", "hardware=cpu", f"hydra.run.dir={tmp_path}", program="benchmark")
    assert (
        ended.code == 1
        and ended.err == "error: card=true measures a CUDA GPU, and this machine has none: leave card out\n"
    )


def test_a_whole_card_leaves_a_table_and_a_page_of_every_preset_and_change(tmp_path, monkeypatch):
    monkeypatch.setattr(card, "CHANGES", {name: card.CHANGES[name] for name in ("checkpointing", "int8")})
    monkeypatch.setattr(card, "_apart", in_this_process)

    def whole() -> None:
        sys.argv = ["benchmark", f"hydra.run.dir={tmp_path}/run", "lora.rank=2", "card=true"]
        entry_point("benchmark")(lambda cfg: benchmark.run_card(["cpu"], ["tiny"], (1, 1)))()

    ended = run_forked(whole, tmp_path)
    assert ended.code == 0, ended.err
    results = json.loads((tmp_path / "run" / "benchmark.json").read_text())
    phases = results["peaks"]["tiny, cpu"]["phases"]
    assert list(phases)[:3] == ["encoding pictures", "encoding prompts", "update"] and len(phases) == 7
    for row in phases.values():
        assert row["planned"] == pytest.approx(row["allocated"], rel=0.05)
    assert 0.1 < results["speeds"]["tiny, checkpointing"]["speedup"]["median"] < 1.1  # computes activations twice
    assert results["speeds"]["tiny, int8"].startswith("UserError: weights int8 need a mixed precision")
    page = (tmp_path / "run" / "README.md").read_text()
    assert "`python -m dpo_sd.benchmark card=true lora.rank=2`" in page and "| tiny, cpu | update |" in page


def in_this_process(work: Any, *arguments: Any) -> Any:
    return card._told(
        work, *(OmegaConf.to_container(each) if OmegaConf.is_config(each) else each for each in arguments)
    )


def test_a_measurement_whose_process_is_killed_says_so_and_one_that_fails_says_why():
    assert card._apart(os.abort) == "its process was killed"
    assert card._told(int, "none") == "ValueError: invalid literal for int() with base 10: 'none'"


def test_the_plans_constants_are_fitted_from_the_worst_that_was_seen():
    def seen(context: float, reserved: float) -> dict[str, Any]:
        row = {"planned": 4.0, "passes": 2.0, "allocated": 4.0, "reserved": reserved}
        small = {"planned": 1.0, "passes": 0.01, "allocated": 1.0, "reserved": 2.0}  # whose gaps say nothing
        return {
            "phases": {"update": row, "prompts": small, "full": {**row, "allocated": None}},
            "context": context,
            "owned": 0.98,
        }

    fitted = card.fitted([seen(0.4, 4.1), "UserError: no such card", seen(0.5, 4.3)])
    assert fitted == {"CONTEXT": 0.5, "SPARE": pytest.approx(0.15), "OWNED": 0.98}


def test_a_card_holds_the_presets_of_the_cards_that_are_no_larger():
    assert card.held_presets(int(23.6 * 2**30)) == ["1x8gb", "1x12gb", "1x16gb", "1x24gb"]
    assert card.held_presets(6 * 2**30) == []
