"""A progress bar that counts optimiser updates."""

from __future__ import annotations

import sys
from collections import deque
from typing import Any

import lightning as L
from tqdm import tqdm

from dpo_sd.callbacks.watcher import Run, Watcher
from dpo_sd.errors import check_range

SHOWN = (  # label, metric, format
    ("loss", "train/loss", ".4f"),
    ("accuracy", "train/reward_accuracy", ".2f"),
    ("margin", "train/reward_margin", ".1e"),
    ("lr", "train/lr", ".1e"),
)


class Progress(Watcher):
    """Shows loss, accuracy, margin (means of the last updates), learning rate and pairs per second.

    Args:
        window: updates that the means are over, at least 1; a single update tells little.
    """

    def __init__(self, window: int = 20):
        check_range("window", window, 1)
        self._last: deque[dict[str, float]] = deque(maxlen=window)
        self._bar: tqdm[Any] | None = None

    def on_start(self, run: Run) -> None:
        self._bar = tqdm(
            total=run.trainer.max_steps,
            initial=run.step,
            desc="training",
            unit="update",
            disable=not run.is_global_zero,
            mininterval=0.2 if sys.stderr.isatty() else 10.0,
        )

    def on_update(self, run: Run) -> None:
        assert self._bar is not None
        self._last.append(dict(run.metrics))
        shown = {}
        for label, name, form in SHOWN:
            values = [metrics[name] for metrics in self._last if name in metrics]
            if values:
                shown[label] = format(sum(values) / len(values), form)
        if rate := self._bar.format_dict["rate"]:
            shown["pairs/s"] = f"{rate * run.data.pairs_per_update:.1f}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def on_end(self, run: Run) -> None:
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
