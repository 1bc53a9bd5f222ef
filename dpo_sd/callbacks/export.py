"""The policy as LoRA files that other programs load, as current as the checkpoints."""

from __future__ import annotations

import glob
from pathlib import Path

from dpo_sd.callbacks.watcher import Run, Watcher
from dpo_sd.errors import UserError
from dpo_sd.lora.adapters import weights_of
from dpo_sd.lora.weights import WEIGHTS_NAME
from dpo_sd.lora.writing import reading_metadata, save_diffusers, save_kohya


class Export(Watcher):
    """Writes `lora/pytorch_lora_weights.safetensors` (diffusers) and `lora/<name>.safetensors` (Kohya).

    Both are written at every checkpoint and at the end. Beside them, each checkpoint that is kept has a Kohya file of
    its own, `lora/<name>-000200.safetensors`. A DoRA has no Kohya files.

    Args:
        name: name of the Kohya file, which the file calls itself too.
    """

    def __init__(self, name: str = "lora"):
        if name in ("", ".", "..", Path(WEIGHTS_NAME).stem) or "/" in name or "\\" in name:
            raise UserError(
                f"name must be a file name without folder or ending, and not that of the other form, got {name!r}"
            )
        self.name = name

    def promise(self, run: Run) -> str:
        return (
            "export  in diffusers' form alone: no other program has this DoRA"
            if weights_of(run.module.model).dora
            else ""
        )

    def on_checkpoint(self, run: Run) -> None:
        self.write(run, self.name, f"{self.name}-{run.step:06d}")

    def on_end(self, run: Run) -> None:
        self.write(run, self.name)

    def write(self, run: Run, *names: str) -> None:
        """Writes the policy as it is now in diffusers' form, and in Kohya's under each of the names."""
        if not run.is_global_zero:
            return
        with run.module.averaged():
            lora = weights_of(run.module.model)
            save_diffusers(lora, run.folder / "lora" / WEIGHTS_NAME)
            for name in names if not lora.dora else ():
                self._save_kohya(run, name)
        self._prune(run)

    def _save_kohya(self, run: Run, name: str) -> None:
        model, settings = run.module.model, run.module.identity["settings"]
        save_kohya(
            weights_of(model),
            run.folder / "lora" / f"{name}.safetensors",
            model.name,
            prediction_type=model.prediction_type,
            zero_terminal_snr=model.noise_scheduler.config["rescale_betas_zero_snr"],
            resolution=settings["framing"]["resolution"] or model.resolution,
            extra={
                "ss_sd_model_name": model.name,
                "ss_steps": str(run.step),
                "ss_learning_rate": str(run.module.optimizer.lr),
                "ss_training_comment": type(run.module.loss).__name__,
                "ss_noise_offset": str(settings["noising"]["offset"] or None),
                **reading_metadata(model.family, model.reading),
            },
        )

    def _prune(self, run: Run) -> None:
        """Removes the snapshots whose checkpoints are gone; the one of now is being written."""
        for file in (run.folder / "lora").glob(f"{glob.escape(self.name)}-*.safetensors"):
            step = file.stem.removeprefix(f"{self.name}-")
            kept = (run.folder / "checkpoints" / f"step={step}.ckpt").exists() or step == f"{run.step:06d}"
            if step.isdecimal() and not kept:
                file.unlink()
