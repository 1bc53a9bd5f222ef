"""Prepared pairs, and the order in which a training run visits them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from dpo_sd import noise
from dpo_sd.models.stable_diffusion import TextEmbeds


class Tensors(Protocol):
    """A sequence of tensors, in memory or on disk."""

    def __getitem__(self, row: int, /) -> Tensor: ...

    def __len__(self) -> int: ...


class Pictures(Protocol):
    """One picture of each sample, as the training step takes it."""

    def read(self, row: int, flip: bool, where: tuple[float, float]) -> tuple[Tensor, Tensor]:
        """The picture and what SDXL is told of its size.

        Args:
            row: of the sample.
            flip: mirrors it.
            where: how far right and down the part lies that is cut out, each in [0, 1].

        Returns:
            Latents (4, h/8, w/8), scaled, or pixels (3, h, w) as uint8 that the step encodes; and time ids (6,), fp32.
        """
        ...


class Latents:
    """Pictures that are encoded already.

    Args:
        latents: scaled; where there are mirrored ones they follow all others.
        time_ids: (n, 6), int32, one row per sample.
    """

    def __init__(self, latents: Tensors, time_ids: np.ndarray):
        self.latents, self.time_ids = latents, time_ids

    def read(self, row: int, flip: bool, where: tuple[float, float]) -> tuple[Tensor, Tensor]:
        latents = self.latents[row + len(self.time_ids) * flip]
        return latents.float(), torch.from_numpy(self.time_ids[row]).float()


class Prompts:
    """The text of each sample.

    Args:
        texts: prompts, each once.
        row: which of them each sample has, (n,), int.
        hidden, pooled: what the text encoders make of `texts` and, as the last one, of the empty prompt; None where
            the step asks the text encoders itself. `pooled` is SDXL's alone.
    """

    def __init__(self, texts: Sequence[str], row: np.ndarray, hidden: Tensors | None, pooled: Tensors | None = None):
        self.texts, self.row, self.hidden, self.pooled = texts, row, hidden, pooled

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, sample: int) -> str:
        return self.texts[int(self.row[sample])]

    def embeds(self, sample: int, dropped: bool) -> TextEmbeds | None:
        """What the text encoders make of a sample's prompt, or of the empty one where it is dropped."""
        if self.hidden is None:
            return None
        row = len(self.texts) if dropped else int(self.row[sample])
        return TextEmbeds(self.hidden[row].float(), None if self.pooled is None else self.pooled[row].float())


@dataclass(frozen=True)
class PreparedSamples:
    """A dataset as the training step takes it.

    Args:
        chosen: the better picture of each pair, or single pictures.
        rejected: the worse ones; None for single pictures.
        prompts: their texts.
        label: P(chosen is better), (n,), fp32, in [0.5, 1].
        weight: share of each sample in the loss, (n,), fp32, 1 on average.
        sample_ids: content ids that key the randomness, (n,), int64, one per sample.
        sizes: number of each sample's size, (n,); None where all are of one.
        flip: mirrors half of the visits.
        random_crop: cuts another part out at every visit.
        vary: makes another text of a prompt at every visit, given a generator; None leaves it as it is.
        content_ids: of prompts and pictures, chosen and rejected in their order, (n,), int64: what is computed from
            them may be kept under these; None where `sample_ids` are such.
    """

    chosen: Pictures
    rejected: Pictures | None
    prompts: Prompts
    label: np.ndarray
    weight: np.ndarray
    sample_ids: np.ndarray
    sizes: np.ndarray | None = None
    flip: bool = False
    random_crop: bool = False
    vary: Callable[[str, np.random.Generator], str] | None = None
    content_ids: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.sample_ids)

    @property
    def contents(self) -> np.ndarray:
        """`content_ids`, or the `sample_ids` where they are such."""
        return self.sample_ids if self.content_ids is None else self.content_ids

    @property
    def fingerprint(self) -> str:
        """Hash of the samples, their pictures, prompts, labels and weights: 16 hexadecimal digits."""
        hashed = hashlib.sha256(repr((self.flip, self.random_crop)).encode())
        for column in (self.sample_ids, self.contents, self.label, self.weight):
            hashed.update(np.ascontiguousarray(column).tobytes())
        for sample in range(len(self)):
            hashed.update(self.prompts[sample].encode("utf-8", "surrogatepass") + b"\0")
        return hashed.hexdigest()[:16]


