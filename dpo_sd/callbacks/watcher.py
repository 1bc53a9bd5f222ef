"""The contract of a watcher, and the run that it watches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import lightning as L

from dpo_sd.data.datamodule import DataModule
from dpo_sd.judges.judge import Judge
from dpo_sd.training.step import DiffusionModule


@dataclass(frozen=True)
class Run:
    """A training run as its watchers see it.

    Args:
        judge: judge of the verdict; None where only people can judge.
        metrics: latest value of every metric that was logged, by name.
    """

    trainer: L.Trainer
    module: DiffusionModule
    data: DataModule
    judge: Judge | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return Path(self.trainer.default_root_dir)

    @property
    def step(self) -> int:
        """Number of updates that are done."""
        return self.trainer.global_step

    @property
    def is_last(self) -> bool:
        """Whether the last update is done."""
        return self.step >= self.trainer.max_steps

    @property
    def is_global_zero(self) -> bool:
        """Whether this process speaks and writes for all that train together."""
        return self.trainer.is_global_zero

    def due(self, every: int) -> bool:
        """Whether something done every `every` updates, and after the last one, is due now."""
        return self.step % every == 0 or self.is_last


class Watcher(L.Callback):
    """Base class of the group `callbacks`: does nothing, and a subclass overrides what it needs.

    Hooks of Lightning's `Callback` may be overridden too, `state_dict` for example. A watcher with settings is a class
    with a constructor, whose parameters are the settings.
    """

    acts_last: ClassVar[bool] = False  # after the other watchers, because it saves what they have done
    run: Run  # set once, before the training
    failure: Exception | None = None  # one that must not lose the run: raised when all its results are on disk
    _has_ended = False

    def check(self, judge: Judge | None, size: tuple[int, int], prompts: Sequence[str]) -> None:
        """Refuse a composition that this watcher can do nothing with, before anything is drawn or encoded.

        Args:
            size: width and height of the images that the run draws, in pixels.
            prompts: held-out prompts, as far as the data knows them already.

        Raises:
            UserError: if it can do nothing.
        """

    def promise(self, run: Run) -> str:
        """Line that is printed before the training; empty for none."""
        return ""

    def on_start(self, run: Run) -> None:
        """Called before the first update, or before the first that a continued run makes."""

    def before_update(self, run: Run) -> None:
        """Called when the gradients of an update are there and the weights have not changed yet."""

    def on_update(self, run: Run) -> None:
        """Called after every update of the optimiser, never between its micro-batches."""

    def on_checkpoint(self, run: Run) -> None:
        """Called before a checkpoint is written."""

    def on_end(self, run: Run) -> None:
        """Called once after the training, also where a continued run had no update left to make."""

    def summary(self) -> dict[str, Any]:
        """Entries for summary.json: values that JSON knows, by name."""
        return {}

    def report(self) -> str:
        """Text that is printed when the run is finished; empty for none."""
        return ""

    # ------------------------------------------------------------------------------------------------ Lightning's hooks

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.on_start(self.run)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.before_update(self.run)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.on_update(self.run)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.on_checkpoint(self.run)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._has_ended = True
        self.on_end(self.run)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._has_ended:  # a run that was killed after its last update has no training to end
            pl_module.to(trainer.strategy.root_device)
            self.on_train_end(trainer, pl_module)
