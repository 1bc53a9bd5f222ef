"""Prepared samples, their visits with noise and timestep, and the order in which a training run visits them."""

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
from dpo_sd.data.samples import ImageFiles
from dpo_sd.errors import UserError
from dpo_sd.models.stable_diffusion import TextEmbeds
from dpo_sd.noise import Noising


class Tensors(Protocol):
    """A sequence of tensors, in memory or on disk."""

    def __getitem__(self, row: int, /) -> Tensor: ...

    def __len__(self) -> int: ...


class Images(Protocol):
    """One image of each sample, as the training step takes it."""

    def read(self, row: int, flip: bool, where: tuple[float, float]) -> tuple[Tensor, Tensor]:
        """The image of one sample, with the time ids by which SDXL knows its size.

        Args:
            row: number of the sample.
            flip: True mirrors the image.
            where: position of the crop, from left and top (0) to right and bottom (1).

        Returns:
            Latents (4, h/8, w/8), scaled, or pixels (3, h, w) as uint8 that the step encodes; and time ids (6,), fp32.
        """
        ...


class PixelWeights(Protocol):
    """How much each latent pixel of a sample counts in its error."""

    @property
    def files(self) -> ImageFiles: ...

    def read(self, row: int, flip: bool, where: tuple[float, float]) -> Tensor:
        """Weights, (1, h/8, w/8), fp32, at least 0; the arguments are those of `Images.read`."""
        ...


class Latents:
    """Images that are encoded already.

    Args:
        latents: n latents, (4, h/8, w/8), scaled, in the order of the samples; or 2·n, the mirrored ones following.
        time_ids: (n, 6) or (2·n, 6), int32, one row per latent.
    """

    def __init__(self, latents: Tensors, time_ids: np.ndarray):
        self.latents, self.time_ids = latents, time_ids

    def read(self, row: int, flip: bool, where: tuple[float, float]) -> tuple[Tensor, Tensor]:
        place = row + len(self.latents) // 2 * flip  # the mirrored image of sample i is number n + i
        return self.latents[place].float(), torch.from_numpy(self.time_ids[place]).float()


class Prompts:
    """The prompt of each sample, with its embeddings.

    Args:
        texts: prompts, each once.
        row: (n,), int, number of each sample's prompt in `texts`.
        hidden, pooled: embeddings of `texts` and, as the last one, of the empty prompt; None where the step runs the
            text encoders itself. Only SDXL has `pooled`.
    """

    def __init__(self, texts: Sequence[str], row: np.ndarray, hidden: Tensors | None, pooled: Tensors | None = None):
        self.texts, self.row, self.hidden, self.pooled = texts, row, hidden, pooled

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, sample: int) -> str:
        return self.texts[int(self.row[sample])]

    def embeds(self, sample: int, dropped: bool) -> TextEmbeds | None:
        """Embeddings of a sample's prompt, or of the empty one where it is dropped; None where the step makes them."""
        if self.hidden is None:
            return None
        row = len(self.texts) if dropped else int(self.row[sample])
        return TextEmbeds(self.hidden[row].float(), None if self.pooled is None else self.pooled[row].float())


@dataclass(frozen=True)
class PreparedSamples:
    """A dataset as the training step takes it.

    Args:
        chosen: the better image of each pair, or single images.
        rejected: the worse image of each pair; None for single images.
        prompts: texts of the samples.
        label: (n,), fp32, P(chosen is better), in [0.5, 1].
        weight: (n,), fp32, weight of each sample in the loss, 1 on average.
        sample_ids: (n,), int64, content ids that key the randomness.
        sizes: (n,), number of each sample's image size; None where all images have one size.
        flip: True mirrors half of the visits.
        random_crop: True cuts out another part at every visit.
        vary: makes another text of a prompt at every visit, given a generator; None leaves it as it is.
        content_ids: (n,), int64, hashes of prompt, chosen and rejected image in this order, under which results that
            depend on these alone may be kept; None where `sample_ids` are such hashes.
        masks: weights of the pixels of single images; None weighs all alike.
    """

    chosen: Images
    rejected: Images | None
    prompts: Prompts
    label: np.ndarray
    weight: np.ndarray
    sample_ids: np.ndarray
    sizes: np.ndarray | None = None
    flip: bool = False
    random_crop: bool = False
    vary: Callable[[str, np.random.Generator], str] | None = None
    content_ids: np.ndarray | None = None
    masks: PixelWeights | None = None

    def __len__(self) -> int:
        return len(self.sample_ids)

    @property
    def contents(self) -> np.ndarray:
        """`content_ids`, or `sample_ids` where these are such hashes: (n,), int64."""
        return self.sample_ids if self.content_ids is None else self.content_ids

    @property
    def fingerprint(self) -> str:
        """Hash of the samples with their images, prompts, labels and weights: 16 hexadecimal digits."""
        hashed = hashlib.sha256(repr((self.flip, self.random_crop)).encode())
        for column in (self.sample_ids, self.contents, self.label, self.weight):
            hashed.update(np.ascontiguousarray(column).tobytes())
        if self.masks is not None:
            hashed.update(self.masks.files.sha256.tobytes())
        for sample in range(len(self)):
            hashed.update(self.prompts[sample].encode("utf-8", "surrogatepass") + b"\0")
        return hashed.hexdigest()[:16]