class Visit(NamedTuple):
    """One sample at one visit.

    Args:
        chosen, rejected: as `Pictures.read` gives them; of single pictures there are no rejected ones.
        chosen_time_ids, rejected_time_ids: (6,), see there.
        prompt: its text; "" where the caption was dropped.
        embeds: what the text encoders make of it; None where the step asks them itself.
        noise: (4, h, w), standard normal, shared by chosen and rejected.
        timestep: shared by chosen and rejected.
        label, weight: of the sample.
        index: row of the sample in its dataset.
        draw: number of the visit, from 0.
    """

    chosen: Tensor
    rejected: Tensor | None
    chosen_time_ids: Tensor
    rejected_time_ids: Tensor | None
    prompt: str
    embeds: TextEmbeds | None
    noise: Tensor
    timestep: int
    label: float
    weight: float
    index: int
    draw: int


class Batch(NamedTuple):
    """Samples of one size, which one pass of the UNet takes together.

    Args:
        chosen, rejected: latents, (pairs, 4, h, w), scaled, or pixels, (pairs, 3, h, w), uint8, for the step to encode;
            of single pictures there are no rejected ones.
        chosen_time_ids, rejected_time_ids: (pairs, 6), what SDXL is told of sizes.
        prompts: their texts.
        embeds: what the text encoders make of them; None where the step asks them itself.
        noise: (pairs, 4, h, w), standard normal, shared by chosen and rejected.
        timesteps: (pairs,), int64, shared by chosen and rejected.
        label: P(chosen is better), (pairs,).
        weight: share of each pair in the loss, (pairs,).
        index, draw: row of each pair in its dataset and number of the visit; for the host, never on the device.
    """

    chosen: Tensor
    rejected: Tensor | None
    chosen_time_ids: Tensor
    rejected_time_ids: Tensor | None
    prompts: list[str]
    embeds: TextEmbeds | None
    noise: Tensor
    timesteps: Tensor
    label: Tensor
    weight: Tensor
    index: list[int]
    draw: list[int]


