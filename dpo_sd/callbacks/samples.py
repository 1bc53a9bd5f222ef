"""Before/after sheets of fixed prompts and seeds."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning as L
from PIL import Image

from dpo_sd.errors import UserError
from dpo_sd.files.images import save_png
from dpo_sd.files.sheets import comparison
from dpo_sd.lora.adapters import adapter_names, using
from dpo_sd.noise import check_uint64, image_seed
from dpo_sd.training.step import DiffusionModule

log = logging.getLogger(__name__)


class Samples(L.Callback):
    """Writes `samples/step=000200.png`: base, reference (where it is not the base) and policy.

    Args:
        every: updates between sheets, at least 1; the first and the last state are always drawn.
        n_prompts: at most so many of the held-out prompts, at least 1; ignored where `prompts` are given.
        prompts: what to draw instead.
        seed: of the pictures.
    """

    def __init__(self, every: int = 100, n_prompts: int = 8, prompts: list[str] | None = None, seed: int = 0):
        if every < 1:
            raise UserError(f"every must be at least 1, got {every}")
        if n_prompts < 1:
            raise UserError(f"n_prompts must be at least 1, got {n_prompts}")
        if prompts is not None and not prompts:
            raise UserError("prompts is empty: name some, or leave it out (null) for held-out prompts")
        check_uint64("seed", seed)
        self.every, self.n_prompts, self.prompts, self.seed = every, n_prompts, prompts, seed
        self._fixed: dict[str, list[Image.Image]] = {}  # rows that training does not change

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == 0:
            self.write(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps:
            self.write(trainer, pl_module)

    def write(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, DiffusionModule)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        prompts = self.prompts or data.data.held_out_prompts[: self.n_prompts]
        seeds = [image_seed(self.seed, prompt, 0, 0) for prompt in prompts]

        def draw(which: Any) -> list[Image.Image]:
            with using(pl_module.model, which):
                return data.sampler.draw(pl_module.model, prompts, seeds)

        for which in ("base", "reference"):
            if which not in self._fixed and (which == "base" or which in adapter_names(pl_module.model)):
                self._fixed[which] = draw(which)
        file = Path(trainer.default_root_dir) / "samples" / f"step={trainer.global_step:06d}.png"
        save_png(comparison(prompts, {**self._fixed, "policy": draw("policy")}), file)
        log.info("wrote %s", file)
