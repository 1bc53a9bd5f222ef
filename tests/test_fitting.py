"""The nearest settings that fit a card."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from workloads import on_card, workload

from dpo_sd.forecast.fitting import nearest, overrides, using
from dpo_sd.forecast.phases import Forecast
from dpo_sd.lora.attaching import LoRA


def advised(start: Forecast, *search) -> list[str]:
    return [overrides(start.workload, other.workload) for other in nearest(start, *search)]


@pytest.mark.slow
def test_sdxl_in_16_bit_does_not_fit_8_gib_and_8_bit_is_what_does():
    start = Forecast(on_card("sdxl", 1024))
    assert not start.fits()
    assert overrides(start.workload, next(nearest(start)).workload) == "hardware.weights=int8"


def test_the_nearest_settings_that_fit_change_the_micro_batch_before_anything_else():
    start = Forecast(on_card("sd15", 512, 16))
    assert not start.fits()
    found = next(nearest(start))
    assert found.fits() and overrides(start.workload, found.workload) == "hardware.micro_batch=8"


def test_the_nearest_settings_take_checkpointing_where_a_single_pair_is_too_much():
    start = Forecast(on_card("sd21", 768, 1, checkpointing=False, memory_gib=6.5))
    assert overrides(start.workload, next(nearest(start)).workload) == "hardware.gradient_checkpointing=true"


@pytest.mark.parametrize(
    ("trained", "fits", "found"),
    [
        (False, lambda takes: takes.cache == "all" or takes.hardware.weights == "int8", ["cache=all"]),
        (True, lambda takes: takes.cache == "all", ["cache=all lora.text_encoder=false"]),
        (
            True,
            lambda takes: takes.cache == "all" or takes.hardware.weights == "int8",
            ["hardware.weights=int8", "cache=all lora.text_encoder=false"],
        ),
    ],
)
def test_text_encoders_are_left_alone_only_after_all_that_learns_the_same(trained, fits, found):
    start = Forecast(on_card("sd15", 512, cache="latents", lora=LoRA(rank=4, text_encoder=trained)))
    assert advised(start, lambda forecast: fits(forecast.workload)) == found


def test_settings_that_are_changed_back_are_no_overrides():
    start = Forecast(workload(micro_batch=4))
    other = using(using(start, micro_batch=2, resolution=128), micro_batch=4)
    assert overrides(start.workload, other.workload) == "framing.resolution=128"


def test_a_forecast_with_other_settings_counts_what_one_from_nothing_does():
    """To the byte, in a process of its own: when a tensor of 4 KiB is let go depends on what a process did before."""
    code = """
from workloads import workload
from dpo_sd.forecast.fitting import using
from dpo_sd.forecast.phases import Forecast

start = Forecast(workload(micro_batch=4))
assert start.phases  # counted, and taken over where nothing changes them
for settings in ({"micro_batch": 2}, {"gradient_checkpointing": True}, {"resolution": 128}, {"cache": "latents"}):
    other = using(start, **settings)
    assert other.phases == Forecast(other.workload).phases, settings
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
