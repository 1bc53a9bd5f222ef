"""The parts of a Stable Diffusion, loaded once and shared by training and sampling."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
    from PIL import Image
    from torch import Tensor, nn
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from dpo_sd.losses import PredictionType
    from dpo_sd.models.families import Family

DECODED_PIXELS = 512 * 512  # that the VAE decodes together: its fp32 activations are the largest of all
ENCODED_PIXELS = 8 * 512 * 512  # that it encodes together
PROMPTS = 16  # that the text encoders read together


def encoded_together(area: int) -> int:
    """Pictures of so many pixels that the VAE encodes at a time."""
    return max(1, min(64, ENCODED_PIXELS // area))


class Fingerprints(NamedTuple):
    """Hashes of files with weights, settings and vocabulary, for caches and records: 16 hexadecimal digits each.

    Args:
        model: of everything.
        vae: of what decides the latents.
        text: of what decides the embeddings of prompts.
    """

    model: str
    vae: str
    text: str


class TextEmbeds(NamedTuple):
    """What the text encoders make of prompts.

    Args:
        hidden: (n, tokens, width), what cross-attention reads.
        pooled: (n, width) of the second text encoder of SDXL; None for the other families.
    """

    hidden: Tensor
    pooled: Tensor | None


@dataclass
class StableDiffusion:
    """A frozen base model.

    Args:
        name: its family, as in the `model` group.
        unet, vae, text_encoders, tokenizers: parts as diffusers and transformers build them, without gradients; SDXL
            has two text encoders.
        noise_scheduler: the training schedule; its `prediction_type` says what the UNet predicts.
        fingerprints: of the files.
        device: where the networks work; `working` takes there what is needed.
    """

    name: Family
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoders: list[CLIPTextModel | CLIPTextModelWithProjection]
    tokenizers: list[CLIPTokenizer]
    noise_scheduler: DDPMScheduler
    fingerprints: Fingerprints
    device: torch.device | str = field(default="cpu")
    text_dtype: torch.dtype | None = field(default=None, init=False)  # of `halve_text`

    @property
    def fingerprint(self) -> str:
        return self.fingerprints.model

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """Those that a LoRA can adapt, by the names that diffusers gives them."""
        return {"unet": self.unet} | dict(zip(("text_encoder", "text_encoder_2"), self.text_encoders, strict=False))

    @property
    def is_xl(self) -> bool:
        """Whether the UNet is also told pooled text and sizes, as SDXL's is."""
        return self.unet.config["addition_embed_type"] == "text_time"

    @property
    def prediction_type(self) -> PredictionType:
        return self.noise_scheduler.config["prediction_type"]

    @property
    def factor(self) -> int:
        """Pixels along one side of a latent pixel."""
        return 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    @property
    def latent_size(self) -> int:
        return self.unet.config["sample_size"]

    @property
    def resolution(self) -> int:
        """Width and height in pixels that the model was trained for."""
        return self.latent_size * self.factor

    @property
    def max_tokens(self) -> int:
        """Tokens that the text encoders read, their two marks included."""
        return min(tokenizer.model_max_length for tokenizer in self.tokenizers)

    def working(self, *networks: nn.Module) -> AbstractContextManager[None]:
        """Inside, the networks are on `device`; afterwards each is back where it was."""
        return _placed(self.device, networks)

    def resting(self, *networks: nn.Module) -> AbstractContextManager[None]:
        """Inside, the networks are on the CPU; afterwards each is back where it was."""
        return _placed("cpu", networks)

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Latents (n, 4, h/8, w/8) of pixels (n, 3, h, w) in [-1, 1], in the VAE's precision, scaled.

        The mean of the posterior, not a sample of it, so that a picture has one latent that can be kept. As many at a
        time as `encoded_together` says.
        """
        import torch

        latents = []
        for batch in pixels.split(encoded_together(pixels.shape[-2] * pixels.shape[-1])):
            posterior: Any = self.vae.encode(batch.to(self.vae.device, self.vae.dtype))
            latents.append(posterior.latent_dist.mean * self.vae.config["scaling_factor"])
        return torch.cat(latents)

    def decode_latents(self, latents: Tensor) -> list[Image.Image]:
        """Pictures of scaled latents (n, 4, h, w), as many at a time as `DECODED_PIXELS` allow, one at least."""
        import torch
        from diffusers.image_processor import VaeImageProcessor

        processor = VaeImageProcessor(vae_scale_factor=self.factor)
        images: list[Image.Image] = []
        size = latents.shape[-2] * latents.shape[-1] * self.factor**2
        # a large picture takes so much that the UNet makes room for it
        room = self.resting(self.unet) if size > DECODED_PIXELS else nullcontext()
        with room, self.working(self.vae), torch.inference_mode():
            for batch in (latents / self.vae.config["scaling_factor"]).split(max(1, DECODED_PIXELS // size)):
                decoded: Any = self.vae.decode(batch.to(self.vae.device, self.vae.dtype))
                images += processor.postprocess(decoded.sample)  # type: ignore[operator]  # a list by default
        return images

    def halve_text(self, dtype: torch.dtype) -> None:
        """Stores the text encoders' linear layers as autocast would cast them at every use; adapters stay as they are.

        For steps that ask the encoders: half of the memory, and inside autocast the same results.
        `encode_prompts` computes under autocast from then on.
        """
        from torch import nn

        for encoder in self.text_encoders:
            for name, layer in encoder.named_modules():
                if isinstance(layer, nn.Linear) and "lora_" not in name:
                    layer.to(dtype)
        self.text_dtype = dtype

    def embed(self, prompts: Sequence[str]) -> TextEmbeds:
        """What the text encoders make of prompts, where they are and with the gradients they have; long ones are cut.

        SDXL reads the last but one layer of both encoders, and the second one's pooled projection.
        """
        import torch

        hidden, pooled = [], None
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            tokens = tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt")
            output: Any = encoder(tokens.input_ids.to(encoder.device), output_hidden_states=self.is_xl)
            hidden.append(output.hidden_states[-2] if self.is_xl else output.last_hidden_state)
            pooled = output.text_embeds if "text_embeds" in output else None
        return TextEmbeds(torch.cat(hidden, dim=-1), pooled)

    def encode_prompts(self, prompts: Sequence[str], batch_size: int = PROMPTS) -> TextEmbeds:
        """`embed` in batches and without gradients: fp32 on the CPU."""
        import torch

        half = self.text_dtype
        casting = nullcontext() if half is None else torch.autocast(torch.device(self.device).type, half)
        with self.working(*self.text_encoders), torch.inference_mode(), casting:
            parts = [self.embed(prompts[start : start + batch_size]) for start in range(0, len(prompts), batch_size)]

        def joined(tensors: Sequence[Tensor]) -> Tensor:
            return torch.cat([tensor.float().cpu() for tensor in tensors]).clone()

        hidden, pooled = zip(*parts, strict=True)
        return TextEmbeds(joined(hidden), None if pooled[0] is None else joined(pooled))

    def truncated(self, prompts: Sequence[str]) -> list[str]:
        """Those of the prompts that have more tokens than the text encoders read."""
        # a token is at least one character of ASCII, and two tokens mark the ends
        suspects = [prompt for prompt in prompts if len(prompt) + 2 > self.max_tokens or not prompt.isascii()]
        long: list[str] = []
        for start in range(0, len(suspects), 1024):
            part = suspects[start : start + 1024]
            ids = self.tokenizers[0](part).input_ids
            long += [prompt for prompt, tokens in zip(part, ids, strict=True) if len(tokens) > self.max_tokens]
        return long

    def pipeline(self) -> DiffusionPipeline:
        """A diffusers pipeline on these very parts, adapters included; nothing is copied."""
        from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

        shared: dict[str, Any] = {"vae": self.vae, "unet": self.unet, "scheduler": self.noise_scheduler}
        for number, (encoder, tokenizer) in enumerate(zip(self.text_encoders, self.tokenizers, strict=True), start=1):
            suffix = "" if number == 1 else f"_{number}"
            shared |= {f"text_encoder{suffix}": encoder, f"tokenizer{suffix}": tokenizer}
        if self.is_xl:
            return StableDiffusionXLPipeline(**shared, add_watermarker=False)
        shared |= {"safety_checker": None, "feature_extractor": None}
        return StableDiffusionPipeline(**shared, requires_safety_checker=False)


@contextmanager
def _placed(device: torch.device | str, networks: Iterable[nn.Module]) -> Iterator[None]:
    networks = list(networks)
    before = [next(network.parameters()).device for network in networks]
    try:
        for network in networks:
            network.to(device)
        yield
    finally:
        for network, former in zip(networks, before, strict=True):
            network.to(former)


def encode_bytes(model: StableDiffusion, pixels: torch.Tensor) -> torch.Tensor:
    """Latents of pixels (n, 3, h, w), uint8, where the VAE is and in its precision."""
    return model.encode_pixels(pixels.to(model.vae.device, model.vae.dtype) / 127.5 - 1)
