"""Images from prompts and seeds; every picture has a generator of its own and disturbs no other randomness."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from dpo_sd.errors import UserError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from dpo_sd.models.stable_diffusion import StableDiffusion, TextEmbeds


class Sampler:
    """How pictures are drawn.

    Args:
        scheduler: `dpm++` is DPM-Solver++ of second order (Lu et al. 2022, arXiv:2211.01095), `ddim` DDIM (Song et
            al. 2020, arXiv:2010.02502); both are deterministic once the first noise is given.
        steps: network evaluations per picture, at least 1.
        guidance: scale of classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598); 1 is none.
        batch_size: pictures drawn together; it changes pictures by rounding only.
        negative_prompt: what guidance leads away from, where it is above 1.
        height, width: of the pictures in pixels, multiples of 8; None takes what the model was trained for.
    """

    def __init__(
        self,
        scheduler: Literal["dpm++", "ddim"] = "dpm++",
        steps: int = 12,
        guidance: float = 4.0,
        batch_size: int = 32,
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
    ):
        if steps < 1:
            raise UserError(f"steps must be at least 1, got {steps}")
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        if not 1 <= guidance < math.inf:
            raise UserError(f"guidance must be at least 1 (1 is without guidance) and finite, got {guidance}")
        if negative_prompt and guidance == 1:
            raise UserError(f"negative_prompt={negative_prompt!r} has no effect at guidance 1: raise the guidance")
        for name, pixels in (("height", height), ("width", width)):
            if pixels is not None and (pixels < 8 or pixels % 8):
                raise UserError(f"{name} must be a multiple of 8 pixels, got {pixels}")
        self.scheduler, self.steps, self.guidance, self.batch_size = scheduler, steps, guidance, batch_size
        self.negative_prompt, self.height, self.width = negative_prompt, height, width

    def settings(self) -> dict[str, Any]:
        """What decides the pictures, for caches and records; the batch size does not."""
        names = ("scheduler", "steps", "guidance", "negative_prompt", "height", "width")
        return {name: getattr(self, name) for name in names}

    def draw(
        self, model: StableDiffusion, prompts: Sequence[str], seeds: Sequence[int], progress: str | None = None
    ) -> list[Image.Image]:
        """Draws picture i from prompt i and seed i alone, with the adapters of the UNet as they are set.

        Args:
            seeds: one per prompt, in [0, 2**63); the first noise comes from the CPU, the same for every device.
            progress: what to call the work in a progress bar; None shows none.
        """
        import torch
        from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
        from tqdm import tqdm

        from dpo_sd.models.compilation import eager

        unet = model.unet
        pipeline: Any = model.pipeline()
        # latents stay float32, so a UNet in half precision casts what it is given
        casting = torch.autocast(torch.device(model.device).type, unet.dtype, enabled=unet.dtype != torch.float32)
        scheduler = {"ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler}[self.scheduler]
        config = dict(model.noise_scheduler.config)
        if config.get("rescale_betas_zero_snr"):  # such a schedule must be begun at its very end
            config["timestep_spacing"] = "trailing"
        pipeline.scheduler = scheduler.from_config(config)
        pipeline.set_progress_bar_config(disable=True)
        # beside the UNet nothing is on the device while it works
        for part in ("vae", "text_encoder", "text_encoder_2"):
            if hasattr(pipeline, part):
                setattr(pipeline, part, None)
        networks = list(model.networks.values())
        were_training = [network.training for network in networks]
        for network in networks:
            network.eval()  # no dropout in the adapters
        pictures: list[Image.Image] = []
        try:
            wanted = model.encode_prompts(prompts)
            unwanted = model.encode_prompts([self.negative_prompt])
            with tqdm(total=len(prompts), desc=progress, unit="picture", disable=progress is None) as bar:
                for start in range(0, len(prompts), self.batch_size):
                    batch = slice(start, start + self.batch_size)
                    with model.working(unet), casting, eager():
                        latents = pipeline(
                            latents=self._first_noise(model, seeds[batch]),
                            num_inference_steps=self.steps,
                            guidance_scale=self.guidance,
                            height=self.height or model.resolution,
                            width=self.width or model.resolution,
                            output_type="latent",
                            **_told("", wanted, batch),
                            **_told("negative_", unwanted, [0] * len(seeds[batch])),
                        ).images
                    pictures += model.decode_latents(latents.float())
                    bar.update(len(pictures) - start)
        finally:
            for network, was_training in zip(networks, were_training, strict=True):
                network.train(was_training)
        return pictures

    def _first_noise(self, model: StableDiffusion, seeds: Sequence[int]) -> Tensor:
        """(n, 4, h/8, w/8), fp32, on the CPU."""
        import torch

        sides = (self.height or model.resolution, self.width or model.resolution)
        shape = (1, 4, *(side // model.factor for side in sides))
        return torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def _told(prefix: str, embeds: TextEmbeds, rows: Any) -> dict[str, Tensor]:
    """Rows of what the text encoders made, as a pipeline is given them."""
    told = {f"{prefix}prompt_embeds": embeds.hidden[rows]}
    return told if embeds.pooled is None else told | {f"{prefix}pooled_prompt_embeds": embeds.pooled[rows]}
