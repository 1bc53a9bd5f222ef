"""Stops a run whose loss is no number before it spoils the weights."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch.optim import Optimizer

from dpo_sd.errors import UserError
from dpo_sd.training.step import DiffusionModule


class Health(L.Callback):
    """Ends the run, with weights and checkpoints as they were before the update, when a loss is not finite."""

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        assert isinstance(pl_module, DiffusionModule)
        seen = pl_module.seen()
        broken = torch.where(torch.isfinite(seen["loss"]), -1, seen["index"])
        rows = [row for row in trainer.strategy.all_gather(broken).flatten().tolist() if row >= 0]
        if not rows:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        names = [repr(data.data.train.prompts[row]) for row in rows]
        raise UserError(
            f"the loss is not finite at update {trainer.global_step + 1}, on {len(names)} pairs: "
            f"{', '.join(names[:4])}{' …' if len(names) > 4 else ''}; the last checkpoint is from before it. "
            "Try a smaller optimizer.lr or a smaller loss.beta"
        )
