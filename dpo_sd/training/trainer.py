"""Lightning's trainer with the loggers and checkpoint files of a run."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import lightning as L
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from omegaconf import DictConfig

from dpo_sd.errors import UserError
from dpo_sd.training import cluster, wandb_mode
from dpo_sd.training.checkpoints import AtomicCheckpointIO
from dpo_sd.training.hardware import Hardware
from dpo_sd.training.metrics_file import MetricsFile


def make_trainer(
    cfg: DictConfig, hardware: Hardware, run: Path, accumulation: int, callbacks: list[L.Callback]
) -> L.Trainer:
    """Lightning's loop, with metrics and checkpoint files of our own.

    Args:
        cfg: composition of train.yaml.
        run: run folder.
        accumulation: micro-batches behind one update, see `Hardware.accumulation`.
    """
    quiet_lightning()
    # the Checkpoint callback puts the job back into the queue, at the end of an update
    slurm = [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []
    loggers = {name: instantiate(node) for name, node in cfg.logger.items()}
    for name, logger in loggers.items():
        if not isinstance(logger, Logger):
            raise UserError(f"logger.{name}: its class must have the base class Logger of lightning.pytorch.loggers")
        if isinstance(logger, WandbLogger) and cluster.first_process():
            wandb_mode.begin(logger)
    return L.Trainer(
        accelerator="gpu" if hardware.accelerator == "cuda" else "cpu",
        devices=cfg.trainer.devices,
        num_nodes=cfg.trainer.num_nodes,
        strategy=cfg.trainer.strategy,
        precision=hardware.precision,
        max_epochs=-1,
        max_steps=cfg.trainer.max_steps,
        accumulate_grad_batches=accumulation,
        gradient_clip_val=cfg.trainer.gradient_clip,
        deterministic=cfg.trainer.deterministic,
        use_distributed_sampler=False,
        callbacks=callbacks,
        logger=[MetricsFile(run / "metrics.csv"), *loggers.values()],
        plugins=[AtomicCheckpointIO(accumulation), *slurm],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=run,
    )


def quiet_lightning() -> None:
    """Silences Lightning's advice on choices that are made here for the user."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        ".*isinstance.treespec.*",
        ".*does not have many workers.*",
        ".*srun.*",
        ".*dataloader is not resumable.*",
        ".*in eval mode.*",
    ):
        warnings.filterwarnings("ignore", message=message)
