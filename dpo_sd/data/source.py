"""What a source of training data hands over, and where what is made of it is kept."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from dpo_sd.errors import UserError

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from dpo_sd.data.batches import PreparedSamples, Prompts
    from dpo_sd.data.framing import Framing
    from dpo_sd.data.store import TensorStore
    from dpo_sd.models import StableDiffusion
    from dpo_sd.sampling import Sampler

Keep = Literal["all", "latents", "off"]


class Judge(Protocol):
    """Who says which of two pictures is better, once the training is over."""

    @property
    def name(self) -> str: ...

    def judge(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """How good each picture is; higher is better."""
        ...

    def properties(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, list[float]]:
        """Scores of each picture by name, each in [0, 1]: what must not fall while the judged quality rises."""
        ...


@dataclass(frozen=True)
class Cache:
    """Where encoded pictures and prompts are kept, by content, for all runs.

    Args:
        folder: of the cache.
        keep: "all" encodes pictures and prompts once; "latents" encodes prompts at every step, which training the text
            encoder and varied captions need; "off" encodes pictures at every step too, which random crops need.
        half: keeps tensors in half precision instead of single.
    """

    folder: Path
    keep: Keep = "all"
    half: bool = False

    def store(self, what: str) -> TensorStore:
        """The part of the cache for latents, or for prompts.

        Args:
            what: its name, the precision of the tensors is added to it.
        """
        import torch

        from dpo_sd.data.store import TensorStore

        dtype = torch.float16 if self.half else torch.float32
        return TensorStore(self.folder / f"{what}-{'fp16' if self.half else 'fp32'}", dtype)


class Source(Protocol):
    """A group `data`: where pictures and captions come from.

    Its constructor finds out what there is and says what is wrong with it, before any weights load.

    Args:
        has_pairs: whether there are rejected pictures beside the chosen ones.
        caption_dropout: share of visits that train on the empty prompt, in [0, 1].
        judge: of the verdict; None where nobody can judge without people.
    """

    has_pairs: ClassVar[bool]
    caption_dropout: float
    judge: Judge | None

    def prepare(self, model: StableDiffusion, sampler: Sampler, framing: Framing, cache: Cache) -> PreparedData:
        """Draws or reads, encodes and keeps what the training will need."""
        ...


@dataclass(frozen=True)
class PreparedData:
    """What a source hands to training.

    Args:
        train, validation: samples with disjoint prompts, or of single pictures with disjoint pictures.
        held_out_prompts: not among those of `train`, unless all prompts are: for sample sheets and the verdict.
        report: what was used and what was not, one line each.
    """

    train: PreparedSamples
    validation: PreparedSamples
    held_out_prompts: list[str]
    report: list[str]

    @property
    def fingerprint(self) -> str:
        """Hash of the samples and their labels: 16 hexadecimal digits."""
        return hashlib.sha256(f"{self.train.fingerprint} {self.validation.fingerprint}".encode()).hexdigest()[:16]


def encode_drawn(
    model: StableDiffusion,
    prompts: Sequence[str],
    chosen: Sequence[Image.Image],
    rejected: Sequence[Image.Image] | None,
    sample_ids: Sequence[int],
    keep: Keep,
) -> PreparedSamples:
    """Samples in memory, of pictures that were just drawn at the model's own size.

    Args:
        prompts, chosen, rejected, sample_ids: one of each per sample; single pictures have no rejected ones.
        keep: as in `Cache`; the pictures are encoded once in any case.
    """
    import numpy as np

    from dpo_sd.data.batches import Latents, PreparedSamples, Prompts
    from dpo_sd.noise import sample_id

    n, texts = len(prompts), sorted(set(prompts))
    place = {prompt: row for row, prompt in enumerate(texts)}
    hidden, pooled = model.encode_prompts([*texts, ""]) if keep == "all" else (None, None)
    side = model.resolution
    time_ids = np.tile(np.array([side, side, 0, 0, side, side], np.int32), (n, 1))
    pictures = zip(chosen, strict=True) if rejected is None else zip(chosen, rejected, strict=True)
    contents = [
        sample_id(text, *(each.tobytes() for each in pair)) for text, pair in zip(prompts, pictures, strict=True)
    ]
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
    """Latents of pictures of one size: (n, 4, h/8, w/8), fp32 on the CPU, scaled."""
    import numpy as np
    import torch

    latents = []
    with torch.inference_mode(), model.working(model.vae):
        for start in range(0, len(images), batch_size):
            batch = np.stack([np.asarray(image.convert("RGB")) for image in images[start : start + batch_size]])
            latents.append(encode_bytes(model, torch.from_numpy(batch).permute(0, 3, 1, 2)).float().cpu())
    return torch.cat(latents).clone()


def encode_bytes(model: StableDiffusion, pixels: torch.Tensor) -> torch.Tensor:
    """Latents of pixels (n, 3, h, w), uint8, where the VAE is and in its precision."""
    return model.encode_pixels(pixels.to(model.vae.device, model.vae.dtype) / 127.5 - 1)


def encode_texts(
    model: StableDiffusion, texts: Sequence[str], rows: Sequence[int], cache: Cache, report: list[str]
) -> Prompts:
    """Prompts with what the text encoders make of them, kept in the cache unless the step is to ask them itself.

    Args:
        texts: each once.
        rows: which of them each sample has.
        report: gets a line for what the cache held and cannot be read.
    """
    import numpy as np
    from tqdm import tqdm

    from dpo_sd.data.batches import Prompts
    from dpo_sd.data.store import content_key

    if cache.keep != "all":
        return Prompts(texts, np.asarray(rows), None)
    stores = [cache.store("hidden"), cache.store("pooled")] if model.is_xl else [cache.store("hidden")]
    wanted = [*texts, ""]
    encoder = [model.fingerprints.text, adapter_key(model, "policy", "text_encoder")]  # a LoRA may change it too
    keys = [content_key(kind="text 1", encoder=encoder, text=text) for text in wanted]
    lacking = np.any([store.lacks(keys) for store in stores], axis=0)
    todo = [(key, text) for key, text, lacks in zip(keys, wanted, lacking, strict=True) if lacks]
    with model.working(*model.text_encoders), tqdm(total=len(todo), desc="encoding prompts", disable=not todo) as bar:
        for start in range(0, len(todo), 64):
            part = todo[start : start + 64]
            embeds = model.encode_prompts([text for _, text in part])
            for store, tensors in zip(stores, (each for each in embeds if each is not None), strict=True):
                for (key, _), tensor in zip(part, tensors, strict=True):
                    store.put(key, tensor)
            bar.update(len(part))
    for store in stores:
        store.flush()
        report += store.notes
    hidden, *pooled = (store.rows(keys) for store in stores)
    return Prompts(texts, np.asarray(rows), hidden, pooled[0] if pooled else None)


def adapter_key(model: StableDiffusion, adapter: str, networks: str = "") -> str | None:
    """What tells adapters apart, by their weights and strengths: 16 hexadecimal digits; None where there is none.

    Args:
        adapter: its name.
        networks: beginning of the names of those that count; all by default.
    """
    from dpo_sd.lora import adapter_names, adapter_state

    if adapter not in adapter_names(model):
        return None
    digest = hashlib.sha256()
    for name, network in model.networks.items():
        config = getattr(network, "peft_config", {}).get(adapter)
        if config is not None and name.startswith(networks):
            patterns = sorted((config.rank_pattern or {}).items()), sorted((config.alpha_pattern or {}).items())
            digest.update(repr((name, config.r, config.lora_alpha, *patterns)).encode())
    states = {name: value for name, value in adapter_state(model, adapter).items() if name.startswith(networks)}
    for name, value in sorted(states.items()):
        digest.update(name.encode())
        digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()[:16] if states else None


def checked_dropout(caption_dropout: float) -> float:
    if not 0 <= caption_dropout <= 1:
        raise UserError(f"caption_dropout must be between 0 and 1, got {caption_dropout}")
    return caption_dropout


def too_long(model: StableDiffusion, prompts: Sequence[str]) -> Iterator[str]:
    """A line for the report where prompts are longer than the text encoder reads."""
    if long := model.truncated(prompts):
        named = ", ".join(repr(prompt[:100]) for prompt in long[:5])
        yield f"{len(long)} prompts are cut at the text encoder's limit of {model.max_tokens} tokens: {named}"
