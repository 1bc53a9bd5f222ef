"""Floating-point operations of a training, from those of its phases."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from dpo_sd.data.datamodule import GRID, grid_batch
from dpo_sd.forecast.phases import Forecast
from dpo_sd.models.stable_diffusion import PROMPTS, encoded_together

if TYPE_CHECKING:
    from dpo_sd.data.source import Found


class Operations(NamedTuple):
    """Floating-point operations for one sample: a pair, or a single image where the loss needs no pairs.

    Args:
        policy: forward and backward pass of the policy, with what checkpointing computes again.
        reference: forward pass of the reference; 0 where the loss needs none.
        forward: forward pass of the policy alone.
        encoding: encoding of the images by the VAE.
        text: encoding of the prompt by the text encoders.
    """

    policy: float
    reference: float
    forward: float
    encoding: float
    text: float


class Budget(NamedTuple):
    """Length of a training.

    Args:
        updates: optimiser updates.
        visits: samples behind all updates together; a sample counts as often as it is seen.
        validate_every: updates between two passes over the validation grid.
        devices: devices that share the updates.
    """

    updates: int
    visits: int
    validate_every: int
    devices: int


def per_sample(forecast: Forecast) -> Operations:
    """Operations for one sample, from the phases that hold a batch of them."""
    workload = forecast.workload
    micro_batch = workload.hardware.micro_batch
    update = sum(phase.flops for phase in forecast.of("update")) / micro_batch
    both = forecast.of("validation")[-1].flops / grid_batch(micro_batch)  # policy, and reference where one is needed
    reference = both / 2 if workload.loss.needs_reference else 0.0
    image = forecast.of("images")[0].flops / encoded_together(workload.resolution**2)
    text = forecast.of("prompts")[0].flops / PROMPTS
    return Operations(update - reference, reference, both - reference, image * workload.images_per_sample, text)


def of_drawn_image(forecast: Forecast) -> float:
    """Operations that denoise one drawn image, without its decoding."""
    sampler = forecast.workload.sampler
    return forecast.of("denoising")[0].flops / sampler.batch_size * sampler.steps


def of_training(forecast: Forecast, found: Found, budget: Budget) -> dict[str, float]:
    """Operations of a whole training by what they are for; those of updates for each of the devices.

    Args:
        found: the data, as far as it is known.
    """
    workload, needed = forecast.workload, per_sample(forecast)
    asks = budget.visits  # of the reference
    if workload.kept_draws is not None and found.train is not None:
        asks = min(budget.visits, found.train * workload.kept_draws)
    encodings = found.both * (2 if workload.flip else 1) if workload.cache != "off" else 0
    in_step = needed.encoding if workload.cache == "off" else 0.0
    updates = budget.visits * (needed.policy + in_step) + asks * needed.reference
    grid, passes = found.validation * GRID, 1 + math.ceil(budget.updates / budget.validate_every)
    return {
        "drawing": found.drawn * of_drawn_image(forecast) if found.drawn else 0.0,
        "encoding": encodings * needed.encoding,
        "updates": updates / budget.devices,
        "validation": grid * (passes * (needed.forward + in_step) + needed.reference),
    }
