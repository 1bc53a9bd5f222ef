"""Before/after sheets of fixed prompts and seeds."""

from __future__ import annotations

import logging

from PIL import Image

from dpo_sd.callbacks.watcher import Run, Watcher
from dpo_sd.data.prompts import Line, read_lines
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
        prompts: a list of prompts to draw instead of held-out ones, or a file of them, where each may have a negative
            prompt, size, seed, steps and guidance of its own: see `dpo_sd.data.prompts.read_lines`.
        seed: seed of the images that have none of their own.
    """

    def __init__(self, every: int = 100, n_prompts: int = 8, prompts: str | list[str] | None = None, seed: int = 0):
        check_range("every", every, 1)
        check_range("n_prompts", n_prompts, 1, 64)  # columns of a sheet
        check_uint64("seed", seed)
        self.every, self.n_prompts, self.seed = every, n_prompts, seed
        self.prompts = None if prompts is None else read_lines(prompts, seed)
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
        lines = self.prompts or [Line(prompt) for prompt in run.data.data.held_out_prompts[: self.n_prompts]]
        known: tuple[Side, ...] = ("base", "reference", "policy")
        there = {"base", *adapter_names(model)}
        sides: list[Side] = [side for side in known if side in there and side not in self._fixed]
        drawn: dict[Side, list[Image.Image]] = {side: [Image.new("RGB", (1, 1))] * len(lines) for side in sides}
        alike: dict[Line, list[int]] = {}
        for column, line in enumerate(lines):
            alike.setdefault(line._replace(prompt="", seed=None), []).append(column)
        with run.module.averaged():
            for settings, columns in alike.items():
                here = [lines[column] for column in columns]
                seeds = [image_seed(self.seed, line.prompt, 0, 0) if line.seed is None else line.seed for line in here]
                prompts = [line.prompt for line in here]
                for side, images in draw_sides(sides, model, settings.drawn_by(sampler), prompts, seeds).items():
                    for column, image in zip(columns, images, strict=True):
                        drawn[side][column] = image
        rows = self._fixed | drawn
        self._fixed = {side: images for side, images in rows.items() if side != "policy"}
        file = run.folder / "samples" / f"step={run.step:06d}.png"
        save_png(
            comparison([line.prompt for line in lines], {str(side): images for side, images in rows.items()}), file
        )
        log.info("wrote %s", file)
