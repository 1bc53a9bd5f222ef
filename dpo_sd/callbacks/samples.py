"""Before/after sheets of fixed prompts and seeds."""

from __future__ import annotations

import logging

from PIL import Image

from dpo_sd.callbacks.watcher import Run, Watcher
from dpo_sd.data.prompts import read_prompts
from dpo_sd.errors import check_range
from dpo_sd.evaluation.drawing import Side, draw_sides
from dpo_sd.files.images import save_png
from dpo_sd.files.sheets import comparison
from dpo_sd.lora.adapters import adapter_names
from dpo_sd.noise import check_uint64, image_seed

log = logging.getLogger(__name__)


class Samples(Watcher):
    """Writes `samples/step=000200.png`: base, reference (where it is not the base) and policy.

    Args:
        every: updates between sheets, at least 1; the first and the last state are always drawn.
        n_prompts: number of held-out prompts to draw, at least 1; ignored where `prompts` are given.
        prompts: a list of prompts, or a file of them, to draw instead of held-out ones.
        seed: seed of the images.
    """

    def __init__(self, every: int = 100, n_prompts: int = 8, prompts: str | list[str] | None = None, seed: int = 0):
        check_range("every", every, 1)
        check_range("n_prompts", n_prompts, 1, 64)  # columns of a sheet
        check_uint64("seed", seed)
        self.every, self.n_prompts, self.seed = every, n_prompts, seed
        self.prompts = None if prompts is None else read_prompts(prompts, seed)
        self._fixed: dict[Side, list[Image.Image]] = {}  # rows that training does not change

    def on_start(self, run: Run) -> None:
        if run.step == 0:
            self.write(run)

    def on_update(self, run: Run) -> None:
        if run.due(self.every):
            self.write(run)

    def write(self, run: Run) -> None:
        """Draws and writes the sheet of this update."""
        if not run.is_global_zero:
            return
        model, sampler = run.module.model, run.data.sampler
        prompts = self.prompts or run.data.data.held_out_prompts[: self.n_prompts]
        seeds = [image_seed(self.seed, prompt, 0, 0) for prompt in prompts]
        known: tuple[Side, ...] = ("base", "reference", "policy")
        there = {"base", *adapter_names(model)}
        sides: list[Side] = [side for side in known if side in there and side not in self._fixed]
        with run.module.averaged():
            drawn = draw_sides(sides, model, sampler, prompts, seeds)
        rows = self._fixed | drawn
        self._fixed = {side: images for side, images in rows.items() if side != "policy"}
        file = run.folder / "samples" / f"step={run.step:06d}.png"
        save_png(comparison(prompts, {str(side): images for side, images in rows.items()}), file)
        log.info("wrote %s", file)
