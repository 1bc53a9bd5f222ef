"""Bytes that a training keeps in the cache folder."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dpo_sd.forecast.units import size

if TYPE_CHECKING:
    from dpo_sd.data.source import Found
    from dpo_sd.forecast.workload import Workload
    from dpo_sd.models.stable_diffusion import StableDiffusion


def kept(workload: Workload, model: StableDiffusion, found: Found) -> dict[str, int]:
    """Bytes by what they are: drawn images, or latents and prompts, and the errors of the reference.

    Args:
        model: model of the workload, on any device.
        found: data whose number of training samples is known.
    """
    assert found.train is not None
    area, width = workload.resolution**2, 4 if workload.hardware.weights == "float32" else 2
    parts = {}
    if found.drawn:
        parts["drawn pictures"] = found.drawn * 3 * area
    if found.cached:
        images = found.both * workload.images_per_sample * (2 if workload.flip else 1)
        texts = found.prompts if isinstance(found.prompts, int) else len(found.prompts)
        embedding = math.prod(model.hidden_shape) + (model.pooled_width or 0)
        parts["latents"] = images * 4 * area // model.factor**2 * width if workload.cache != "off" else 0
        # one more for the empty prompt
        parts["prompts"] = (texts + 1) * embedding * width if workload.cache == "all" else 0
    if workload.kept_draws is not None:
        errors = found.train * workload.images_per_sample * workload.kept_draws
        parts["the reference's errors"] = 4 * errors  # float32
    return parts


def disk_line(workload: Workload, model: StableDiffusion, found: Found, folder: str) -> str:
    """Line of the plan on the cache folder."""
    named = ", ".join(f"{name} {size(part)}" for name, part in kept(workload, model, found).items() if part)
    fetched = "" if found.fetched else "; the pictures that are fetched not counted"
    return f"disk     {named or 'nothing'} under {folder}{fetched}"
