"""Optimisers and their schedules."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from dpo_sd.errors import UserError
from dpo_sd.training.optimizers import Adafactor, AdamW, AdamW8bit, Lion, Prodigy, Schedule, ScheduleFree


def parameters(*networks: str) -> dict[str, dict[str, torch.nn.Parameter]]:
    return {name: {"mid_block.to_q.lora_A.weight": torch.nn.Parameter(torch.zeros(1))} for name in networks}


def learning_rates(schedule: Schedule, warmup_steps: int, max_steps: int) -> list[float]:
    """The learning rate of every update."""
    return learning_rates_of(AdamW(lr=1.0, schedule=schedule, warmup_steps=warmup_steps), max_steps)


def learning_rates_of(settings: AdamW, max_steps: int) -> list[float]:
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


def test_a_piecewise_constant_schedule_has_the_factors_of_its_rules():
    settings = AdamW(lr=2.0, schedule="piecewise_constant", step_rules="1:2,0.5:3,0.1")
    assert learning_rates_of(settings, 5) == pytest.approx([2, 2, 1, 0.2, 0.2])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"step_rules": "1:2,0"}, "step_rules are those of schedule=piecewise_constant: give both, or none of them"),
        ({"schedule": "piecewise_constant"}, "step_rules are those of schedule=piecewise_constant"),
        (
            {"schedule": "piecewise_constant", "step_rules": "1:2,0.5:3"},
            r"step_rules must be like '1:200,0\.1:400,0\.01', got '1:2,0\.5:3'",
        ),
        (
            {"schedule": "piecewise_constant", "step_rules": "1:2,0", "warmup_steps": 2},
            "step_rules say the rate of every update: leave out warmup_steps",
        ),
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


@pytest.mark.parametrize(
    ("kind", "package"),
    [
        *((AdamW8bit, "bitsandbytes"), (Prodigy, "prodigyopt")),
        *((Lion, "lion_pytorch"), (ScheduleFree, "schedulefree")),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it_and_needed_for_no_plan(
    kind, package, monkeypatch
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    optimizer = kind()
    assert optimizer.state_bytes((8, 1280)) > 0
    with pytest.raises(UserError, match=rf"needs {package}.*pip install -e '.\[gpu\]'"):
        optimizer.check(1)
    with pytest.raises(UserError, match=r"warmup_steps must be below trainer\.max_steps=10, got 10"):
        kind(warmup_steps=10).check(10)


# rates of parts


def rates(settings: AdamW) -> dict[str, float]:
    """The learning rate of every parameter of a small UNet and text encoder, by name."""
    modules = {"unet": ["down_blocks.0.attn1.to_q", "mid_block.attn1.to_q"], "text_encoder": ["layers.0.q_proj"]}
    named = {
        network: {
            f"{module}.lora_{half}.weight": torch.nn.Parameter(torch.zeros(1)) for module in names for half in "AB"
        }
        for network, names in modules.items()
    }
    optimizer, _ = settings.build(named, 1)
    of = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    return {f"{network}.{name}": of[id(p)] for network, own in named.items() for name, p in own.items()}


def test_parts_of_the_networks_have_factors_on_the_rate_of_which_the_last_counts():
    found = rates(AdamW(lr=1.0, text_encoder_lr=0.5, lr_factors={"attn1": 0.1, "mid_block": 0.2, "layers.0": 2.0}))
    assert {name: rate for name, rate in found.items() if "_A" in name} == pytest.approx(
        {
            "unet.down_blocks.0.attn1.to_q.lora_A.weight": 0.1,
            "unet.mid_block.attn1.to_q.lora_A.weight": 0.2,
            "text_encoder.layers.0.q_proj.lora_A.weight": 1.0,
        }
    )


def test_lora_plus_lets_b_learn_so_many_times_as_fast_as_a():
    found = rates(AdamW(lr=1.0, loraplus_ratio=16.0, lr_factors={"mid_block": 0.5}))
    assert {name[-8]: rate for name, rate in found.items() if "down_blocks" in name} == {"A": 1.0, "B": 16.0}
    assert {name[-8]: rate for name, rate in found.items() if "mid_block" in name} == {"A": 0.5, "B": 8.0}


def test_a_factor_on_a_part_that_is_not_there_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"'midblock' is part of no adapted module's name; nearest: mid_block"):
        AdamW(lr_factors={"midblock": 0.5}).build(parameters("unet"), 1)
    with pytest.raises(UserError, match=r"lr_factors\.mid_block must be at least 0 and finite, got -1"):
        AdamW(lr_factors={"mid_block": -1.0})
    with pytest.raises(UserError, match="loraplus_ratio must be positive and finite, got 0"):
        AdamW(loraplus_ratio=0.0)


# the others


def stepped(settings: AdamW) -> tuple[torch.Tensor, int]:
    """A matrix after one update with a gradient of ones, and the bytes of state."""
    parameter = torch.nn.Parameter(torch.zeros(8, 32))
    optimizer, _ = settings.build({"unet": {"mid_block.to_q.lora_B.weight": parameter}}, 1)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = (value for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor))
    return parameter.detach(), sum(value.nbytes for value in state)


def test_adafactor_makes_steps_of_the_size_that_its_rate_says_with_little_state():
    moved, kept = stepped(Adafactor(lr=1e-2))
    torch.testing.assert_close(moved, torch.full((8, 32), -1e-2), rtol=1e-3, atol=0)
    assert kept == Adafactor().state_bytes((8, 32))


def test_lion_makes_steps_of_one_size():
    moved, kept = stepped(Lion(lr=1e-2))
    torch.testing.assert_close(moved, torch.full((8, 32), -1e-2))
    assert kept == Lion().state_bytes((8, 32))


def test_a_schedule_beside_a_schedule_free_optimiser_is_refused():
    with pytest.raises(UserError, match=r"schedule must be constant, .* got cosine: .*\$\{adamw_schedule:cosine\}"):
        ScheduleFree(schedule="cosine")
    with pytest.raises(UserError, match="the first of betas must be above 0"):
        ScheduleFree(betas=(0.0, 0.999))


def test_the_magnitudes_of_a_dora_do_not_decay():
    ends = ("lora_A.weight", "lora_magnitude_vector")
    named = {f"mid_block.to_q.{end}": torch.nn.Parameter(torch.ones(2)) for end in ends}
    optimizer, _ = AdamW(lr=0.1, weight_decay=0.5).build({"unet": named}, 1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