class Visits(Dataset):
    """Sample `index` at its `draw`-th visit, with the noise, timestep, caption dropout, crop and flip of that visit.

    Args:
        factor: pixels along one side of a latent pixel.
        draws_per_pair: after so many visits a sample is seen again as at its first one, noise, timestep and all; None
            makes every visit a new one.
        timesteps: None draws them uniformly from the schedule; otherwise the grid on which visit k takes entry k, and
            captions, crops and flips stay as they are.
    """

    def __init__(
        self,
        samples: PreparedSamples,
        seed: int,
        num_train_timesteps: int,
        factor: int = 8,
        caption_dropout: float = 0.0,
        draws_per_pair: int | None = None,
        timesteps: list[int] | None = None,
    ):
        still = timesteps is not None
        self.samples = replace(samples, flip=False, random_crop=False, vary=None) if still else samples
        self.seed, self.num_train_timesteps, self.factor = seed, num_train_timesteps, factor
        self.caption_dropout, self.draws_per_pair, self.timesteps = caption_dropout, draws_per_pair, timesteps

    def __getitem__(self, visit: tuple[int, int]) -> Visit:
        index, draw = visit
        if self.draws_per_pair is not None:
            draw %= self.draws_per_pair
        samples, key = self.samples, (self.seed, int(self.samples.sample_ids[index]), draw)
        dropped = self.caption_dropout > 0 and noise.uniform(*key, "caption") < self.caption_dropout
        flip = samples.flip and noise.uniform(*key, "flip") < 0.5
        where = (0.5, 0.5)
        if samples.random_crop:
            right, down = noise.generator(*key, "crop").random(2)
            where = (float(right), float(down))
        chosen, chosen_time_ids = samples.chosen.read(index, flip, where)
        rejected, rejected_time_ids = samples.rejected.read(index, flip, where) if samples.rejected else (None, None)
        prompt = "" if dropped else samples.prompts[index]
        if samples.vary is not None and not dropped:
            prompt = samples.vary(prompt, noise.generator(*key, "text"))
        shape = chosen.shape if chosen.is_floating_point() else (4, *(side // self.factor for side in chosen.shape[1:]))
        return Visit(
            chosen=chosen,
            rejected=rejected,
            chosen_time_ids=chosen_time_ids,
            rejected_time_ids=rejected_time_ids,
            prompt=prompt,
            embeds=samples.prompts.embeds(index, dropped),
            noise=torch.from_numpy(noise.noise(*key, shape)),
            timestep=(
                noise.timestep(*key, self.num_train_timesteps) if self.timesteps is None else self.timesteps[draw]
            ),
            label=float(samples.label[index]),
            weight=float(samples.weight[index]),
            index=index,
            draw=draw,
        )


def stack(visits: list[Visit]) -> list[Batch]:
    """The visits of a micro-batch, those of one size together: one batch where all have the same size."""
    by_size: dict[tuple[int, ...], list[Visit]] = {}
    for visit in visits:
        by_size.setdefault(tuple(visit.chosen.shape), []).append(visit)
    return [_batch(members) for members in by_size.values()]


def _batch(visits: list[Visit]) -> Batch:
    def column(name: str) -> list:
        return [getattr(visit, name) for visit in visits]

    def stacked(name: str) -> Tensor | None:
        return None if getattr(visits[0], name) is None else torch.stack(column(name))

    embeds = None
    if visits[0].embeds is not None:
        hidden, pooled = zip(*column("embeds"), strict=True)
        embeds = TextEmbeds(torch.stack(hidden), None if pooled[0] is None else torch.stack(pooled))
    return Batch(
        chosen=torch.stack(column("chosen")),
        rejected=stacked("rejected"),
        chosen_time_ids=torch.stack(column("chosen_time_ids")),
        rejected_time_ids=stacked("rejected_time_ids"),
        prompts=column("prompt"),
        embeds=embeds,
        noise=torch.stack(column("noise")),
        timesteps=torch.tensor(column("timestep")),
        label=torch.tensor(column("label")),
        weight=torch.tensor(column("weight")),
        index=column("index"),
        draw=column("draw"),
    )


class UpdateOrder(Sampler[list[tuple[int, int]]]):
    """Micro-batches of visits in the order of training: a function of the position, so that a run resumes anywhere.

    The run visits the samples in an endless row of permutations; update u takes the next `pairs_per_update` of them,
    whatever the micro-batch and the number of devices. Within an update those of one size stand together, which leaves
    its gradient as it is and lets most micro-batches be one pass.

    Args:
        n: samples in the dataset.
        updates: the updates to go through.
        micro_batch: samples per micro-step on one device; `world_size * micro_batch` divides `pairs_per_update`.
        sizes: number of each sample's size, (n,); None where all are of one.
        rank: which device of `world_size` this is.
    """

    def __init__(
        self,
        n: int,
        seed: int,
        updates: range,
        pairs_per_update: int,
        micro_batch: int,
        sizes: np.ndarray | None = None,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.n, self.seed, self.updates, self.pairs_per_update = n, seed, updates, pairs_per_update
        self.micro_batch, self.sizes, self.rank, self.world_size = micro_batch, sizes, rank, world_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, permutation = -1, np.empty(0, int)
        for update in self.updates:
            visits = []
            for position in range(update * self.pairs_per_update, (update + 1) * self.pairs_per_update):
                if position // self.n != epoch:
                    epoch = position // self.n
                    permutation = noise.order(self.seed, epoch, self.n)
                visits.append((int(permutation[position % self.n]), epoch))
            if self.sizes is not None:
                visits.sort(key=lambda visit: self.sizes[visit[0]])  # type: ignore[index]
            for start in range(self.rank, self.pairs_per_update // self.micro_batch, self.world_size):
                yield visits[start * self.micro_batch : (start + 1) * self.micro_batch]
