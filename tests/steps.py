"""A batch of pairs for the training step, and means to see what the step does with it."""

from __future__ import annotations

from typing import Any

import torch

from dpo_sd.data.batches import Batch
from dpo_sd.lora.adapters import policy_parameters
from dpo_sd.models.stable_diffusion import StableDiffusion, TextEmbeds
from dpo_sd.training.step import DiffusionModule

PAIRS = 3
TIMESTEPS = [10, 400, 900]  # from hardly any noise to hardly anything else


def move(model: StableDiffusion, size: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in policy_parameters(model)["unet"]:
            parameter += size * torch.randn(parameter.shape, generator=generator)


def make_batch(dtype: torch.dtype = torch.float32) -> Batch:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(PAIRS, *shape, generator=generator).to(dtype)

    return Batch(
        chosen=normal(4, 8, 8),
        rejected=normal(4, 8, 8),
        chosen_time_ids=torch.zeros(PAIRS, 6),
        rejected_time_ids=torch.zeros(PAIRS, 6),
        prompts=["a star"] * PAIRS,
        embeds=TextEmbeds(normal(32, 128), None),
        noise=normal(4, 8, 8),
        timesteps=torch.tensor(TIMESTEPS),
        label=torch.ones(PAIRS),
        weight=torch.ones(PAIRS),
        index=list(range(PAIRS)),
        draw=[0] * PAIRS,
    )


def hidden(batch: Batch) -> torch.Tensor:
    assert batch.embeds is not None
    return batch.embeds.hidden


def listen(unet: Any) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Every (noisy_latents, timesteps, encoder_hidden_states) that the UNet is called with from now on."""
    calls: list[Any] = []
    unet.register_forward_pre_hook(lambda _, given: calls.append(tuple(value.clone() for value in given)))
    return calls


def error(module: DiffusionModule, latents: Any, batch: Batch, i: int) -> torch.Tensor:
    """The error of one picture, from the formulas of DDPM and a UNet call of its own."""
    t = TIMESTEPS[i]
    alpha = module.model.noise_scheduler.alphas_cumprod[t]
    noisy = alpha.sqrt() * latents[i] + (1 - alpha).sqrt() * batch.noise[i]
    with torch.no_grad():
        predicted = module.unet(noisy[None], torch.tensor([t]), hidden(batch)[i : i + 1]).sample[0]
    return (predicted - batch.noise[i]).square().mean()
