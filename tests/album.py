"""A model that encodes pictures as their brightness and prompts as their length, for tests of what data becomes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from dpo_sd.data.batches import PreparedSamples
from dpo_sd.models.families import AS_USUAL, FAMILIES
from dpo_sd.models.stable_diffusion import Fingerprints, TextEmbeds


class Album:
    """Stands for a StableDiffusion; `encoded` keeps the pixels that it was asked to encode, (n, 3, h, w) in [-1, 1]."""

    name, family, resolution, factor, max_tokens, device = "tiny", FAMILIES["tiny"], 64, 8, 77, "cpu"
    reading = AS_USUAL

    def __init__(self, fingerprint: str = "base", arithmetic: str = "float32", networks: Any = None):
        self.fingerprint, self.fingerprints = fingerprint, Fingerprints(fingerprint, "vae", "text")
        self.networks: dict[str, Any] = networks or {"unet": torch.nn.Identity()}
        self.unet: Any = self.networks["unet"]
        if not hasattr(self.unet, "config"):
            self.unet.config = {"block_out_channels": (8, 8)}
        if networks is None:
            self.unet.dtype = arithmetic
        self.vae, self.text_encoders = SimpleNamespace(device="cpu", dtype=torch.float32), []
        self.encoded: list[torch.Tensor] = []
        self.noise_scheduler = DDPMScheduler()

    def working(self, *networks: Any) -> Any:
        return nullcontext()

    def encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        self.encoded.append(pixels)
        side = [size // self.factor for size in pixels.shape[-2:]]
        return pixels.mean(dim=(1, 2, 3)).view(-1, 1, 1, 1).expand(-1, 4, *side).contiguous()

    def encode_prompts(self, prompts: Sequence[str]) -> TextEmbeds:
        return TextEmbeds(torch.tensor([[[float(len(prompt))]] for prompt in prompts]), None)

    def truncated(self, prompts: Sequence[str]) -> list[str]:
        return [prompt for prompt in prompts if "star" in prompt]


def brightness(side: Any, row: int) -> int:
    """Of a picture that an `Album` has encoded, in [0, 255]."""
    latents, _ = side.read(row, False, (0.5, 0.5))
    return round((float(latents.mean()) + 1) * 127.5)


def prompts_of(samples: PreparedSamples) -> list[str]:
    """One per sample."""
    return [samples.prompts[row] for row in range(len(samples))]
