"""Encoded pairs, and the order in which a training run visits them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from dpo_sd import noise


@dataclass(frozen=True)
class EncodedPairs:
    """A dataset as the UNet sees it.

    Args:
        chosen: latents of the better picture of each pair, or of single pictures, (n, 4, h, w), scaled.
        rejected: latents of the worse ones, shaped alike; None for single pictures.
        prompt_embeds: (n, tokens, width).
        empty_embeds: those of the empty prompt, (tokens, width).
        label: P(chosen is better), (n,), in [0.5, 1].
        weight: share of each sample in the loss, (n,), 1 on average.
        sample_ids: content ids that key the randomness, one per pair.
        prompts: for messages.
    """

    chosen: torch.Tensor
    rejected: torch.Tensor | None
    prompt_embeds: torch.Tensor
    empty_embeds: torch.Tensor
    label: torch.Tensor
    weight: torch.Tensor
    sample_ids: list[int]
    prompts: list[str]

    def __len__(self) -> int:
        return len(self.sample_ids)


class PairBatch(NamedTuple):
    """What one micro-step trains on.

    Args:
        chosen, rejected: latents, (pairs, 4, h, w), scaled; of single pictures there are no rejected ones.
        prompt_embeds: (pairs, tokens, width); of the empty prompt where the caption was dropped.
        noise: (pairs, 4, h, w), standard normal, shared by chosen and rejected.
        timesteps: (pairs,), int64, shared by chosen and rejected.
        label: P(chosen is better), (pairs,).
        weight: share of each pair in the loss, (pairs,).
        index: row of each pair in its dataset, (pairs,).
    """

    chosen: torch.Tensor
    rejected: torch.Tensor | None
    prompt_embeds: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    label: torch.Tensor
    weight: torch.Tensor
    index: torch.Tensor


class Visits(Dataset):
    """Pair `index` at its `draw`-th visit, with the noise, timestep and caption dropout that belong to that visit.

    Args:
        timesteps: None draws them uniformly from the schedule; otherwise the grid on which visit k takes entry k.
    """

    def __init__(
        self,
        pairs: EncodedPairs,
        seed: int,
        num_train_timesteps: int,
        caption_dropout: float = 0.0,
        timesteps: list[int] | None = None,
    ):
        self.pairs, self.seed, self.num_train_timesteps = pairs, seed, num_train_timesteps
        self.caption_dropout, self.timesteps = caption_dropout, timesteps

    def __getitem__(self, visit: tuple[int, int]) -> PairBatch:
        index, draw = visit
        pairs, key = self.pairs, (self.seed, self.pairs.sample_ids[index], draw)
        dropped = self.caption_dropout > 0 and noise.uniform(*key, "caption") < self.caption_dropout
        timestep = noise.timestep(*key, self.num_train_timesteps) if self.timesteps is None else self.timesteps[draw]
        return PairBatch(
            chosen=pairs.chosen[index],
            rejected=None if pairs.rejected is None else pairs.rejected[index],
            prompt_embeds=pairs.empty_embeds if dropped else pairs.prompt_embeds[index],
            noise=torch.from_numpy(noise.noise(*key, tuple(pairs.chosen.shape[1:]))),
            timesteps=torch.tensor(timestep),
            label=pairs.label[index],
            weight=pairs.weight[index],
            index=torch.tensor(index),
        )


def stack(visits: list[PairBatch]) -> PairBatch:
    columns = zip(*visits, strict=True)
    return PairBatch(*(None if column[0] is None else torch.stack(column) for column in columns))  # type: ignore[arg-type]


class UpdateOrder(Sampler[list[tuple[int, int]]]):
    """Micro-batches of visits in the order of training: a function of the position, so that a run resumes anywhere.

    The run visits the pairs in an endless row of permutations; update u takes the next `pairs_per_update` of them,
    whatever the micro-batch and the number of devices.

    Args:
        n: pairs in the dataset.
        updates: the updates to go through.
        micro_batch: pairs per micro-step on one device; `world_size * micro_batch` divides `pairs_per_update`.
        rank: which device of `world_size` this is.
    """

    def __init__(
        self,
        n: int,
        seed: int,
        updates: range,
        pairs_per_update: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.n, self.seed, self.updates, self.pairs_per_update = n, seed, updates, pairs_per_update
        self.micro_batch, self.rank, self.world_size = micro_batch, rank, world_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, permutation = -1, np.empty(0, int)
        for update in self.updates:
            first = update * self.pairs_per_update
            for start in range(self.rank, self.pairs_per_update // self.micro_batch, self.world_size):
                batch = []
                for position in range(first + start * self.micro_batch, first + (start + 1) * self.micro_batch):
                    if position // self.n != epoch:
                        epoch = position // self.n
                        permutation = noise.order(self.seed, epoch, self.n)
                    batch.append((int(permutation[position % self.n]), epoch))
                yield batch
