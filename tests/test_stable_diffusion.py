"""The networks of a model where they work, and out of the way where they rest."""

from __future__ import annotations

import torch

from dpo_sd.models.base import Base


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


def test_the_unet_makes_room_for_a_large_picture(monkeypatch):
    model = Base("tiny").load()
    moved = []
    monkeypatch.setattr(model.unet, "to", lambda device: moved.append(str(device)))
    model.decode_latents(torch.zeros(1, 4, 8, 8))
    assert moved == []
    model.decode_latents(torch.zeros(1, 4, 72, 64))
    assert moved == ["cpu", "cpu"]


def test_half_of_a_character_is_read_as_the_sign_of_replacement():
    model = Base().load()
    cut, replaced = (model.encode_prompts([prompt]).hidden for prompt in ("a fox \ud83e", "a fox �"))
    assert torch.equal(cut, replaced)
    assert model.truncated(["\ud83e" * 100]) == ["\ud83e" * 100]