class Visit(NamedTuple):
    """One pair or single image at one visit.

    Args:
        chosen, rejected: images as `Images.read` gives them; `rejected` is None for single images.
        chosen_time_ids, rejected_time_ids: (6,), fp32, time ids as `Images.read` gives them.
        prompt: text of the sample; "" where the caption was dropped.
        embeds: embeddings of the prompt; None where the step runs the text encoders itself.
        noise: (4, h, w), standard normal, shared by chosen and rejected.
        timestep: number in the noise schedule, shared by chosen and rejected.
        label, weight: label and weight of the sample, as in `PreparedSamples`.
        index: row of the sample in its dataset.
        draw: number of the visit, from 0; modulo draws_per_pair.
        mask: (1, h, w), weights of the latent pixels; None weighs all alike.
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
    mask: Tensor | None


class Batch(NamedTuple):
    """Pairs, or single images, of one size, which one pass of the UNet takes together.

    Args:
        chosen, rejected: latents, (n, 4, h, w), scaled, or pixels, (n, 3, h, w), uint8, for the step to encode;
            single images are `chosen`, and `rejected` is None.
        chosen_time_ids, rejected_time_ids: (n, 6), the sizes that SDXL is told.
        prompts: texts of the samples.
        embeds: embeddings of the prompts; None where the step runs the text encoders itself.
        noise: (n, 4, h, w), standard normal, shared by chosen and rejected.
        timesteps: (n,), int64, shared by chosen and rejected.
        label: (n,), P(chosen is better), in [0.5, 1].
        weight: (n,), weight of each sample in the loss, 1 on average over the dataset.
        index, draw: row of each sample in its dataset, and number of the visit; they stay on the host.
        mask: (n, 1, h, w), weights of the latent pixels of single images; None weighs all alike.
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
    mask: Tensor | None = None


class Visits(Dataset):
    """Sample `index` at its `draw`-th visit, with the noise, timestep, caption dropout, crop and flip of that visit.

    Args:
        factor: pixels along one side of a latent pixel.
        draws_per_pair: number of visits after which those of a sample repeat, noise, timestep and all; None makes
            every visit a new one.
        timesteps: fixed grid, whose entry k visit k takes, with captions, crops and flips left as they are; None draws
            timesteps from the schedule.
        noising: how noise and timesteps are drawn; None draws them as in the paper.

    Raises:
        UserError: if the data makes other texts than a cache holds, or the schedule has no such timesteps.
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
        noising: Noising | None = None,
    ):
        still = timesteps is not None
        if samples.vary is not None and samples.prompts.hidden is not None and not still:
            raise UserError(
                "the data makes another text of a prompt at every visit, which no cache holds: add cache=latents"
            )
        self.samples = replace(samples, flip=False, random_crop=False, vary=None) if still else samples
        self.seed, self.num_train_timesteps, self.factor = seed, num_train_timesteps, factor
        self.caption_dropout, self.draws_per_pair, self.timesteps = caption_dropout, draws_per_pair, timesteps
        self.noising = Noising() if noising is None else noising
        self.noising.check(num_train_timesteps)

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
            noise=torch.from_numpy(self.noising.noise(*key, shape)),
            timestep=(
                self.noising.timestep(*key, self.num_train_timesteps)
                if self.timesteps is None
                else self.timesteps[draw]
            ),
            label=float(samples.label[index]),
            weight=float(samples.weight[index]),
            index=index,
            draw=draw,
            mask=None if samples.masks is None else samples.masks.read(index, flip, where),
        )


def stack(visits: list[Visit]) -> list[Batch]:
    """Batches of the visits of a micro-batch, one for each size of image in it."""
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
        mask=stacked("mask"),
    )


class UpdateOrder(Sampler[list[tuple[int, int]]]):
    """Micro-batches of visits in the order of training: a function of the position, so that a run resumes anywhere.

    The run is one long row of visits, a new permutation of the n samples in every epoch. Position p of the row is
    place p mod n of epoch p div n, and update u holds the positions from u · pairs_per_update up to the next update's,
    whatever the micro-batch and the number of devices. Within an update the visits of one size stand together, which
    leaves its gradient as it is and lets most micro-batches be one pass; micro-batch m of it belongs to the device
    m mod world_size.

    Args:
        n: samples in the dataset.
        seed: seed of the permutations.
        updates: numbers of the updates to go through, from 0.
        pairs_per_update: samples per update, on all devices together.
        micro_batch: samples per micro-step on one device; `world_size * micro_batch` divides `pairs_per_update`.
        sizes: (n,), number of each sample's image size; None where all images have one size.
        rank: number of this device, in [0, world_size).
        world_size: number of devices.
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
