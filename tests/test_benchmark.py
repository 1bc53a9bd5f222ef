"""The benchmark: its ways to train do the same work, and its table holds what is claimed from it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from dpo_sd.benchmark import Bench, Case
from dpo_sd.hardware import Hardware
from dpo_sd.lora import LoRA, adapter_state
from dpo_sd.losses import DiffusionDPOLoss
from dpo_sd.optimization import AdamW

SMALL = Case("tiny", 64, 2, 2, 1)


@pytest.fixture
def bench() -> Any:
    """`bench()`: a fresh one, always with the same weights."""
    return lambda: Bench(SMALL, Hardware(), LoRA(rank=2), DiffusionDPOLoss(), AdamW(), seed=0)


def test_ours_and_the_bare_loop_train_to_the_same_weights(bench):
    trained = []
    for way in ("ours", "bare"):
        each = bench()
        assert len(getattr(each, way)()) == SMALL.updates
        trained.append(torch.cat([v.flatten() for k, v in adapter_state(each.model).items() if "lora_B" in k]))
    assert trained[0].abs().max() > 1e-5
    # Adam's first steps turn the rounding of a vanishing gradient into a whole step
    assert torch.nn.functional.cosine_similarity(*trained, dim=0) > 0.99


def test_the_public_way_leaves_our_networks_as_they_were_but_for_the_policy(bench):
    from dpo_sd.benchmark import _PublicWay

    each = bench()
    before = {name: value.clone() for name, value in each.model.unet.named_parameters() if "lora_" not in name}
    assert len(_PublicWay(each).updates()) == SMALL.updates
    assert all(torch.equal(value, before[name]) for name, value in each.model.unet.named_parameters() if name in before)


def test_the_table_holds_what_is_claimed_from_it(command, tmp_path):
    def small() -> None:
        from dpo_sd import benchmark

        benchmark.CASES["cpu"] = [SMALL]

    ended = command(f"hydra.run.dir={tmp_path}", f"cache_dir={tmp_path}/cache", patch=small, program="benchmark")
    assert ended.code == 0, ended.err
    results = json.loads((tmp_path / "benchmark.json").read_text())
    for name in ("step_over_bare_loop", "speedup_over_public", "speedup_cached_reference"):
        assert 0 < results[name]["low"] <= results[name]["median"] <= results[name]["high"]
    case = results[str(SMALL)]
    assert 1 < case["allowed_over_public"] < case["allowed_cached_reference"]  # VAE, then the pass of the reference
    memory = case["memory_gib"]
    assert memory["planned"] == pytest.approx(memory["measured"], rel=0.1)
    assert results["data loading, pairs/s"] > 0 and len(results["cost"]) == 4
