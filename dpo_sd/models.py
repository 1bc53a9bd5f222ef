"""The parts of a Stable Diffusion, loaded once and shared by training and sampling."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dpo_sd.errors import UserError

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from PIL import Image
    from transformers import CLIPTextModel, CLIPTokenizer

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
TINY = Path(__file__).parent / "assets" / "tiny-sd"


@dataclass
class StableDiffusion:
    """A frozen base model.

    Args:
        name: its family, as in the `model` group.
        unet, vae, text_encoder, tokenizer: parts as diffusers and transformers build them, without gradients.
        noise_scheduler: the training schedule; its `prediction_type` says what the UNet predicts.
        fingerprint: hash of the weights, for caches and records.
    """

    name: str
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    noise_scheduler: DDPMScheduler
    fingerprint: str

    @property
    def latent_size(self) -> int:
        return self.unet.config["sample_size"]

    @property
    def resolution(self) -> int:
        """Width and height in pixels that the model was trained for."""
        return self.latent_size * 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    def encode_images(self, images: Sequence[Image.Image], batch_size: int = 64) -> torch.Tensor:
        """Latents of pictures: (n, 4, H/8, W/8), fp32 on the CPU, multiplied by `vae.config.scaling_factor`.

        The mean of the posterior, not a sample of it, so that a picture has one latent that can be kept.
        """
        import torch
        from diffusers.image_processor import VaeImageProcessor

        processor = VaeImageProcessor(vae_scale_factor=self.resolution // self.latent_size, do_convert_rgb=True)
        latents = []
        with torch.inference_mode():
            for start in range(0, len(images), batch_size):
                pixels = processor.preprocess(list(images[start : start + batch_size]))
                posterior: Any = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype))
                latents.append(posterior.latent_dist.mean.float().cpu() * self.vae.config["scaling_factor"])
        return torch.cat(latents).clone()

    def decode_latents(self, latents: torch.Tensor, batch_size: int = 64) -> list[Image.Image]:
        """Pictures of scaled latents (n, 4, h, w)."""
        import torch
        from diffusers.image_processor import VaeImageProcessor

        processor = VaeImageProcessor(vae_scale_factor=self.resolution // self.latent_size)
        images: list[Image.Image] = []
        with torch.inference_mode():
            for batch in (latents / self.vae.config["scaling_factor"]).split(batch_size):
                decoded: Any = self.vae.decode(batch.to(self.vae.device, self.vae.dtype))
                images += processor.postprocess(decoded.sample)  # type: ignore[operator]  # a list by default
        return images

    def encode_prompts(self, prompts: Sequence[str], batch_size: int = 256) -> torch.Tensor:
        """Hidden states of the text encoder: (n, tokens, width), fp32 on the CPU; long prompts are cut."""
        import torch

        states = []
        with torch.inference_mode():
            for start in range(0, len(prompts), batch_size):
                batch = list(prompts[start : start + batch_size])
                tokens = self.tokenizer(batch, padding="max_length", truncation=True, return_tensors="pt")
                ids = tokens.input_ids.to(self.text_encoder.device)
                states.append(self.text_encoder(ids).last_hidden_state.float().cpu())
        return torch.cat(states).clone()

    def truncated(self, prompts: Sequence[str]) -> list[str]:
        """Those of the prompts that have more tokens than the text encoder reads."""
        lengths = [len(ids) for ids in self.tokenizer(list(prompts)).input_ids]
        return [prompt for prompt, n in zip(prompts, lengths, strict=True) if n > self.tokenizer.model_max_length]

    def pipeline(self) -> StableDiffusionPipeline:
        """A diffusers pipeline on these very parts, adapters included; nothing is copied."""
        from diffusers import StableDiffusionPipeline

        return StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=self.noise_scheduler,  # type: ignore[arg-type]
            safety_checker=None,  # type: ignore[arg-type]
            feature_extractor=None,  # type: ignore[arg-type]
            requires_safety_checker=False,
        )


def quiet_libraries() -> None:
    """Keeps the progress bars of loading and remarks on parts that are not used here out of the way."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()


class Model:
    """Which base model to load.

    Args:
        name: the family; it names what the exported LoRAs say they were made for.
        path: diffusers folder with the weights; None takes the pipeline that ships with the package.
    """

    def __init__(self, name: Literal["tiny"] = "tiny", path: str | None = None):
        self.name = name
        self.path = TINY if path is None else Path(path).expanduser()
        if not (self.path / "model_index.json").is_file():
            raise UserError(f"model.path={path}: no diffusers pipeline there (a folder with a model_index.json)")
        missing = [part for part in PARTS if not (self.path / part).is_dir()]
        if missing:
            raise UserError(f"model.path={path} lacks {', '.join(missing)}: copy the whole pipeline folder")

    def fingerprint(self) -> str:
        """Hash of the files with weights, settings and vocabulary: 16 hexadecimal digits."""
        digest = hashlib.sha256()
        for file in sorted(self.path.rglob("*")):
            if file.suffix in (".safetensors", ".bin", ".json", ".txt"):
                digest.update(file.relative_to(self.path).as_posix().encode())
                digest.update(file.read_bytes())
        return digest.hexdigest()[:16]

    def load(self, weights: Literal["float32", "bfloat16", "float16"] = "float32") -> StableDiffusion:
        """Loads all parts, frozen, the UNet in the precision `weights` and the small parts in fp32.

        Raises:
            UserError: when a part cannot be loaded, or the UNet predicts neither noise nor velocity.
        """
        import torch
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
        from safetensors import SafetensorError
        from transformers import CLIPTextModel, CLIPTokenizer

        quiet_libraries()

        def part(cls: Any, name: str, **how: Any) -> Any:
            try:
                config = json.loads((self.path / name / "config.json").read_text()) if how else {}
                if config.get("_class_name", cls.__name__) != cls.__name__:
                    raise ValueError(f"it is a {config['_class_name']}, not a {cls.__name__}")
                return cls.from_pretrained(self.path / name, local_files_only=True, **how)
            except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise UserError(f"{self.path / name} cannot be loaded: {reason}") from error

        def network(cls: Any, name: str, dtype: torch.dtype = torch.float32) -> Any:
            return part(cls, name, torch_dtype=dtype).eval().requires_grad_(False)

        noise_scheduler: Any = part(DDPMScheduler, "scheduler")
        prediction_type = noise_scheduler.config["prediction_type"]
        if prediction_type not in ("epsilon", "v_prediction"):
            raise UserError(f"{self.path} predicts {prediction_type!r}: only epsilon and v_prediction can be trained")
        return StableDiffusion(
            name=self.name,
            unet=network(UNet2DConditionModel, "unet", getattr(torch, weights)),
            vae=network(AutoencoderKL, "vae"),
            text_encoder=network(CLIPTextModel, "text_encoder"),
            tokenizer=part(CLIPTokenizer, "tokenizer"),
            noise_scheduler=noise_scheduler,
            fingerprint=self.fingerprint(),
        )
