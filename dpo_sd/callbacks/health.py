"""The end of a run whose loss or weights are not finite, before they are kept."""

from __future__ import annotations

import math

import torch

from dpo_sd.callbacks.watcher import Run, Watcher
from dpo_sd.errors import UserError
from dpo_sd.lora.adapters import weights_of

WAY_OUT = "the last checkpoint is from before it. Try a smaller optimizer.lr or a smaller loss.beta"


class Health(Watcher):
    """Ends the run when a loss or a weight is not finite, with checkpoints and LoRA files as they were before."""

    def before_update(self, run: Run) -> None:
        seen = run.module.seen()
        broken = torch.where(torch.isfinite(seen["loss"]), -1, seen["index"])
        rows = [row for row in run.trainer.strategy.all_gather(broken).flatten().tolist() if row >= 0]
        if not rows:
            return
        names = [repr(run.data.data.train.prompts[row]) for row in rows]
        raise UserError(
            f"the loss is not finite at update {run.step + 1}, on {len(names)} pairs: "
            f"{', '.join(names[:4])}{' …' if len(names) > 4 else ''}; {WAY_OUT}"
        )

    def on_update(self, run: Run) -> None:
        if not math.isfinite(run.metrics.get("val/loss", 0.0)):
            raise UserError(f"the loss on the validation pairs is not finite after update {run.step}; {WAY_OUT}")

    def on_checkpoint(self, run: Run) -> None:
        if not all(tensor.isfinite().all() for tensor in weights_of(run.module.model).state.values()):
            raise UserError(f"weights are not finite after update {run.step}; {WAY_OUT}")
