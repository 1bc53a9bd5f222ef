"""The networks of a model where they work, and out of the way where they rest."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from workloads import on_card

from dpo_sd.forecast.phases import Forecast
from dpo_sd.models import stable_diffusion
from dpo_sd.models.base import Base
from dpo_sd.models.families import FAMILIES
from dpo_sd.models.stable_diffusion import free_memory


def test_networks_come_to_the_device_outside_of_inference_mode_which_would_spoil_them_for_training(monkeypatch):
    model = Base("tiny").load()
    seen = []
    for network in (model.vae, *model.text_encoders):
        move = network.to
        monkeypatch.setattr(
            network, "to", lambda *a, move=move: (seen.append(torch.is_inference_mode_enabled()), move(*a))
        )
    model.encode_prompts(["a"])
    model.decode_latents(torch.zeros(1, 4, 8, 8))
    assert seen and not any(seen)


@pytest.mark.parametrize("side", [64, 1024])
@pytest.mark.parametrize("free", [0, math.inf])
def test_the_unet_makes_room_for_a_picture_where_memory_is_short_whatever_its_size(monkeypatch, side, free):
    monkeypatch.setattr(stable_diffusion, "free_memory", lambda device: free)
    monkeypatch.setattr(stable_diffusion, "DECODED_PIXELS", 64 * 64)
    model, moved = Base("tiny").load(), []
    monkeypatch.setattr(model.unet, "to", lambda device: moved.append(str(device)))
    monkeypatch.setattr(model.vae, "decode", lambda latents: SimpleNamespace(sample=torch.zeros(1, 3, 8, 8)))
    model.decode_latents(torch.zeros(1, 4, side // 8, side // 8))
    assert moved == ([] if free else ["cpu", "cpu"])


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_decoding_is_taken_to_need_about_what_the_plan_counts(monkeypatch, family):
    """Of the VAE's weights, all that are not on the card; of its activations, the spare share more."""
    forecast = Forecast(on_card(family, FAMILIES[family].resolution, memory_gib=80))
    (counted,) = forecast.of("decoding")
    model = replace(forecast.card.model, device="cuda:0")
    weights = sum(parameter.nbytes for parameter in model.vae.parameters())
    area, least = model.resolution**2, weights + counted.passes

    def beside(free: float) -> bool:
        monkeypatch.setattr(stable_diffusion, "free_memory", lambda device: free)
        return model.decodes_beside(area)

    assert not beside(1.05 * least) and beside(1.5 * least)


def test_memory_that_torch_holds_unused_is_free_and_the_limit_of_the_process_holds(monkeypatch):
    """Of 24 others take 4, torch took 10 and uses 7: 10 + 3 are free; by the limit of 12 only 12 - 7."""
    share = 1.0
    for name, value in {"mem_get_info": (10, 24), "memory_reserved": 10, "memory_allocated": 7}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: share)
    assert free_memory("cuda:0") == 13
    share = 0.5
    assert free_memory("cuda:0") == 5 and free_memory("cpu") == math.inf


def test_half_of_a_character_is_read_as_the_sign_of_replacement():
    model = Base().load()
    cut, replaced = (model.encode_prompts([prompt]).hidden for prompt in ("a fox \ud83e", "a fox �"))
    assert torch.equal(cut, replaced)
    assert model.truncated(["\ud83e" * 100]) == ["\ud83e" * 100]
