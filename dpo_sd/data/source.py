"""The contract of a source of training data, and what it hands over."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from dpo_sd.errors import UserError

if TYPE_CHECKING:
    from dpo_sd.data.batches import PreparedSamples
    from dpo_sd.data.cache import Cache
    from dpo_sd.data.frames import Framing
    from dpo_sd.models.sampling import Sampler
    from dpo_sd.models.stable_diffusion import StableDiffusion


class Source(Protocol):
    """A group `data`: where pictures and captions come from.

    Its constructor finds out what there is and says what is wrong with it, before any weights load.

    Args:
        has_pairs: whether there are rejected pictures beside the chosen ones.
        caption_dropout: share of visits that train on the empty prompt, in [0, 1].
        labeller: name of the judge that labelled the pairs; None for people, or where nobody did.
    """

    has_pairs: ClassVar[bool]
    caption_dropout: float
    labeller: str | None

    def prepare(self, model: StableDiffusion, sampler: Sampler, framing: Framing, cache: Cache) -> PreparedData:
        """Draws or reads, encodes and keeps what the training will need."""
        ...


@dataclass(frozen=True)
class Found:
    """Everything that a source has found, before anything is decoded, drawn or encoded.

    Args:
        train: training samples; the most there can be where that is not known exactly; None where nobody knows.
        validation: validation samples.
        both: samples of the two together, which may be the same.
        prompts: the different prompts where they are known, otherwise the most there can be.
        report: which samples are used and which are left out, one line each.
        drawn: images that the model will draw for the run.
        fetched: whether the dataset is on this computer.
        kept: whether latents and prompts are kept in the cache folder.
    """

    train: int | None
    validation: int
    both: int
    prompts: Sequence[str] | int
    report: list[str]
    drawn: int = 0
    fetched: bool = True
    kept: bool = True


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


def checked_dropout(caption_dropout: float) -> float:
    if not 0 <= caption_dropout <= 1:
        raise UserError(f"caption_dropout must be between 0 and 1, got {caption_dropout}")
    return caption_dropout
