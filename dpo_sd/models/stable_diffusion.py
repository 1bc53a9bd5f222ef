"""The parts of a Stable Diffusion, loaded once and shared by training and sampling."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo_sd.errors import UserError
from dpo_sd.files.texts import whole
from dpo_sd.models.families import AS_USUAL, FAMILIES, Reading, tokenizer_of

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
    from PIL import Image
    from torch import Tensor, nn
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from dpo_sd.losses import PredictionType
    from dpo_sd.models.families import Family, FamilyName

DECODED_PIXELS = 512 * 512  # in one batch of the VAE's decoder, whose fp32 activations are the largest of all
ENCODED_PIXELS = 8 * 512 * 512  # in one batch of the VAE's encoder
DECODED_SPARE = (
    1.25  # times what decoding is counted to need: convolutions borrow memory, and what is free is in pieces
)
PROMPTS = 16  # in one batch of the text encoders


def encoded_together(area: int) -> int:
    """How many images of `area` pixels the VAE encodes in one batch."""
    return max(1, min(64, ENCODED_PIXELS // area))


def decoded_together(area: int) -> int:
    """How many images of `area` pixels the VAE decodes in one batch."""
    return max(1, DECODED_PIXELS // area)


class Fingerprints(NamedTuple):
    """Hashes of files with weights, settings and vocabulary, for caches and records: 16 hexadecimal digits each.

    Args:
        model: hash of everything.
        vae: hash of what decides the latents.
        text: hash of what decides the embeddings of prompts.
    """

    model: str
    vae: str
    text: str


class TextEmbeds(NamedTuple):
    """Embeddings of prompts by the text encoders.

    Args:
        hidden: (n, tokens, width), which cross-attention reads.
        pooled: (n, pooled width), the pooled text; None for families whose UNet is not told it.
    """

    hidden: Tensor
    pooled: Tensor | None


@dataclass
class StableDiffusion:
    """A frozen base model.

    Args:
        name: name of the family, as in the `model` group.
        unet, vae, text_encoders, tokenizers: parts as diffusers and transformers build them, without gradients; as
            many text encoders as the family has.
        noise_scheduler: the training schedule; its `prediction_type` says what the UNet predicts.
        fingerprints: hashes of the files.
        device: where the networks work; `working` takes there what is needed.
        reading: how the text encoders read prompts.
    """

    name: FamilyName
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoders: list[CLIPTextModel | CLIPTextModelWithProjection]
    tokenizers: list[CLIPTokenizer]
    noise_scheduler: DDPMScheduler
    fingerprints: Fingerprints
    device: torch.device | str
    reading: Reading = AS_USUAL
    text_dtype: torch.dtype | None = field(default=None, init=False)  # set by `halve_text`

    @classmethod
    def of_parts(
        cls,
        name: FamilyName,
        parts: Mapping[str, Any],
        fingerprints: Fingerprints,
        device: torch.device | str,
        reading: Reading = AS_USUAL,
    ) -> StableDiffusion:
        """The model of these parts, by the names of diffusers' layout; its networks are frozen, in evaluation mode.

        Args:
            parts: the VAE and the vocabularies may be missing from what nothing is encoded with.
        """
        encoders = FAMILIES[name].encoders
        for part in ("unet", "vae", *encoders):
            if part in parts:
                parts[part].eval().requires_grad_(False)
        return cls(
            name,
            unet=parts["unet"],
            vae=parts.get("vae"),  # type: ignore[arg-type]
            text_encoders=[parts[encoder] for encoder in encoders],
            tokenizers=[parts.get(tokenizer_of(encoder)) for encoder in encoders],  # type: ignore[misc]
            noise_scheduler=parts["scheduler"],
            fingerprints=fingerprints,
            device=device,
            reading=reading,
        )

    @property
    def family(self) -> Family:
        return FAMILIES[self.name]

    @property
    def fingerprint(self) -> str:
        return self.fingerprints.model

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """The networks that a LoRA can adapt, by the names that diffusers gives them."""
        return dict(zip(self.family.networks, (self.unet, *self.text_encoders), strict=True))

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
        """Tokens that the text encoders read, the two marks of the ends of each chunk included."""
        return self.reading.chunks * min(tokenizer.model_max_length for tokenizer in self.tokenizers)

    @property
    def hidden_shape(self) -> tuple[int, int]:
        """Tokens and width of the hidden states of one prompt."""
        tokens: int = self.text_encoders[0].config.max_position_embeddings
        return self.reading.chunks * tokens, self.unet.config["cross_attention_dim"]

    @property
    def pooled_width(self) -> int | None:
        """Width of the pooled text of one prompt; None where the UNet is not told it."""
        return self.text_encoders[-1].config.projection_dim if self.family.pooled else None

    def added(self, pooled: Tensor | None, time_ids: Tensor | None) -> dict[str, Tensor | None] | None:
        """Conditioning of the UNet beside latents, timesteps and hidden states; see `Family.added`."""
        return self.family.added(pooled, time_ids)

    def unread(self, network: str, tensor: str) -> bool:
        """Whether no embedding of a prompt depends on a tensor of a text encoder.

        Args:
            network: the text encoder's name in `networks`.
            tensor: the tensor's name inside of it.
        """
        how: Any = self.family.encoders[network]
        if how.pooled:
            return False
        layers: int = self.networks[network].config.num_hidden_layers  # type: ignore[union-attr]
        # of the hidden states, the first is the embedding's
        skipped = range(layers + 1 + (how.layer or -self.reading.clip_skip), layers)
        return any(f"layers.{layer}." in tensor for layer in skipped)

    def working(self, *networks: nn.Module) -> AbstractContextManager[None]:
        """Inside, the networks are on `device`; afterwards each is back where it was."""
        return _placed(self.device, networks)

    def resting(self, *networks: nn.Module) -> AbstractContextManager[None]:
        """Inside, the networks are on the CPU; afterwards each is back where it was."""
        return _placed("cpu", networks)

    @contextmanager
    def drawing(self, area: int) -> Iterator[None]:
        """Inside, the UNet is on `device`, and so is the VAE if they have room there together.

        Args:
            area: pixels of an image that is drawn.
        """
        with self.working(self.unet), self.working(self.vae) if self.decodes_beside(area) else nullcontext():
            yield

    def decodes_beside(self, area: int) -> bool:
        """Whether the device has the memory to decode images of `area` pixels beside all that is there now."""
        parameters = list(self.vae.parameters())
        away = sum(p.nbytes for p in parameters if p.device.type != _type(self.device))
        # at its peak the decoder holds three tensors of this width at the size of the image, in single precision
        width: int = self.vae.config["block_out_channels"][1]
        activations = 3 * 4 * width * area * decoded_together(area)
        return away + DECODED_SPARE * activations <= free_memory(self.device)

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Latents (n, 4, h/8, w/8) of pixels (n, 3, h, w) in [-1, 1], in the VAE's precision, scaled.

        The mean of the posterior, not a sample of it, so that an image has one latent that can be kept. The VAE encodes
        `encoded_together` images in one batch.
        """
        import torch

        latents = []
        for batch in pixels.split(encoded_together(pixels.shape[-2] * pixels.shape[-1])):
            posterior: Any = self.vae.encode(batch.to(self.vae.device, self.vae.dtype))
            latents.append(posterior.latent_dist.mean * self.vae.config["scaling_factor"])
        return torch.cat(latents)

    def decode_latents(self, latents: Tensor) -> list[Image.Image]:
        """Images of scaled latents (n, 4, h, w), decoded in batches of at most `DECODED_PIXELS`, or one by one.

        The UNet makes room on the device where there is too little for both.

        Raises:
            UserError: if a latent is not finite, which would be a black image.
        """
        import torch
        from diffusers.image_processor import VaeImageProcessor

        if not latents.isfinite().all():
            raise UserError(
                "the model draws numbers that are not finite: its LoRAs are broken, or too strong; lower their weights"
            )
        processor = VaeImageProcessor(vae_scale_factor=self.factor)
        images: list[Image.Image] = []
        size = latents.shape[-2] * latents.shape[-1] * self.factor**2
        room = nullcontext() if self.decodes_beside(size) else self.resting(self.unet)
        with room, self.working(self.vae), torch.inference_mode():
            for batch in (latents / self.vae.config["scaling_factor"]).split(decoded_together(size)):
                decoded: Any = self.vae.decode(batch.to(self.vae.device, self.vae.dtype))
                images += processor.postprocess(decoded.sample)  # type: ignore[operator]  # a list by default
        return images

    def halve_text(self, dtype: torch.dtype) -> None:
        """Casts the text encoders' linear layers to a half precision, but not their adapters.

        For steps that ask the encoders: it takes half of the memory, and inside autocast, which would cast them at
        every use, it changes no result. `encode_prompts` computes under autocast from then on.
        """
        from torch import nn

        for encoder in self.text_encoders:
            for name, layer in encoder.named_modules():
                if isinstance(layer, nn.Linear) and "lora_" not in name:
                    layer.to(dtype)
        self.text_dtype = dtype

    def embed(self, prompts: Sequence[str]) -> TextEmbeds:
        """Embeddings of prompts, where the text encoders are and with the gradients they have; long ones are cut.

        The pooled text is that of the first chunk, as in Kohya's trainer and A1111.
        """
        import torch

        chunks, skip = self.reading
        hidden, pooled = [], None
        for how, tokenizer, encoder in zip(
            self.family.encoders.values(), self.tokenizers, self.text_encoders, strict=True
        ):
            tokens = torch.tensor(self._tokens(tokenizer, prompts), device=encoder.device)
            output: Any = encoder(tokens, output_hidden_states=how.layer is not None or skip > 1)
            if how.layer is not None:
                states = output.hidden_states[how.layer]
            elif skip > 1:
                norm: Any = encoder.final_layer_norm
                states = norm(output.hidden_states[-skip])
            else:
                states = output.last_hidden_state
            hidden.append(states.reshape(len(prompts), -1, states.shape[-1]))
            pooled = output.text_embeds[::chunks] if how.pooled else pooled
        return TextEmbeds(torch.cat(hidden, dim=-1), pooled)

    def _tokens(self, tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> list[list[int]]:
        """The chunks of all prompts, filled up: token k of a prompt is token k mod room of its chunk k div room.

        Half of a surrogate pair is read as �: no tokenizer takes it.
        """
        length, rows = tokenizer.model_max_length, []
        room = length - 2  # between the marks of the ends
        for ids in tokenizer([whole(prompt) for prompt in prompts]).input_ids:
            for chunk in range(self.reading.chunks):
                part = ids[1:-1][room * chunk : room * (chunk + 1)]
                row: list[Any] = [tokenizer.bos_token_id, *part, tokenizer.eos_token_id]
                rows.append(row + [tokenizer.pad_token_id] * (length - len(row)))
        return rows

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
        """The prompts that have more tokens than the text encoders read."""
        # a token is at least one character of ASCII, and two tokens mark the ends
        most = self.max_tokens - 2 * self.reading.chunks
        suspects = [prompt for prompt in prompts if len(prompt) > most or not prompt.isascii()]
        long: list[str] = []
        for start in range(0, len(suspects), 1024):
            part = suspects[start : start + 1024]
            ids = self.tokenizers[0]([whole(prompt) for prompt in part]).input_ids
            long += [prompt for prompt, tokens in zip(part, ids, strict=True) if len(tokens) - 2 > most]
        return long

    def pipeline(self) -> DiffusionPipeline:
        """A diffusers pipeline on these very parts, adapters included; nothing is copied."""
        import diffusers

        parts: dict[str, Any] = {"vae": self.vae, "scheduler": self.noise_scheduler, **self.networks}
        parts |= dict(zip(map(tokenizer_of, self.family.encoders), self.tokenizers, strict=True))
        return getattr(diffusers, self.family.pipeline)(**parts, **self.family.pipeline_settings)


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


def free_memory(device: torch.device | str) -> float:
    """Bytes that this process can still take on a card; infinite for what is no card.

    What torch holds there without using it is free, and a limit that was set for the process is one.
    """
    import torch

    if _type(device) != "cuda":
        return math.inf
    free, total = torch.cuda.mem_get_info(device)
    used = torch.cuda.memory_allocated(device)
    limit = total * torch.cuda.get_per_process_memory_fraction(device)
    return min(free + torch.cuda.memory_reserved(device) - used, limit - used)


def _type(device: torch.device | str) -> str:
    import torch

    return torch.device(device).type


def encode_bytes(model: StableDiffusion, pixels: torch.Tensor) -> torch.Tensor:
    """Latents of pixels (n, 3, h, w), uint8, where the VAE is and in its precision."""
    return model.encode_pixels(pixels.to(model.vae.device, model.vae.dtype) / 127.5 - 1)
