"""Optimisers and their schedules."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from dpo_sd.errors import UserError
from dpo_sd.training.optimizers import AdamW, AdamW8bit, Prodigy, Schedule


def parameters(*networks: str) -> dict[str, list[torch.nn.Parameter]]:
    return {name: [torch.nn.Parameter(torch.zeros(1))] for name in networks}


def learning_rates(schedule: Schedule, warmup_steps: int, max_steps: int) -> list[float]:
    """The learning rate of every update."""
    settings = AdamW(lr=1.0, schedule=schedule, warmup_steps=warmup_steps)
    optimizer, scheduler = settings.build(parameters("unet"), max_steps)
    rates = []
    for _ in range(max_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_adamw_hands_its_values_to_torch():
    optimizer, _ = AdamW(lr=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3).build(parameters("unet"), max_steps=1)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.1, (0.8, 0.9), 1e-6, 0.3)


def test_text_encoders_have_a_learning_rate_of_their_own_under_the_same_schedule():
    settings = AdamW(lr=1.0, text_encoder_lr=0.1, schedule="linear")
    optimizer, scheduler = settings.build(parameters("unet", "text_encoder", "text_encoder_2"), max_steps=2)
    assert [group["lr"] for group in optimizer.param_groups] == [1, 0.1, 0.1]
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.05, 0.05]


def test_text_encoders_learn_at_the_rate_of_the_unet_unless_told_otherwise():
    optimizer, _ = AdamW(lr=0.3).build(parameters("unet", "text_encoder"), max_steps=1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.3]


def test_a_learning_rate_for_text_encoders_that_are_not_trained_is_refused():
    with pytest.raises(UserError, match=r"no text encoder is trained: use lora\.text_encoder=true"):
        AdamW(text_encoder_lr=0.1).build(parameters("unet"), max_steps=1)


def test_a_constant_schedule_stays():
    assert learning_rates("constant", 0, 4) == [1, 1, 1, 1]


def test_a_constant_schedule_still_warms_up():
    assert learning_rates("constant", 2, 4) == [0, 0.5, 1, 1]


def test_a_linear_schedule_falls_by_equal_parts_to_0():
    assert learning_rates("linear", 0, 4) == pytest.approx([1, 0.75, 0.5, 0.25])


def test_a_cosine_schedule_is_half_way_down_in_the_middle():
    # (1 + cos(pi * t / 4)) / 2 at t = 0 and 2
    rates = learning_rates("cosine", 0, 4)
    assert (rates[0], rates[2]) == pytest.approx((1, 0.5))


def test_a_cosine_with_restarts_begins_anew_so_many_times():
    rates = learning_rates("cosine_with_restarts", 0, 9)
    assert [rates[k] for k in (0, 3, 6)] == pytest.approx([1, 1, 1]) and rates[2] == pytest.approx(0.25)


def test_a_polynomial_falls_as_its_power_says():
    assert learning_rates("polynomial", 0, 4)[2] == pytest.approx(0.25, abs=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cycles": 0}, "cycles must be at least 1, got 0"),
        ({"power": 0.0}, "power must be positive and finite, got 0.0"),
        ({"lr": 0.0}, "lr must be positive and at most 1000, got 0.0"),
        ({"lr": float("nan")}, "lr must be positive and at most 1000, got nan"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got \[0.9, 1.0\]"),
        ({"betas": [0.9]}, r"betas must be two numbers in \[0, 1\), got \[0.9\]"),
        ({"eps": 0.0}, "eps must be positive and finite, got 0.0"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0 and finite, got -1.0"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
        ({"text_encoder_lr": 0.0}, "text_encoder_lr must be positive and finite, or null for lr, got 0.0"),
    ],
)
def test_values_out_of_range_are_refused_by_name(values, message):
    with pytest.raises(UserError, match=message):
        AdamW(**values)


def test_a_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(UserError, match=r"warmup_steps must be below trainer\.max_steps=10, got 10"):
        AdamW(warmup_steps=10).build(parameters("unet"), max_steps=10)


@pytest.mark.parametrize("lr", [1e-3, 5e-5])
def test_prodigy_refuses_a_rate_of_adamws_scale_with_which_it_would_learn_nothing(lr):
    with pytest.raises(UserError, match=f"1 as a rule, got {lr}: leave optimizer.lr out"):
        Prodigy(lr=lr)
    assert Prodigy().lr == 1 and Prodigy(lr=0.1).lr == 0.1


@pytest.mark.parametrize(("kind", "package"), [(AdamW8bit, "bitsandbytes"), (Prodigy, "prodigyopt")])
def test_a_missing_package_is_named_with_the_command_that_installs_it_and_needed_for_no_plan(
    kind, package, monkeypatch
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    optimizer = kind()
    assert optimizer.state_bytes(10_000) > 0
    with pytest.raises(UserError, match=rf"needs {package}.*pip install -e '.\[gpu\]'"):
        optimizer.check(1)
    with pytest.raises(UserError, match=r"warmup_steps must be below trainer\.max_steps=10, got 10"):
        kind(warmup_steps=10).check(10)
