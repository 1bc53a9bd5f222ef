"""One row of metrics an update, averaged over all pairs behind it, and a validation on a fixed grid."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import distributed
from torch.utils._pytree import tree_map

from dpo_sd.callbacks.watcher import Run, Watcher
from dpo_sd.models.compilation import eager
from dpo_sd.training.metrics_file import MetricsFile
from dpo_sd.training.reference_cache import ReferenceErrors


class Metrics(Watcher):
    """Logs every update, and validates every `validate_every` of them, the state before the first one included.

    Args:
        log_every: updates between rows, at least 1.
        validate_every: updates between validations; 0 never validates, for measurements of speed.
    """

    def __init__(self, log_every: int = 1, validate_every: int = 100):
        self.log_every, self.validate_every = log_every, validate_every
        self._reference: ReferenceErrors | None = None  # on the grid, which stays as it is

    def state_dict(self) -> dict[str, Any]:
        return {"latest": self.run.metrics}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.run.metrics.update(state_dict["latest"])

    def on_start(self, run: Run) -> None:
        for logger in run.trainer.loggers:
            if isinstance(logger, MetricsFile):
                logger.resume(run.step if run.step else -1)
        if run.step == 0 and self.validate_every:
            self._log(run, self.validate(run))

    def before_update(self, run: Run) -> None:
        self._lr = run.trainer.optimizers[0].param_groups[0]["lr"]  # of this update; afterwards it is the next one's

    def on_update(self, run: Run) -> None:
        metrics = {}
        if run.due(self.log_every):
            means = {f"train/{name}": value.mean() for name, value in run.module.seen().items() if name != "index"}
            reduce = run.trainer.strategy.reduce
            metrics = {name: float(reduce(value, reduce_op="mean")) for name, value in means.items()}
            metrics["train/lr"] = self._lr
        if self.validate_every and run.due(self.validate_every):
            metrics |= self.validate(run)
        run.module.forget_seen()
        if metrics:
            self._log(run, metrics)

    def _log(self, run: Run, metrics: dict[str, float]) -> None:
        run.metrics.update(metrics)
        for logger in run.trainer.loggers:
            logger.log_metrics(metrics, run.step)

    def validate(self, run: Run) -> dict[str, float]:
        """Means over the fixed grid of held-out samples, noises and timesteps, by name; margins also by timestep."""
        data, module, trainer = run.data, run.module, run.trainer
        if self._reference is None:
            images = 2 if module.loss.needs_pairs else 1
            self._reference = ReferenceErrors(None, data.data.validation.contents, len(data.grid), images=images)
        module.set_training(False)
        parts: list[list[dict[str, torch.Tensor]]] = []  # of each batch
        with torch.no_grad(), eager(), module.averaged():
            for batch in data.validation_batches(trainer.global_rank, trainer.world_size):
                parts.append([])
                for part in trainer.strategy.batch_to_device(batch):
                    with trainer.precision_plugin.forward_context():
                        values = module.losses(part, self._reference)
                    parts[-1].append(values | {"timesteps": part.timesteps})
        module.set_training(True)
        rows = [part for batch in _of_all_devices(parts) for part in batch]
        columns = {name: torch.cat([part[name] for part in rows]) for name in rows[0]}
        timesteps = columns.pop("timesteps")
        metrics = {f"val/{name}": float(value.mean()) for name, value in columns.items()}
        if "reward_margin" in columns:
            # of a whole pair, not of one noise: what the annotator's choice was about
            by_pair = columns["reward_margin"].view(-1, len(data.grid)).mean(dim=1)
            metrics["val/reward_accuracy"] = float(torch.heaviside(by_pair, by_pair.new_tensor(0.5)).mean())
            for timestep in data.grid:
                bin_ = columns["reward_margin"][timesteps == timestep]
                metrics[f"val/reward_margin/t{timestep:03d}"] = float(bin_.mean())
        return metrics


def _of_all_devices(mine: list[Any]) -> list[Any]:
    """Results of all batches in their order, of which this device has its share, on the CPU where there are several."""
    if not distributed.is_initialized():
        return mine
    of_ranks: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(of_ranks, tree_map(lambda tensor: tensor.cpu(), mine))
    return [each for turn in itertools.zip_longest(*of_ranks) for each in turn if each is not None]
