"""The planned peak of an update, against what the allocator is asked for."""

from __future__ import annotations

import pytest
import torch
from workloads import on_card, workload

from dpo_sd.forecast.measuring import measured, measured_phases
from dpo_sd.forecast.phases import Forecast
from dpo_sd.lora.attaching import LoRA
from dpo_sd.losses import SFTLoss


@pytest.mark.parametrize(
    "settings",
    [
        {"micro_batch": 4},
        {"micro_batch": 4, "gradient_checkpointing": True},
        {"micro_batch": 2, "loss": SFTLoss()},
        {"micro_batch": 4, "precision": "bf16-mixed", "weights": "int8"},
        {"micro_batch": 2, "cache": "latents", "lora": LoRA(rank=4, text_encoder=True)},
    ],
)
def test_the_plan_is_within_a_tenth_of_what_the_allocator_is_asked_for(settings):
    takes = workload(**settings)
    assert 0.9 < Forecast(takes).peak_of_update / measured(takes, torch.device("cpu")) < 1.1


def test_every_phase_of_a_run_is_planned_within_a_twentieth():
    takes = workload(micro_batch=2, cache="off")
    forecast = Forecast(takes)
    planned = {phase.name: phase.peak for phase in forecast.phases} | {"update": forecast.peak_of_update}
    for name, peak in measured_phases(takes, torch.device("cpu")):
        assert peak is not None and planned[name] == pytest.approx(peak.allocated, rel=0.05), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("takes", [on_card("sd15", 512, 4), on_card("sdxl", 1024, 1, "int8")])
def test_on_a_gpu_the_plan_is_within_a_tenth_of_what_the_allocator_held(takes):
    assert 0.9 < Forecast(takes).peak_of_update / measured(takes, torch.device("cuda")) < 1.1
