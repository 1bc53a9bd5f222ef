"""Samples in memory, of images that were just drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dpo_sd.models.stable_diffusion import encode_bytes

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from dpo_sd.data.batches import PreparedSamples
    from dpo_sd.data.cache import Keep
    from dpo_sd.models.stable_diffusion import StableDiffusion


def encode_drawn(
    model: StableDiffusion,
    prompts: Sequence[str],
    chosen: Sequence[Image.Image],
    rejected: Sequence[Image.Image] | None,
    sample_ids: Sequence[int],
    keep: Keep,
) -> PreparedSamples:
    """Samples in memory, of images that were just drawn at the model's own size.

    Args:
        prompts: one per sample.
        chosen, rejected: images, one of each per sample; no rejected ones for single images.
        sample_ids: ids that key the randomness, one per sample.
        keep: as in `Cache`; the images are encoded once in any case.
    """
    import numpy as np

    from dpo_sd.data.batches import Latents, PreparedSamples, Prompts
    from dpo_sd.noise import sample_id

    n, texts = len(prompts), sorted(set(prompts))
    place = {prompt: row for row, prompt in enumerate(texts)}
    hidden, pooled = model.encode_prompts([*texts, ""]) if keep == "all" else (None, None)
    side = model.resolution
    time_ids = np.tile(np.array([side, side, 0, 0, side, side], np.int32), (n, 1))
    images = zip(chosen, strict=True) if rejected is None else zip(chosen, rejected, strict=True)
    contents = [sample_id(text, *(each.tobytes() for each in pair)) for text, pair in zip(prompts, images, strict=True)]
    return PreparedSamples(
        chosen=Latents(encode_images(model, chosen), time_ids),
        rejected=None if rejected is None else Latents(encode_images(model, rejected), time_ids),
        prompts=Prompts(texts, np.array([place[prompt] for prompt in prompts]), hidden, pooled),
        label=np.ones(n, np.float32),
        weight=np.ones(n, np.float32),
        sample_ids=np.array(sample_ids, np.int64),
        content_ids=np.array(contents, np.int64),
    )


def encode_images(model: StableDiffusion, images: Sequence[Image.Image], batch_size: int = 64) -> torch.Tensor:
    """Latents of images of one size: (n, 4, h/8, w/8), fp32 on the CPU, scaled."""
    import numpy as np
    import torch

    latents = []
    with torch.inference_mode(), model.working(model.vae):
        for start in range(0, len(images), batch_size):
            batch = np.stack([np.asarray(image.convert("RGB")) for image in images[start : start + batch_size]])
            latents.append(encode_bytes(model, torch.from_numpy(batch).permute(0, 3, 1, 2)).float().cpu())
    return torch.cat(latents).clone()
