"""The end of a run whose loss is not finite, before it spoils the weights."""

from __future__ import annotations

import torch

from dpo_sd.callbacks.watcher import Run, Watcher
from dpo_sd.errors import UserError


class Health(Watcher):
    """Ends the run when a loss is not finite, with weights and checkpoints as they were before the update."""

    def before_update(self, run: Run) -> None:
        seen = run.module.seen()
        broken = torch.where(torch.isfinite(seen["loss"]), -1, seen["index"])
        rows = [row for row in run.trainer.strategy.all_gather(broken).flatten().tolist() if row >= 0]
        if not rows:
            return
        names = [repr(run.data.data.train.prompts[row]) for row in rows]
        raise UserError(
            f"the loss is not finite at update {run.step + 1}, on {len(names)} pairs: "
            f"{', '.join(names[:4])}{' …' if len(names) > 4 else ''}; the last checkpoint is from before it. "
            "Try a smaller optimizer.lr or a smaller loss.beta"
        )
