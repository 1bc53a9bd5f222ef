"""One row of metrics an update, averaged over all pairs behind it, and a validation on a fixed grid."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from dpo_sd.data.datamodule import DataModule
from dpo_sd.models.compilation import eager
from dpo_sd.training.metrics_file import MetricsFile
from dpo_sd.training.reference_cache import ReferenceErrors
from dpo_sd.training.step import DiffusionModule


class Metrics(L.Callback):
    """Logs every update, and validates every `validate_every` of them, the state before the first one included.

    Args:
        log_every: updates between rows, at least 1.
        validate_every: updates between validations; 0 never validates, for measurements of speed.
    """

    def __init__(self, log_every: int = 1, validate_every: int = 100):
        self.log_every, self.validate_every = log_every, validate_every
        self.latest: dict[str, float] = {}
        self._reference: ReferenceErrors | None = None  # on the grid, which stays as it is

    def state_dict(self) -> dict[str, Any]:
        return {"latest": self.latest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.latest = state_dict["latest"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile):
                logger.resume(trainer.global_step if trainer.global_step else -1)
        if trainer.global_step == 0 and self.validate_every:
            self._log(trainer, self._validate(trainer, pl_module))

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._lr = optimizer.param_groups[0]["lr"]  # of this update; afterwards it is the next one's

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, DiffusionModule)
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        step, metrics = trainer.global_step, {}
        if step % self.log_every == 0 or step == trainer.max_steps:
            means = {f"train/{name}": value.mean() for name, value in pl_module.seen().items() if name != "index"}
            metrics = {name: float(trainer.strategy.reduce(value, reduce_op="mean")) for name, value in means.items()}
            metrics["train/lr"] = self._lr
        if self.validate_every and (step % self.validate_every == 0 or step == trainer.max_steps):
            metrics |= self._validate(trainer, pl_module)
        pl_module.forget_seen()
        if metrics:
            self._log(trainer, metrics)

    def _log(self, trainer: L.Trainer, metrics: dict[str, float]) -> None:
        self.latest |= metrics
        for logger in trainer.loggers:
            logger.log_metrics(metrics, trainer.global_step)

    def _validate(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, float]:
        assert isinstance(pl_module, DiffusionModule)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, DataModule)
        if self._reference is None:
            images = 2 if pl_module.loss.needs_pairs else 1
            self._reference = ReferenceErrors(None, data.data.validation.contents, len(data.grid), images=images)
        pl_module.set_training(False)
        values: dict[str, list[torch.Tensor]] = {}
        timesteps = []
        with torch.no_grad(), eager():
            for batch in data.validation_batches():
                for part in trainer.strategy.batch_to_device(batch):
                    with trainer.precision_plugin.forward_context():
                        for name, value in pl_module.losses(part, self._reference).items():
                            values.setdefault(name, []).append(value)
                    timesteps.append(part.timesteps)
        pl_module.set_training(True)
        columns = {name: torch.cat(value) for name, value in values.items()}
        metrics = {f"val/{name}": float(value.mean()) for name, value in columns.items()}
        if "reward_margin" in columns:
            # of a whole pair, not of one noise: what the annotator's choice was about
            by_pair = columns["reward_margin"].view(-1, len(data.grid)).mean(dim=1)
            metrics["val/reward_accuracy"] = float(torch.heaviside(by_pair, by_pair.new_tensor(0.5)).mean())
            for timestep in data.grid:
                bin_ = columns["reward_margin"][torch.cat(timesteps) == timestep]
                metrics[f"val/reward_margin/t{timestep:03d}"] = float(bin_.mean())
        return metrics
