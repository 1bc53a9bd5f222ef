"""The shapes world as training data: pairs that the model draws and an oracle labels, and images in a style."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dpo_sd.annotation.simulated import SimulatedAnnotator
from dpo_sd.data.cache import Cache
from dpo_sd.data.drawn import encode_drawn
from dpo_sd.data.source import Found, PreparedData, Source, checked_dropout
from dpo_sd.data.texts import too_long
from dpo_sd.errors import UserError, check_range
from dpo_sd.lora.adapters import adapter_key, reference
from dpo_sd.noise import generator, image_seed, sample_id
from dpo_sd.shapes.captions import split_prompts
from dpo_sd.shapes.scenes import RESOLUTION, STYLES

if TYPE_CHECKING:
    from PIL import Image

    from dpo_sd.data.batches import PreparedSamples
    from dpo_sd.data.frames import Framing
    from dpo_sd.models.sampling import Sampler
    from dpo_sd.models.stable_diffusion import StableDiffusion

CHUNK = 64  # images kept together: what a killed run has to draw again at most
MOST = 10_000_000  # samples: more than are drawn in years


class _World(Source):
    """Source of images on prompts of the shapes world, of which one seed always gives the same.

    Args:
        n: training samples; prompts come again with new images when there are more samples than prompts.
        n_validation: samples of the fixed validation grid.
        caption_dropout: share of visits that train on the empty prompt, in [0, 1].
        seed: seed of the split of the prompts.

    Raises:
        UserError: if a number is out of range.
    """

    fixed_resolution: ClassVar[int | None] = RESOLUTION

    def __init__(self, n: int, n_validation: int, caption_dropout: float, seed: int):
        self.n, self.n_validation, self.seed = n, n_validation, seed
        self.caption_dropout = checked_dropout(caption_dropout)
        self.prompts = split_prompts(seed)
        if not 1 <= n_validation <= len(self.prompts.validation):
            raise UserError(f"n_validation must be between 1 and {len(self.prompts.validation)}, got {n_validation}")

    def check(self, model: StableDiffusion) -> None:
        """Refuses a model that draws images of another size.

        Raises:
            UserError: if it does.
        """
        if model.resolution != RESOLUTION:
            raise UserError(
                f"the pictures of the shapes world have {RESOLUTION} pixels, but {model.name} draws "
                f"{model.resolution}: use model=tiny, or another data: pairs, pickapic or captions"
            )

    def find(self, cache: Cache, fetch: bool) -> Found:
        """The samples that will be drawn, which need no looking for."""
        kind, unknown = ("pair", ", so ties are not known yet") if self.has_pairs else ("picture", "")
        line = f"{self.n} {kind}{'' if self.n == 1 else 's'}: to be drawn{unknown}"
        both = self.n + self.n_validation
        prompts = sorted({*self.prompts.train[: self.n], *self.prompts.validation[: self.n_validation]})
        drawn = 2 * both if self.has_pairs else 0  # the others are rendered
        return Found(self.n, self.n_validation, both, prompts, [line], self.prompts.held_out, drawn, cached=False)


class Shapes(_World):
    """Pairs drawn by the model on prompts of the shapes world, and labelled by an oracle.

    The 520 full captions are split by `seed`: 60 % for training, 10 % for validation, 30 % for the verdict.

    Args:
        n_pairs: training pairs; prompts come again with new images when there are more pairs than prompts.
        n_validation: pairs of the fixed validation grid.
        preference: taste of the oracle that labels, a name in `dpo_sd.shapes.oracle.UTILITIES`.
        style: style that it reads the images in, one of `dpo_sd.shapes.scenes.STYLES`.
        temperature, tie_band, side_bias, flip_rate: faults of the labels, see `SimulatedAnnotator`.
        caption_dropout: share of visits that train on the empty prompt, in [0, 1].
        seed: seed of the split, the images and the labels.

    Raises:
        UserError: if a setting is out of range or a name is unknown.
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

        check_range("n_pairs", n_pairs, 1, MOST)
        super().__init__(n_pairs, n_validation, caption_dropout, seed)
        self.oracle = Oracle(preference, style)
        self.labeller = self.oracle.name
        self.annotator = SimulatedAnnotator(temperature, tie_band, side_bias, flip_rate, seed)

    def prepare(self, model: StableDiffusion, sampler: Sampler, framing: Framing, cache: Cache) -> PreparedData:
        """Draws, labels and encodes the pairs; images already in the cache are read.

        Raises:
            UserError: if all pairs of a part are ties.
        """
        train, report = self._pairs(model, sampler, cache, self.prompts.train, self.n, "training")
        validation, more = self._pairs(model, sampler, cache, self.prompts.validation, self.n_validation, "validation")
        return PreparedData(train, validation, self.prompts.held_out, report + more)

    def _pairs(
        self, model: StableDiffusion, sampler: Sampler, cache: Cache, prompts: list[str], n: int, part: str
    ) -> tuple[PreparedSamples, list[str]]:
        """n labelled pairs, and lines for the report."""
        wanted = [(prompts[i % len(prompts)], i // len(prompts)) for i in range(n)]
        captions = [prompt for prompt, _ in wanted for _ in range(2)]
        seeds = [image_seed(self.seed, prompt, set_index, k) for prompt, set_index in wanted for k in range(2)]
        images = _drawn(model, sampler, cache.folder, captions, seeds, f"drawing {part} pairs")
        scores = self.oracle.scores(images, captions)
        ties, chosen, rejected, ids, kept = 0, [], [], [], []
        for i, (prompt, _) in enumerate(wanted):
            first, second = 2 * i, 2 * i + 1  # rows of the pair's images
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
            raise UserError(f"all {n} {part} pairs are ties: {why}")
        report = [f"{part}: {len(kept)} pairs on {len(set(kept))} prompts, {ties} ties left out"]
        return encode_drawn(model, kept, chosen, rejected, ids, cache.keep), [*report, *too_long(model, kept)]


class Renders(_World):
    """Rendered images of the shapes world in one style, with captions, for the training of a style LoRA.

    Args:
        style: one of `dpo_sd.shapes.scenes.STYLES`.
        n_pictures: training images; prompts come again with new ones when there are more images than prompts.
        n_validation: images of the fixed validation grid.
        caption_dropout: share of visits that train on the empty prompt, in [0, 1].
        seed: seed of the split of the captions, as in `Shapes`, and of the images.

    Raises:
        UserError: if a setting is out of range or the style is unknown.
    """

    has_pairs: ClassVar[bool] = False

    def __init__(
        self,
        style: str = "pastel",
        n_pictures: int = 1024,
        n_validation: int = 32,
        caption_dropout: float = 0.1,
        seed: int = 0,
    ):
        from dpo_sd.shapes.oracle import check_known

        check_range("n_pictures", n_pictures, 1, MOST)
        super().__init__(n_pictures, n_validation, caption_dropout, seed)
        check_known(style, STYLES, "style")
        self.style = style

    def prepare(self, model: StableDiffusion, sampler: Sampler, framing: Framing, cache: Cache) -> PreparedData:
        """Renders and encodes the images."""
        train = self._images(model, cache, self.prompts.train, self.n)
        validation = self._images(model, cache, self.prompts.validation, self.n_validation)
        report = [f"{len(train)} rendered pictures in the {self.style} style on {len(train.prompts.texts)} prompts"]
        return PreparedData(train, validation, self.prompts.held_out, report)

    def _images(self, model: StableDiffusion, cache: Cache, prompts: list[str], n: int) -> PreparedSamples:
        from dpo_sd.shapes.captions import kind
        from dpo_sd.shapes.render import render
        from dpo_sd.shapes.scenes import random_scene

        captions = [prompts[i % len(prompts)] for i in range(n)]
        images = []
        for i, prompt in enumerate(captions):
            rng = generator(self.seed, sample_id(prompt), i // len(prompts), "render")
            images.append(render(random_scene(rng, kind(prompt), None, self.style)))
        ids = [sample_id(prompt, image.tobytes()) for prompt, image in zip(captions, images, strict=True)]
        return encode_drawn(model, captions, images, None, ids, cache.keep)


def _drawn(
    model: StableDiffusion, sampler: Sampler, folder: Path, prompts: list[str], seeds: list[int], what: str
) -> list[Image.Image]:
    """Images drawn by the reference, one per prompt and seed; each is drawn once and kept in the folder.

    Args:
        what: text before the progress bar.
    """
    import numpy as np
    import torch
    from PIL import Image
    from tqdm import tqdm

    from dpo_sd.files.tensors import TensorStore, content_key

    store = TensorStore(folder / "pictures", torch.uint8)
    settings: dict[str, Any] = {"model": model.fingerprint, "lora": adapter_key(model, "reference")}
    # an int8 base calls itself bfloat16
    kinds = sorted({str(each.dtype) for name, each in model.unet.named_parameters() if "lora_" not in name})
    settings |= {
        "arithmetic": f"{kinds or model.unet.dtype} on {model.device}",
        **sampler.settings(model.noise_scheduler),
    }
    keys = [content_key(**settings, prompt=prompt, seed=seed) for prompt, seed in zip(prompts, seeds, strict=True)]
    todo = np.flatnonzero(store.lacks(keys)).tolist()
    with tqdm(total=len(keys), initial=len(keys) - len(todo), desc=what, unit="picture") as bar, reference(model):
        images = sampler.stream(model, [prompts[row] for row in todo], [seeds[row] for row in todo])
        for done, (row, image) in enumerate(zip(todo, images, strict=True), start=1):
            store.put(keys[row], torch.from_numpy(np.array(image)))
            bar.update()
            if done % CHUNK == 0 or done == len(todo):
                store.flush()
    return [Image.fromarray(pixels.numpy()) for pixels in store.rows(keys)]
