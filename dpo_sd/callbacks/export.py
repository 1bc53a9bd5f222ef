"""The policy as LoRA files that other programs load, as current as the checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

from dpo_sd.errors import UserError
from dpo_sd.lora.adapters import weights_of
from dpo_sd.lora.weights import WEIGHTS_NAME
from dpo_sd.lora.writing import save_diffusers, save_kohya
from dpo_sd.training.step import DiffusionModule


class Export(L.Callback):
    """Writes `lora/pytorch_lora_weights.safetensors` (diffusers) and `lora/<name>.safetensors` (Kohya).

    At every checkpoint and at the end.

    Args:
        name: of the Kohya file and of what it calls itself.
    """

    def __init__(self, name: str = "lora"):
        if name in ("", ".", "..", Path(WEIGHTS_NAME).stem) or "/" in name or "\\" in name:
            raise UserError(
                f"name must be a file name without folder or ending, and not that of the other form, got {name!r}"
            )
        self.name = name

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.write(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.write(trainer, pl_module)

    def write(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, DiffusionModule)
        folder, model = Path(trainer.default_root_dir) / "lora", pl_module.model
        lora = weights_of(model)
        save_diffusers(lora, folder / WEIGHTS_NAME)
        save_kohya(
            lora,
            folder / f"{self.name}.safetensors",
            model.name,
            prediction_type=model.prediction_type,
            resolution=model.resolution,
            extra={
                "ss_sd_model_name": model.name,
                "ss_steps": str(trainer.global_step),
                "ss_learning_rate": str(pl_module.optimizer.lr),
                "ss_training_comment": type(pl_module.loss).__name__,
            },
        )
