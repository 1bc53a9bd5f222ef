"""Images from prompts and seeds; every image has a generator of its own and disturbs no other randomness."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from dpo_sd.errors import UserError, check_range

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor, nn

    from dpo_sd.models.stable_diffusion import StableDiffusion, TextEmbeds


class Sampler:
    """Settings by which images are drawn.

    Args:
        scheduler: `dpm++` is DPM-Solver++ of second order (Lu et al. 2022, arXiv:2211.01095), `ddim` DDIM (Song et
            al. 2020, arXiv:2010.02502); both are deterministic once the first noise is given.
        steps: network evaluations per image, at least 1.
        guidance: scale of classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598); 1 is none.
        batch_size: images drawn together; it changes them by rounding only.
        negative_prompt: prompt that guidance leads away from, where guidance is above 1.
        height, width: size of the images in pixels, multiples of 8; None takes what the model was trained for.
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
        check_range("steps", steps, 1, 1000)
        check_range("batch_size", batch_size, 1, 4096)
        if not 1 <= guidance < math.inf:
            raise UserError(f"guidance must be at least 1 (1 is without guidance) and finite, got {guidance}")
        if negative_prompt and guidance == 1:
            raise UserError(f"negative_prompt={negative_prompt!r} has no effect at guidance 1: raise the guidance")
        for name, pixels in (("height", height), ("width", width)):
            if pixels is not None and (pixels < 8 or pixels % 8):
                raise UserError(f"{name} must be a multiple of 8 pixels, got {pixels}")
            check_range(name, pixels or 8, 8, 8192)
        self.scheduler, self.steps, self.guidance, self.batch_size = scheduler, steps, guidance, batch_size
        self.negative_prompt, self.height, self.width = negative_prompt, height, width

    def settings(self) -> dict[str, Any]:
        """The settings that decide the images, for caches and records; the batch size does not."""
        names = ("scheduler", "steps", "guidance", "negative_prompt", "height", "width")
        return {name: getattr(self, name) for name in names}

    def draw(
        self, model: StableDiffusion, prompts: Sequence[str], seeds: Sequence[int], progress: str | None = None
    ) -> list[Image.Image]:
        """Draws image i from prompt i and seed i alone, with the adapters of the UNet as they are set.

        Args:
            seeds: one per prompt, in [0, 2**63); the first noise comes from the CPU, the same for every device.
            progress: label of a progress bar; None shows none.
        """
        import torch
        from tqdm import tqdm

        from dpo_sd.models.compilation import eager

        unet, images = model.unet, []
        pipeline = self._pipeline(model)
        # latents stay float32, so a UNet in half precision casts what it is given
        casting = torch.autocast(torch.device(model.device).type, unet.dtype, enabled=unet.dtype != torch.float32)
        with _evaluating(list(model.networks.values())):
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
                            **_given("", wanted, batch),
                            **_given("negative_", unwanted, [0] * len(seeds[batch])),
                        ).images
                    images += model.decode_latents(latents.float())
                    bar.update(len(images) - start)
        return images

    def _pipeline(self, model: StableDiffusion) -> Any:
        """The model's pipeline with our schedule and, so that nothing is on the device beside it, only the UNet."""
        from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

        pipeline: Any = model.pipeline()
        scheduler = {"ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler}[self.scheduler]
        config = dict(model.noise_scheduler.config)
        if config.get("rescale_betas_zero_snr"):  # such a schedule must be begun at its very end
            config["timestep_spacing"] = "trailing"
        pipeline.scheduler = scheduler.from_config(config)
        pipeline.set_progress_bar_config(disable=True)
        for part in ("vae", *model.family.encoders):
            setattr(pipeline, part, None)
        return pipeline

    def _first_noise(self, model: StableDiffusion, seeds: Sequence[int]) -> Tensor:
        """(n, 4, h/8, w/8), fp32, on the CPU."""
        import torch

        sides = (self.height or model.resolution, self.width or model.resolution)
        shape = (1, 4, *(side // model.factor for side in sides))
        return torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@contextmanager
def _evaluating(networks: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, the networks are in evaluation mode: adapters drop nothing."""
    were_training = [network.training for network in networks]
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for network, was_training in zip(networks, were_training, strict=True):
            network.train(was_training)


def _given(prefix: str, embeds: TextEmbeds, rows: Any) -> dict[str, Tensor]:
    """Rows of embeddings, under the names of a pipeline's arguments."""
    given = {f"{prefix}prompt_embeds": embeds.hidden[rows]}
    return given if embeds.pooled is None else given | {f"{prefix}pooled_prompt_embeds": embeds.pooled[rows]}
