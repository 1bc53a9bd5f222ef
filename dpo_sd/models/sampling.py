"""Images from prompts and seeds; every image has a generator of its own and disturbs no other randomness."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from dpo_sd.errors import UserError, check_range

if TYPE_CHECKING:
    from diffusers import DDPMScheduler
    from PIL import Image
    from torch import Tensor, nn

    from dpo_sd.models.stable_diffusion import StableDiffusion, TextEmbeds


AHEAD = 2048  # prompts that are encoded before the first of their images is drawn: 1.3 GB of memory for SDXL
RESCALE = 0.7  # the paper's share, for schedules that end in pure noise
LEFT_OUT: dict[str, Any] = {"guidance_rescale": 0.0}  # of `Sampler.settings`, at these values


class Embeds(NamedTuple):
    """Embeddings that images are drawn with.

    Args:
        wanted: of the prompts, one per image.
        unwanted: of the negative prompt, one for all.
    """

    wanted: TextEmbeds
    unwanted: TextEmbeds


class Sampler:
    """Settings by which images are drawn.

    Args:
        scheduler: `dpm++` is DPM-Solver++ of second order (Lu et al. 2022, arXiv:2211.01095), `ddim` DDIM (Song et
            al. 2020, arXiv:2010.02502); both are deterministic once the first noise is given.
        steps: network evaluations per image, at least 1; conf/ takes the family's own.
        guidance: scale of classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598); 1 is none; conf/ takes the
            family's own.
        batch_size: images drawn together; it changes them by rounding only.
        negative_prompt: prompt that guidance leads away from, where guidance is above 1.
        height, width: size of the images in pixels, multiples of 8; None takes what the model was trained for.
        guidance_rescale: share in [0, 1] of the guided prediction that gets back the contrast of the one without
            guidance (Lin et al. 2023, arXiv:2305.08891, section 3.4); 0 is none. None takes the paper's 0.7 for a
            schedule that ends in pure noise, whose images guidance overexposes, and 0 for others.
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
        guidance_rescale: float | None = None,
    ):
        check_range("steps", steps, 1, 1000)
        check_range("batch_size", batch_size, 1, 4096)
        if not 1 <= guidance < math.inf:
            raise UserError(f"guidance must be at least 1 (1 is without guidance) and finite, got {guidance}")
        if negative_prompt and guidance == 1:
            raise UserError(f"negative_prompt={negative_prompt!r} has no effect at guidance 1: raise the guidance")
        if guidance_rescale is not None and not 0 <= guidance_rescale <= 1:
            raise UserError(f"guidance_rescale must be between 0 and 1, got {guidance_rescale}")
        if guidance_rescale and guidance == 1:
            raise UserError(f"guidance_rescale={guidance_rescale} has no effect at guidance 1: raise the guidance")
        for name, pixels in (("height", height), ("width", width)):
            if pixels is not None and (pixels < 8 or pixels % 8):
                raise UserError(f"{name} must be a multiple of 8 pixels, got {pixels}")
            check_range(name, pixels or 8, 8, 8192)
        self.scheduler, self.steps, self.guidance, self.batch_size = scheduler, steps, guidance, batch_size
        self.negative_prompt, self.height, self.width = negative_prompt, height, width
        self.guidance_rescale = guidance_rescale

    def changed(self, **settings: Any) -> Sampler:
        """A sampler with other settings, and all else as here.

        Raises:
            UserError: as the constructor.
        """
        names = ("scheduler", "steps", "guidance", "batch_size", "negative_prompt", "height", "width")
        mine = {name: getattr(self, name) for name in (*names, "guidance_rescale")}
        return Sampler(**mine | settings)

    def settings(self, schedule: DDPMScheduler) -> dict[str, Any]:
        """The settings that decide the images, for caches and records; the batch size does not.

        Those of `LEFT_OUT` are there only at other values.

        Args:
            schedule: of the model that draws.
        """
        names = ("scheduler", "steps", "guidance", "negative_prompt", "height", "width")
        rescaled = {"guidance_rescale": self.rescale(schedule)}
        return {name: getattr(self, name) for name in names} | (rescaled if rescaled != LEFT_OUT else {})

    def rescale(self, schedule: DDPMScheduler) -> float:
        """`guidance_rescale`, or where it is None what the schedule asks for."""
        if self.guidance_rescale is not None:
            return self.guidance_rescale
        return RESCALE if self.guidance > 1 and schedule.config.get("rescale_betas_zero_snr") else 0.0

    def size(self, model: StableDiffusion) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        return self.height or model.resolution, self.width or model.resolution

    def encode(self, model: StableDiffusion, prompts: Sequence[str]) -> Embeds:
        """Embeddings that `draw` takes, by the text encoders with their adapters as they are set; on the CPU."""
        with _evaluating(model.text_encoders), model.working(*model.text_encoders):
            return Embeds(model.encode_prompts(prompts), model.encode_prompts([self.negative_prompt]))

    def draw(
        self,
        model: StableDiffusion,
        prompts: Sequence[str],
        seeds: Sequence[int],
        progress: str | None = None,
        embeds: Embeds | None = None,
    ) -> list[Image.Image]:
        """Draws image i from prompt i and seed i alone, with the adapters of the networks as they are set.

        Args:
            seeds: one per prompt, in [0, 2**63); the first noise comes from the CPU, the same for every device.
            progress: label of a progress bar; None shows none.
            embeds: what `encode` gave for the prompts, where that was called before.
        """
        from tqdm import tqdm

        images = self.stream(model, prompts, seeds, embeds)
        return list(tqdm(images, progress, len(prompts), unit="picture", disable=progress is None))

    def stream(
        self, model: StableDiffusion, prompts: Sequence[str], seeds: Sequence[int], embeds: Embeds | None = None
    ) -> Iterator[Image.Image]:
        """The images of `draw` one after the other, of which a batch is drawn when its first is asked for.

        First all prompts are encoded, then the UNet comes to the device and stays until the last image.
        """
        if embeds is not None:
            yield from self._stream(model, embeds, seeds)
            return
        ahead = AHEAD // self.batch_size * self.batch_size or self.batch_size
        for start in range(0, len(prompts), ahead):
            part = slice(start, start + ahead)
            yield from self._stream(model, self.encode(model, prompts[part]), seeds[part])

    def _stream(self, model: StableDiffusion, embeds: Embeds, seeds: Sequence[int]) -> Iterator[Image.Image]:
        import torch

        from dpo_sd.models.compilation import eager

        unet, pipeline = model.unet, self._pipeline(model)
        height, width = self.size(model)
        # latents stay float32, so a UNet in half precision casts what it is given
        casting = torch.autocast(torch.device(model.device).type, unet.dtype, enabled=unet.dtype != torch.float32)
        with _evaluating([unet]), model.drawing(height * width):
            for start in range(0, len(seeds), self.batch_size):
                batch = slice(start, start + self.batch_size)
                with casting, eager():
                    latents = pipeline(
                        latents=self._first_noise(model, seeds[batch]),
                        num_inference_steps=self.steps,
                        guidance_scale=self.guidance,
                        guidance_rescale=self.rescale(model.noise_scheduler),
                        height=height,
                        width=width,
                        output_type="latent",
                        **_given("", embeds.wanted, batch),
                        **_given("negative_", embeds.unwanted, [0] * len(seeds[batch])),
                    ).images
                yield from model.decode_latents(latents.float())

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

        shape = (1, 4, *(side // model.factor for side in self.size(model)))
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
