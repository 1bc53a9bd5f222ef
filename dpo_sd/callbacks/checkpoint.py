"""Checkpoints that a killed run continues from to the same bits."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import lightning as L

from dpo_sd.errors import UserError
from dpo_sd.files.atomic import replacing
from dpo_sd.training import cluster


class Checkpoint(L.Callback):
    """Keeps `checkpoints/last.ckpt` and the newest few `checkpoints/step=000200.ckpt`.

    Ctrl-C and SIGTERM finish the update, save it and end the run; a second one ends it at once. In a Slurm job SIGUSR1
    does the same and puts the job back into the queue.

    Args:
        every: updates between checkpoints, at least 1; the last update is always kept.
        keep: how many of the numbered ones stay, at least 1.
    """

    def __init__(self, every: int = 50, keep: int = 2):
        if every < 1:
            raise UserError(f"every must be at least 1, got {every}")
        if keep < 1:
            raise UserError(f"keep must be at least 1, got {keep}")
        self.every, self.keep = every, keep
        self.interrupted = self.preempted = self._silent = False
        self._handlers: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._silent = not trainer.is_global_zero
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, *([cluster.PREEMPTED] if cluster.in_slurm() else [])):
                self._handlers[number] = signal.signal(number, self._interrupt)

    def _interrupt(self, number: int, frame: Any) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted, self.preempted = True, number == cluster.PREEMPTED
        if not self._silent:
            print("\ninterrupted: finishing this update and saving it; once more to stop at once", flush=True)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        stop = self.interrupted
        if trainer.world_size > 1:  # all processes must stop at the same update
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        last = trainer.global_step == trainer.max_steps
        if stop or last or trainer.global_step % self.every == 0:
            self.save(trainer)
        if stop:
            if self.preempted and trainer.is_global_zero:
                print(cluster.requeue(), flush=True)
            raise KeyboardInterrupt
        if last:  # what follows can be stopped at once, and done again
            self._release()

    def save(self, trainer: L.Trainer) -> None:
        folder = Path(trainer.default_root_dir) / "checkpoints"
        newest = folder / f"step={trainer.global_step:06d}.ckpt"
        trainer.save_checkpoint(newest)
        if not trainer.is_global_zero:
            return
        with replacing(folder / "last.ckpt") as last:
            try:
                os.link(newest, last)
            except OSError:  # a file system without hard links
                shutil.copyfile(newest, last)
        numbered = {int(file.stem.removeprefix("step=")): file for file in folder.glob("step=*.ckpt")}
        abandoned = [step for step in numbered if step > trainer.global_step]  # the run went on from an earlier one
        older = sorted(step for step in numbered if step <= trainer.global_step)[: -self.keep]
        for step in [*abandoned, *older]:
            numbered[step].unlink()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._release()

    def _release(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()
