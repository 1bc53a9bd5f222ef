"""Checkpoints that a killed run continues from to the same bits."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import threading
import time
from typing import Any, ClassVar

import lightning as L

from dpo_sd.callbacks.watcher import Run, Watcher
from dpo_sd.errors import UserError, check_range
from dpo_sd.files.atomic import replacing
from dpo_sd.training import cluster


class Checkpoint(Watcher):
    """Keeps `checkpoints/last.ckpt` and the newest few `checkpoints/step=000200.ckpt`.

    Ctrl-C, SIGTERM and a closed terminal finish the update, save it and end the run; a second one ends it at once. In
    a Slurm job SIGUSR1 does the same and puts the job back into the queue.

    Args:
        every: updates between checkpoints, at least 1; the last update is always kept.
        keep: number of numbered checkpoints that stay, at least 1.
        best: metric of the validation, `val/reward_accuracy` for example, whose best checkpoint stays too: the one with
            the largest value, of a loss or a drift the smallest.
        max_hours: hours after whose end it does the same, counted from the start of this process, positive; None sets
            no limit.

    Raises:
        UserError: if a value is out of range.
    """

    acts_last: ClassVar[bool] = True

    def __init__(self, every: int = 50, keep: int = 2, best: str | None = None, max_hours: float | None = None) -> None:
        check_range("every", every, 1)
        check_range("keep", keep, 1)
        if max_hours is not None and not 0 < max_hours < math.inf:
            raise UserError(f"max_hours must be positive, or null for no limit, got {max_hours}")
        self.every, self.keep, self.best, self.max_hours = every, keep, best, max_hours
        self.started = time.monotonic()
        self._best: tuple[int, float] | None = None  # update and value
        self.interrupted = self.preempted = self._silent = False
        self._handlers: dict[signal.Signals, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"metric": self.best, "best": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["metric"] == self.best:  # a continued run may compare by another
            self._best = state_dict["best"]

    def summary(self) -> dict[str, Any]:
        if self._best is None:
            return {}
        return {"best_checkpoint": {"step": self._best[0], self.best: self._best[1]}}

    def report(self) -> str:
        if self._best is None:
            return ""
        step, value = self._best
        return f"best    update {step}, {self.best} {value:.4g}: checkpoints/step={step:06d}.ckpt"

    def promise(self, run: Run) -> str:
        return "" if self.max_hours is None else f"time    saved and ended after {self.max_hours:g} hours"

    def on_start(self, run: Run) -> None:
        if self.best is not None and self.best not in run.metrics:
            there = ", ".join(name for name in run.metrics if name.startswith("val/"))
            raise UserError(f"callbacks.checkpoint.best={self.best}: the validation has no such value; it has {there}")
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
        stop = self.interrupted or self._is_over(run)
        if run.trainer.world_size > 1:  # all processes must stop at the same update
            stop = run.trainer.strategy.reduce_boolean_decision(stop, all=False)
        if self.best is not None and run.due(self.every):
            self._compare(run.step, run.metrics[self.best])
        if stop or run.due(self.every):
            self.save(run)
        if stop:
            if self.preempted and run.is_global_zero:
                print(cluster.requeue(), flush=True)
            raise KeyboardInterrupt
        if run.is_last:  # what follows can be stopped at once, and done again
            self._release()

    def _compare(self, step: int, value: float) -> None:
        falls = re.search("loss|drift", self.best or "") is not None
        better = self._best is None or (value < self._best[1] if falls else value > self._best[1])
        if better and math.isfinite(value):
            self._best = step, value

    def _is_over(self, run: Run) -> bool:
        over = self.max_hours is not None and time.monotonic() - self.started >= 3600 * self.max_hours
        if over and not run.is_last and run.is_global_zero:
            print(f"\n{self.max_hours:g} hours are over: saving update {run.step}", flush=True)
        return over and not run.is_last

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
            if self._best is None or step != self._best[0]:
                numbered[step].unlink()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._release()

    def _release(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()
