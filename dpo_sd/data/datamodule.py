"""Batches of the prepared samples, as Lightning asks for them."""

from __future__ import annotations

import lightning as L
from torch.utils.data import DataLoader

from dpo_sd.data.batches import Batch, UpdateOrder, Visits, stack
from dpo_sd.data.source import PreparedData, Source
from dpo_sd.models.sampling import Sampler
from dpo_sd.noise import Noising

GRID = 4  # noises and timesteps per sample in the fixed validation grid, spread evenly over the schedule


def grid_batch(micro_batch: int) -> int:
    """Size of a validation batch: all GRID visits of a sample together, of as many samples as a micro-batch holds."""
    return max(micro_batch, GRID) // GRID * GRID


class DataModule(L.LightningDataModule):
    """Serves batches in the order of training, from the update at which the trainer stands, and the validation grid.

    Args:
        data, source: the prepared samples and the source that they come from.
        sampler: settings with which callbacks draw images.
        pairs_per_update, micro_batch: samples per optimiser update, and per micro-step on one device.
        seed: seed of order, noise, timesteps, caption dropout, crops and flips.
        num_train_timesteps: length of the noise schedule.
        factor: pixels along one side of a latent pixel.
        draws_per_pair: as in `Loss`, see `Visits`.
        num_workers: processes that prepare batches; 0 prepares them in the training process.
        noising: how noise and timesteps of the training samples are drawn, as in `Visits`.
    """

    def __init__(
        self,
        data: PreparedData,
        source: Source,
        sampler: Sampler,
        pairs_per_update: int,
        micro_batch: int,
        seed: int,
        num_train_timesteps: int,
        factor: int = 8,
        draws_per_pair: int | None = None,
        num_workers: int = 0,
        noising: Noising | None = None,
    ):
        super().__init__()
        self.data, self.source, self.sampler, self.num_workers = data, source, sampler, num_workers
        self.pairs_per_update, self.micro_batch, self.seed = pairs_per_update, micro_batch, seed
        drawn = (source.caption_dropout, draws_per_pair)
        self.visits = Visits(data.train, seed, num_train_timesteps, factor, *drawn, noising=noising)
        self.grid = [round((k + 0.5) * num_train_timesteps / GRID) for k in range(GRID)]
        self.validation_visits = Visits(data.validation, seed, num_train_timesteps, factor, timesteps=self.grid)

    def train_dataloader(self) -> DataLoader[list[Batch]]:
        trainer = self.trainer
        assert trainer is not None
        batches = UpdateOrder(
            n=len(self.data.train),
            seed=self.seed,
            updates=range(trainer.global_step, trainer.max_steps),
            pairs_per_update=self.pairs_per_update,
            micro_batch=self.micro_batch,
            sizes=self.data.train.sizes,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )
        return DataLoader(
            self.visits,
            batch_sampler=batches,
            collate_fn=stack,
            num_workers=self.num_workers,
            pin_memory=trainer.strategy.root_device.type == "cuda",
        )

    def validation_batches(self, rank: int = 0, world_size: int = 1) -> DataLoader[list[Batch]]:
        """Every validation sample at each of its GRID noises and timesteps, sample by sample.

        Args:
            rank, world_size: of the devices that share the batches out in turns.
        """
        visits = [(index, k) for index in range(len(self.data.validation)) for k in range(GRID)]
        size = grid_batch(self.micro_batch)
        batches = [visits[start : start + size] for start in range(0, len(visits), size)]
        mine = batches[rank::world_size]
        return DataLoader(self.validation_visits, batch_sampler=mine, collate_fn=stack)  # type: ignore[arg-type]
