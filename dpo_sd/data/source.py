"""What a source of training data hands over, and what it needs of a model for that."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from dpo_sd.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

    from dpo_sd.data.batches import EncodedPairs
    from dpo_sd.models import StableDiffusion
    from dpo_sd.sampling import Sampler


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


class Source(Protocol):
    """A group `data`: where pictures and captions come from.

    Args:
        has_pairs: whether there are rejected pictures beside the chosen ones.
        caption_dropout: share of visits that train on the empty prompt, in [0, 1].
        judge: of the verdict; None where nobody can judge without people.
    """

    has_pairs: ClassVar[bool]
    caption_dropout: float
    judge: Judge | None

    def prepare(self, model: StableDiffusion, sampler: Sampler, cache_dir: Path) -> PreparedData: ...


@dataclass(frozen=True)
class PreparedData:
    """What a source hands to training.

    Args:
        train, validation: encoded samples with disjoint prompts.
        held_out_prompts: not among those of `train`: for sample sheets and the verdict.
        report: what was used and what was not, one line each.
    """

    train: EncodedPairs
    validation: EncodedPairs
    held_out_prompts: list[str]
    report: list[str]

    @property
    def fingerprint(self) -> str:
        """Hash of the samples and their labels: 16 hexadecimal digits."""
        parts = (self.train, self.validation)
        known = [(p.sample_ids, p.prompts, p.label.tolist(), p.weight.tolist()) for p in parts]
        digest = hashlib.sha256(repr(known).encode())
        digest.update(self.train.chosen.numpy().tobytes())
        return digest.hexdigest()[:16]


def encode(
    model: StableDiffusion,
    prompts: Sequence[str],
    chosen: Sequence[Image.Image],
    rejected: Sequence[Image.Image] | None,
    sample_ids: Sequence[int],
    label: Sequence[float] | None = None,
    weight: Sequence[float] | None = None,
) -> EncodedPairs:
    """Pictures and prompts as the UNet sees them.

    Args:
        prompts, chosen, rejected, sample_ids: one of each per sample; single pictures have no rejected ones.
        label: P(chosen is better) of each, in [0.5, 1]; None means 1.
        weight: share of each in the loss, positive, scaled here to 1 on average; None means equal.
    """
    import torch

    from dpo_sd.data.batches import EncodedPairs

    n, unique = len(prompts), sorted(set(prompts))
    embeds = model.encode_prompts([*unique, ""])
    place = {prompt: row for row, prompt in enumerate(unique)}
    weights = torch.ones(n) if weight is None else torch.tensor(weight)
    return EncodedPairs(
        chosen=model.encode_images(chosen),
        rejected=None if rejected is None else model.encode_images(rejected),
        prompt_embeds=embeds[[place[prompt] for prompt in prompts]],
        empty_embeds=embeds[-1],
        label=torch.ones(n) if label is None else torch.tensor(label),
        weight=weights / weights.mean(),
        sample_ids=list(sample_ids),
        prompts=list(prompts),
    )


def checked_dropout(caption_dropout: float) -> float:
    if not 0 <= caption_dropout <= 1:
        raise UserError(f"caption_dropout must be between 0 and 1, got {caption_dropout}")
    return caption_dropout


def too_long(model: StableDiffusion, prompts: Sequence[str]) -> Iterator[str]:
    """A line for the report where prompts are longer than the text encoder reads."""
    if long := model.truncated(prompts):
        named = ", ".join(repr(prompt) for prompt in long[:5])
        limit = model.tokenizer.model_max_length
        yield f"{len(long)} prompts are cut at the text encoder's limit of {limit} tokens: {named}"
