"""A progress bar that counts optimiser updates."""

from __future__ import annotations

import sys
from collections import deque
from typing import Any

import lightning as L
from tqdm import tqdm

from dpo_sd.callbacks.metrics import Metrics
from dpo_sd.data.datamodule import DataModule
from dpo_sd.errors import UserError


class Progress(L.Callback):
    """Shows loss, accuracy, margin (means of the last updates), learning rate and pairs per second.

    Args:
        window: updates that the means are over, at least 1; a single update tells little.
    """

    def __init__(self, window: int = 20):
        if window < 1:
            raise UserError(f"window must be at least 1, got {window}")
        self._last: deque[dict[str, float]] = deque(maxlen=window)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._metrics = next(c for c in trainer.callbacks if isinstance(c, Metrics))  # type: ignore[attr-defined]
        self._bar = tqdm(
            total=trainer.max_steps,
            initial=trainer.global_step,
            desc="training",
            unit="update",
            disable=not trainer.is_global_zero,
            mininterval=0.2 if sys.stderr.isatty() else 10.0,
        )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self._last.append(dict(self._metrics.latest))
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, DataModule)
        shown = {}
        for label, name, form in (
            ("loss", "train/loss", ".4f"),
            ("accuracy", "train/reward_accuracy", ".2f"),
            ("margin", "train/reward_margin", ".1e"),
            ("lr", "train/lr", ".1e"),
        ):
            values = [metrics[name] for metrics in self._last if name in metrics]
            if values:
                shown[label] = format(sum(values) / len(values), form)
        if rate := self._bar.format_dict["rate"]:
            shown["pairs/s"] = f"{rate * data.pairs_per_update:.1f}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._bar.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if hasattr(self, "_bar"):
            self._bar.close()
