"""The contract of a source of training data, and the data that it hands to training."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from dpo_sd.errors import UserError

if TYPE_CHECKING:
    from dpo_sd.data.batches import PreparedSamples
    from dpo_sd.data.cache import Cache
    from dpo_sd.data.frames import Framing
    from dpo_sd.models.sampling import Sampler
    from dpo_sd.models.stable_diffusion import StableDiffusion


@dataclass(frozen=True)
class Found:
    """Amount of data that a source has found, before anything is decoded, drawn or encoded.

    Args:
        train: samples for training; the most there can be where that is not known exactly, None where nobody knows.
        validation: samples of the validation grid.
        both: different samples of the two together; a grid may be of training samples.
        prompts: the different prompts where they are known, otherwise the most there can be.
        held_out: prompts for sample sheets and the verdict, where they are known.
        report: what is used and what is left out, one line each.
        drawn: images that the model will draw for the run.
        fetched: whether everything is in files; False where a dataset is still to be fetched, or read.
        cached: whether latents and prompts will be kept in the cache folder; False where they stay in memory.
    """

    train: int | None
    validation: int
    both: int
    prompts: Sequence[str] | int
    report: list[str]
    held_out: Sequence[str] = ()
    drawn: int = 0
    fetched: bool = True
    cached: bool = True


class Source:
    """Base class of the group `data`: where images and captions come from.

    Its life: the constructor checks values, `find` looks, `check` refuses a model, `prepare` encodes. `find` comes
    before any weights load, so that data of no use costs a second.

    Args:
        has_pairs: whether there are rejected images beside the chosen ones.
        fixed_resolution: side in pixels of images that have one size and may not be cropped or mirrored; None for
            any size.
        caption_dropout: share of visits that train on the empty prompt, in [0, 1].
        labeller: name of the judge that labelled the pairs; None for people, and for single images.
        commit: the commit of the repository that the images come from, known once they are fetched; None for others.
    """

    has_pairs: ClassVar[bool]
    fixed_resolution: ClassVar[int | None] = None
    caption_dropout: float = 0.0
    labeller: str | None = None
    commit: str | None = None

    def check(self, model: StableDiffusion) -> None:
        """Refuses a model that cannot be trained on this data.

        Args:
            model: perhaps without weights, on the `meta` device.

        Raises:
            UserError: if it cannot.
        """

    def find(self, cache: Cache, fetch: bool) -> Found:
        """Finds out how much data there is.

        Args:
            cache: where a dataset is kept once it is fetched.
            fetch: fetches what is missing into the cache; otherwise nothing is written and no network is asked.

        Raises:
            UserError: if there is no data, or none that can be used.
        """
        raise NotImplementedError(f"{type(self).__name__} has no find(cache, fetch)")

    def prepare(self, model: StableDiffusion, sampler: Sampler, framing: Framing, cache: Cache) -> PreparedData:
        """Reads or draws the images, and encodes what the cache does not hold yet.

        Args:
            model: with its weights and adapters.
            sampler: how images are drawn.
            framing: how images are brought to size.

        Raises:
            UserError: as `find`, and if no image can be read to its end or the disk is full.
        """
        raise NotImplementedError(f"{type(self).__name__} has no prepare(model, sampler, framing, cache)")

    def drawn_with(self) -> list[dict[str, Any]] | None:
        """The LoRAs that drew the images: path, weight and sha256 of each; None where they come from elsewhere."""
        return None


@dataclass(frozen=True)
class PreparedData:
    """The data of a run, as training takes it.

    Args:
        train, validation: samples with disjoint prompts or, of single images, with disjoint images.
        held_out_prompts: prompts for sample sheets and the verdict, which are not among those of `train` unless all
            are.
        report: what is used and what is left out, one line each.
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
    """The share itself.

    Raises:
        UserError: if it is not in [0, 1].
    """
    if not 0 <= caption_dropout <= 1:
        raise UserError(f"caption_dropout must be between 0 and 1, got {caption_dropout}")
    return caption_dropout
