"""Writes the model card of a tiny Stable Diffusion, from images that the oracle judges."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from dpo_sd.data.drawn import encode_images
from dpo_sd.errors import UserError
from dpo_sd.files.atomic import write_text
from dpo_sd.files.images import save_png
from dpo_sd.files.sheets import comparison
from dpo_sd.models.base import Base
from dpo_sd.models.sampling import Sampler
from dpo_sd.noise import image_seed
from dpo_sd.shapes.captions import caption
from dpo_sd.shapes.oracle import score
from dpo_sd.shapes.render import render
from dpo_sd.shapes.scenes import KINDS, POSITIONS, held_out, random_scene
from dpo_sd.statistics import wilson

PROPERTIES = ("shape", "colour", "size", "background", "position", "clean")


def accuracies(images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, str]:
    """Share of images that are right in each property that their prompt names, and in all, with 95 % intervals."""
    scores = [score(image, prompt) for image, prompt in tqdm(list(zip(images, prompts, strict=True)), desc="judge")]
    row = {}
    for name in PROPERTIES:
        named = [value >= 0.5 for s in scores if (value := getattr(s, name)) is not None]
        row[name] = str(wilson(sum(named), len(named))).split(" n=")[0] if named else "–"
    row["all of them"] = str(wilson(sum(s.faithful for s in scores), len(scores)))
    return row


def write_card(folder: Path, per_row: int = 236, seed: int = 0) -> None:
    """Draws and judges images, and writes README.md and a sheet of samples into the pipeline's folder.

    Args:
        folder: a pipeline in diffusers' layout.
        per_row: images behind each row of the table.
        seed: seed of scenes and drawing.
    """
    model, sampler = Base(path=str(folder)).load(), Sampler()
    unseen = [kind for kind in KINDS if held_out(kind)]
    seen = [kind for kind in KINDS if not held_out(kind)]
    rng = np.random.default_rng(seed)
    rng.shuffle(seen)
    positions = list(POSITIONS)
    sets = {
        "seen combinations": [caption(seen[i % len(seen)]) for i in range(per_row)],
        "held-out combinations": [caption(unseen[i % len(unseen)]) for i in range(per_row)],
        "held-out combinations, with a place": [
            caption(unseen[i % len(unseen)], positions[i % len(positions)]) for i in range(per_row)
        ],
    }
    rows = {}
    for name, prompts in sets.items():
        seeds = [image_seed(seed, prompt, i, 0) for i, prompt in enumerate(prompts)]
        rows[name] = accuracies(sampler.draw(model, prompts, seeds, name), prompts)

    scenes = [random_scene(rng, seen[i % len(seen)]) for i in range(per_row)]
    latents = encode_images(model, [render(scene) for scene in scenes])
    decoded = model.decode_latents(latents)
    rows["rendered pictures through the autoencoder"] = accuracies(decoded, [caption(scene.kind) for scene in scenes])

    prompts = sets["held-out combinations"][: len(unseen)][::6]  # small and large ones
    first, second = ([image_seed(seed, prompt, k, 1) for prompt in prompts] for k in (0, 1))
    sheet = comparison(
        prompts, {"seed 1": sampler.draw(model, prompts, first), "seed 2": sampler.draw(model, prompts, second)}
    )
    save_png(sheet, folder / "samples.png")
    columns = [*PROPERTIES, "all of them"]
    table = [f"| right in | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    table += [f"| {name} | {' | '.join(row[column] for column in columns)} |" for name, row in rows.items()]
    write_text(
        folder / "README.md", CARD.format(table="\n".join(table), steps=sampler.steps, guidance=sampler.guidance)
    )


CARD = """# tiny-sd: a Stable Diffusion of the shapes world

A complete `StableDiffusionPipeline` (AutoencoderKL with a factor of 8, UNet2DConditionModel with cross-attention,
CLIPTextModel, CLIPTokenizer, ε-prediction on the noise schedule of Stable Diffusion 1.x) for 64x64 pictures of one flat
shape on a plain background. It runs every code path of a large model on two CPU cores, and because its pictures can be
measured, what alignment does to it is known without a reward model.

Made by `pretrain.py` of the record `2026-11-23-tiny-sd` in the project's `experiments/`, which says how it was trained.

![two seeds of ten prompts whose combination it never saw](samples.png)

## What it can do

Share of pictures that the oracle finds right, with 95 % intervals; DPM-Solver++, {steps} steps, guidance {guidance:g}.
One in eight combinations of size, colour, shape and background was held out of training.

{table}

## What it cannot do

It knows the words of `dpo_sd.shapes.captions` and nothing else, one shape at a time, in the flat style only. It was
never shown the styles `outlined`, `pastel` and `striped`, though its autoencoder was: a LoRA can teach them.
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python experiments/2026-11-23-tiny-sd/card.py", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("folder", type=Path)
    try:
        write_card(parser.parse_args().folder)
    except UserError as error:
        sys.exit(f"error: {error}")
