"""The shapes world as training data: pairs that the model draws and the oracle judges, and pictures in a style."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dpo_sd.annotation.simulated import SimulatedAnnotator
from dpo_sd.data.cache import Cache
from dpo_sd.data.drawn import encode_drawn
from dpo_sd.data.source import PreparedData, checked_dropout
from dpo_sd.data.texts import too_long
from dpo_sd.errors import UserError
from dpo_sd.lora.adapters import adapter_key, reference
from dpo_sd.noise import generator, image_seed, sample_id
from dpo_sd.shapes.captions import PromptSplit, split_prompts
from dpo_sd.shapes.scenes import RESOLUTION

if TYPE_CHECKING:
    from PIL import Image

    from dpo_sd.data.batches import PreparedSamples
    from dpo_sd.data.frames import Framing
    from dpo_sd.models.sampling import Sampler
    from dpo_sd.models.stable_diffusion import StableDiffusion

CHUNK = 64  # pictures kept together: what a killed run has to draw again at most


class _World:
    fixed_resolution: ClassVar[int] = 64  # pixels; the pictures have one size, and their places matter

    def check(self, model: StableDiffusion) -> None:
        """Refuse a model that draws pictures of another size.

        Raises:
            UserError: when it does.
        """
        if model.resolution != RESOLUTION:
            raise UserError(
                f"the pictures of the shapes world have {RESOLUTION} pixels, but {model.name} draws "
                f"{model.resolution}: use model=tiny, or another data: pairs, pickapic or captions"
            )


class Shapes(_World):
    """Pairs drawn by the model on prompts of the shapes world, and the oracle as their judge.

    The 520 full captions are split by `seed`: 60 % for training, 10 % for validation, 30 % for the verdict.

    Args:
        n_pairs: training pairs; prompts come again with new pictures when there are more pairs than prompts.
        n_validation: pairs of the fixed validation grid.
        preference: what the annotator likes, a name in `dpo_sd.shapes.oracle.UTILITIES`.
        style: that the pictures are drawn in, one of `dpo_sd.shapes.scenes.STYLES`.
        temperature, tie_band, side_bias, flip_rate: of the `SimulatedAnnotator`.
        caption_dropout: share of visits that train on the empty prompt, in [0, 1].
        seed: of the split, the pictures and the annotator.
    """

    has_pairs: ClassVar[bool] = True

    def __init__(
        self,
        n_pairs: int = 256,
        n_validation: int = 32,
        preference: str = "centred",
        style: str = "flat",
        temperature: float = 0.0,
        tie_band: float = 0.0,
        side_bias: float = 0.0,
        flip_rate: float = 0.0,
        caption_dropout: float = 0.0,
        seed: int = 0,
    ):
        from dpo_sd.judges.oracle import Oracle

        if n_pairs < 1:
            raise UserError(f"n_pairs must be at least 1, got {n_pairs}")
        self.n_pairs, self.n_validation, self.seed = n_pairs, n_validation, seed
        self.judge = Oracle(preference, style)
        self.labeller = self.judge.name
        self.annotator = SimulatedAnnotator(temperature, tie_band, side_bias, flip_rate, seed)
        self.caption_dropout = checked_dropout(caption_dropout)
        self.prompts = split_prompts(seed)
        check_validation(n_validation, self.prompts)

    def prepare(self, model: StableDiffusion, sampler: Sampler, framing: Framing, cache: Cache) -> PreparedData:
        """Draws, judges and encodes the pairs; pictures already in the cache are read."""
        self.check(model)
        train, report = self._pairs(model, sampler, cache, self.prompts.train, self.n_pairs, "training")
        validation, more = self._pairs(model, sampler, cache, self.prompts.validation, self.n_validation, "validation")
        return PreparedData(train, validation, self.prompts.held_out, report + more)

    def _pairs(
        self, model: StableDiffusion, sampler: Sampler, cache: Cache, prompts: list[str], n: int, what: str
    ) -> tuple[PreparedSamples, list[str]]:
        wanted = [(prompts[i % len(prompts)], i // len(prompts)) for i in range(n)]
        captions = [prompt for prompt, _ in wanted for _ in range(2)]
        seeds = [image_seed(self.seed, prompt, set_index, k) for prompt, set_index in wanted for k in range(2)]
        images = _drawn(model, sampler, cache.folder, captions, seeds, f"drawing {what} pairs")
        scores = self.judge.scores(images, captions)
        ties, chosen, rejected, ids, kept = 0, [], [], [], []
        for i, (prompt, _) in enumerate(wanted):
            first, second = 2 * i, 2 * i + 1
            identity = sample_id(prompt, str(seeds[first]), str(seeds[second]))  # not of pixels, which round
            choice = self.annotator.choose(str(identity), scores[first], scores[second])
            if choice == "tie":
                ties += 1
                continue
            winner, loser = (first, second) if choice == "image_0" else (second, first)
            chosen.append(images[winner])
            rejected.append(images[loser])
            ids.append(identity)
            kept.append(prompt)
        if not kept:
            why = (
                f"lower data.tie_band ({self.annotator.tie_band})"
                if self.annotator.tie_band
                else "no picture is better than another, perhaps because none shows anything: see sampler and lora"
            )
            raise UserError(f"all {n} {what} pairs are ties: {why}")
        report = [f"{what}: {len(kept)} pairs on {len(set(kept))} prompts, {ties} ties left out"]
        return encode_drawn(model, kept, chosen, rejected, ids, cache.keep), [*report, *too_long(model, kept)]


class Renders(_World):
    """Rendered pictures of the shapes world in one style, with captions: what a style LoRA is trained on.

    Args:
        style: one of `dpo_sd.shapes.scenes.STYLES`.
        n_pictures: for training.
        n_validation: pictures of the fixed validation grid.
        caption_dropout: share of visits that train on the empty prompt, in [0, 1].
        seed: of the split of the captions, as in `Shapes`, and of the pictures.
    """

    has_pairs: ClassVar[bool] = False
    labeller: str | None = None

    def __init__(
        self,
        style: str = "pastel",
        n_pictures: int = 1024,
        n_validation: int = 32,
        caption_dropout: float = 0.1,
        seed: int = 0,
    ):
        from dpo_sd.judges.oracle import Oracle

        if n_pictures < 1:
            raise UserError(f"n_pictures must be at least 1, got {n_pictures}")
        self.style, self.n_pictures, self.n_validation, self.seed = style, n_pictures, n_validation, seed
        self.judge = Oracle("style", style)
        self.caption_dropout = checked_dropout(caption_dropout)
        self.prompts = split_prompts(seed)
        check_validation(n_validation, self.prompts)

    def prepare(self, model: StableDiffusion, sampler: Sampler, framing: Framing, cache: Cache) -> PreparedData:
        """Renders and encodes the pictures."""
        self.check(model)
        train = self._pictures(model, cache, self.prompts.train, self.n_pictures)
        validation = self._pictures(model, cache, self.prompts.validation, self.n_validation)
        report = [f"{len(train)} rendered pictures in the {self.style} style on {len(train.prompts.texts)} prompts"]
        return PreparedData(train, validation, self.prompts.held_out, report)

    def _pictures(self, model: StableDiffusion, cache: Cache, prompts: list[str], n: int) -> PreparedSamples:
        from dpo_sd.shapes.captions import kind
        from dpo_sd.shapes.render import render
        from dpo_sd.shapes.scenes import random_scene

        captions = [prompts[i % len(prompts)] for i in range(n)]
        pictures = []
        for i, prompt in enumerate(captions):
            rng = generator(self.seed, sample_id(prompt), i // len(prompts), "render")
            pictures.append(render(random_scene(rng, kind(prompt), None, self.style)))
        ids = [sample_id(prompt, picture.tobytes()) for prompt, picture in zip(captions, pictures, strict=True)]
        return encode_drawn(model, captions, pictures, None, ids, cache.keep)


def check_validation(n_validation: int, prompts: PromptSplit) -> None:
    if not 1 <= n_validation <= len(prompts.validation):
        raise UserError(f"n_validation must be between 1 and {len(prompts.validation)}, got {n_validation}")


def _drawn(
    model: StableDiffusion, sampler: Sampler, folder: Path, prompts: list[str], seeds: list[int], what: str
) -> list[Image.Image]:
    import numpy as np
    import torch
    from PIL import Image
    from tqdm import tqdm

    from dpo_sd.files.tensors import TensorStore, content_key

    store = TensorStore(folder / "pictures", torch.uint8)
    settings: dict[str, Any] = {"model": model.fingerprint, "lora": adapter_key(model, "reference")}
    # an int8 base calls itself bfloat16
    kinds = sorted({str(each.dtype) for name, each in model.unet.named_parameters() if "lora_" not in name})
    settings |= {"arithmetic": f"{kinds or model.unet.dtype} on {model.device}", **sampler.settings()}
    keys = [content_key(**settings, prompt=prompt, seed=seed) for prompt, seed in zip(prompts, seeds, strict=True)]
    todo = np.flatnonzero(store.lacks(keys)).tolist()
    with tqdm(total=len(keys), initial=len(keys) - len(todo), desc=what, unit="picture") as bar, reference(model):
        for start in range(0, len(todo), CHUNK):
            rows = todo[start : start + CHUNK]
            pictures = sampler.draw(model, [prompts[row] for row in rows], [seeds[row] for row in rows])
            for row, picture in zip(rows, pictures, strict=True):
                store.put(keys[row], torch.from_numpy(np.array(picture)))
            store.flush()
            bar.update(len(rows))
    return [Image.fromarray(pixels.numpy()) for pixels in store.rows(keys)]
