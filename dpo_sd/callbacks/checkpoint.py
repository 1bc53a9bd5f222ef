"""Checkpoints that a killed run continues from to the same bits."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from typing import Any, ClassVar

import lightning as L

from dpo_sd.callbacks.watcher import Run, Watcher
from dpo_sd.errors import check_range
from dpo_sd.files.atomic import replacing
from dpo_sd.training import cluster


class Checkpoint(Watcher):
    """Keeps `checkpoints/last.ckpt` and the newest few `checkpoints/step=000200.ckpt`.

    Ctrl-C, SIGTERM and a closed terminal finish the update, save it and end the run; a second one ends it at once. In
    a Slurm job SIGUSR1 does the same and puts the job back into the queue.

    Args:
        every: updates between checkpoints, at least 1; the last update is always kept.
        keep: number of numbered checkpoints that stay, at least 1.
    """

    acts_last: ClassVar[bool] = True

    def __init__(self, every: int = 50, keep: int = 2):
        check_range("every", every, 1)
        check_range("keep", keep, 1)
        self.every, self.keep = every, keep
        self.interrupted = self.preempted = self._silent = False
        self._handlers: dict[signal.Signals, Any] = {}

    def on_start(self, run: Run) -> None:
        self._silent = not run.is_global_zero
        if threading.current_thread() is threading.main_thread():
            ends = [signal.SIGINT, signal.SIGTERM, *([cluster.PREEMPTED] if cluster.in_slurm() else [])]
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
                ends.append(signal.SIGHUP)
            for number in ends:
                self._handlers[number] = signal.signal(number, self._interrupt)

    def _interrupt(self, number: int, frame: Any) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted, self.preempted = True, number == cluster.PREEMPTED
        if not self._silent:
            print("\ninterrupted: finishing this update and saving it; once more to stop at once", flush=True)

    def on_update(self, run: Run) -> None:
        stop = self.interrupted
        if run.trainer.world_size > 1:  # all processes must stop at the same update
            stop = run.trainer.strategy.reduce_boolean_decision(stop, all=False)
        if stop or run.due(self.every):
            self.save(run)
        if stop:
            if self.preempted and run.is_global_zero:
                print(cluster.requeue(), flush=True)
            raise KeyboardInterrupt
        if run.is_last:  # what follows can be stopped at once, and done again
            self._release()

    def save(self, run: Run) -> None:
        """Writes the checkpoint of this update, and removes those that are too old or of an abandoned attempt."""
        folder = run.folder / "checkpoints"
        newest = folder / f"step={run.step:06d}.ckpt"
        run.trainer.save_checkpoint(newest)
        if not run.is_global_zero:
            return
        with replacing(folder / "last.ckpt") as last:
            try:
                os.link(newest, last)
            except OSError:  # a file system without hard links
                shutil.copyfile(newest, last)
        numbered = {int(file.stem.removeprefix("step=")): file for file in folder.glob("step=*.ckpt")}
        abandoned = [step for step in numbered if step > run.step]  # the run went on from an earlier one
        older = sorted(step for step in numbered if step <= run.step)[: -self.keep]
        for step in [*abandoned, *older]:
            numbered[step].unlink()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._release()

    def _release(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()
