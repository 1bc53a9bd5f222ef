"""One row of metrics an update, averaged over all pairs behind it, and a validation on a fixed grid."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from dpo_sd.compilation import eager
from dpo_sd.data.datamodule import PairData
from dpo_sd.data.reference import ReferenceErrors
from dpo_sd.errors import UserError
from dpo_sd.files import replacing
from dpo_sd.module import DiffusionModule


class MetricsFile(Logger):
    """`metrics.csv`: a row per step, a column per metric, on disk as soon as it is logged.

    A run that is continued drops the rows after its checkpoint first, so that the file ends as if nothing had happened.
    """

    def __init__(self, file: Path):
        super().__init__()
        self.file = file
        self.rows: list[dict[str, str]] = []
        self.columns = ["step"]

    @property
    def name(self) -> str:
        return "metrics.csv"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """config.yaml has them."""

    @rank_zero_only
    def resume(self, step: int) -> None:
        """Takes up the rows of an earlier start up to and including `step`."""
        if self.file.exists():
            try:
                with self.file.open(newline="", encoding="utf-8") as file:
                    reader = csv.DictReader(file)
                    self.columns = list(reader.fieldnames or ["step"])
                    # a row that was being written when the run was killed may lack its end
                    self.rows = [row for row in reader if None not in row.values() and int(row["step"]) <= step]
            except (ValueError, KeyError, csv.Error) as error:
                raise UserError(f"{self.file} is damaged ({error!r}): move it away to continue without it") from error
            self._rewrite()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {"step": str(step), **{name: repr(float(value)) for name, value in metrics.items()}}
        self.rows.append(row)
        if new := [name for name in row if name not in self.columns]:
            self.columns += new
            self._rewrite()
        else:
            with self.file.open("a", newline="") as file:
                csv.DictWriter(file, self.columns, restval="").writerow(row)

    def _rewrite(self) -> None:
        with replacing(self.file) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, restval="")
            writer.writeheader()
            writer.writerows(self.rows)


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
        assert isinstance(data, PairData)
        if self._reference is None:
            self._reference = ReferenceErrors(None, data.data.validation.contents, len(data.grid))
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
