"""The policy as LoRA files that other programs load, as current as the checkpoints."""

from __future__ import annotations

from pathlib import Path

from dpo_sd.callbacks.watcher import Run, Watcher
from dpo_sd.errors import UserError
from dpo_sd.lora.adapters import weights_of
from dpo_sd.lora.weights import WEIGHTS_NAME
from dpo_sd.lora.writing import save_diffusers, save_kohya


class Export(Watcher):
    """Writes `lora/pytorch_lora_weights.safetensors` (diffusers) and `lora/<name>.safetensors` (Kohya).

    Both are written at every checkpoint and at the end; each checkpoint that is kept has its `lora/<name>-000200.safetensors`
    (Kohya).

    Args:
        name: name of the Kohya file, which the file calls itself too.
    """

    def __init__(self, name: str = "lora"):
        if name in ("", ".", "..", Path(WEIGHTS_NAME).stem) or "/" in name or "\\" in name:
            raise UserError(
                f"name must be a file name without folder or ending, and not that of the other form, got {name!r}"
            )
        self.name = name

    def on_checkpoint(self, run: Run) -> None:
        self.write(run)

    def on_end(self, run: Run) -> None:
        self.write(run)

    def write(self, run: Run) -> None:
        """Writes both files as the policy is now."""
        if not run.is_global_zero:
            return
        folder, model = run.folder / "lora", run.module.model
        lora = weights_of(model)
        save_diffusers(lora, folder / WEIGHTS_NAME)
        save_kohya(
            lora,
            file := folder / f"{self.name}.safetensors",
            model.name,
            prediction_type=model.prediction_type,
            zero_terminal_snr=model.noise_scheduler.config["rescale_betas_zero_snr"],
            resolution=run.module.identity["settings"]["framing"]["resolution"] or model.resolution,
            extra={
                "ss_sd_model_name": model.name,
                "ss_steps": str(run.step),
                "ss_learning_rate": str(run.module.optimizer.lr),
                "ss_training_comment": type(run.module.loss).__name__,
            },
        )
