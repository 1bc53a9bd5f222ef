"""From samples to the data that training takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from dpo_sd.data.cache import Cache
from dpo_sd.data.frames import Frames, Framing
from dpo_sd.data.latents import encode_latents
from dpo_sd.data.masks import Masks
from dpo_sd.data.pixels import Pixels, undecodable
from dpo_sd.data.source import PreparedData
from dpo_sd.data.splitting import Split
from dpo_sd.data.texts import encode_texts, too_long
from dpo_sd.data.usable import left_out
from dpo_sd.errors import UserError
from dpo_sd.noise import sample_id

if TYPE_CHECKING:
    from dpo_sd.data.batches import PreparedSamples
    from dpo_sd.data.samples import Samples
    from dpo_sd.models.stable_diffusion import StableDiffusion


def prepare(model: StableDiffusion, split: Split, framing: Framing, cache: Cache) -> PreparedData:
    """Encodes what the cache does not hold yet, and reads the rest from there.

    Raises:
        UserError: if no sample of a part can be read to its end, or there is no room for the cache.
    """
    train, of_training = _prepare(model, split.train, framing, cache, "training", split.outside)
    validation, of_validation = _prepare(model, split.validation, framing, cache, "validation", split.outside)
    report = [*split.report, *of_training, *of_validation, *too_long(model, split.prompts)]
    return PreparedData(train, validation, split.held_out, report)


def _prepare(
    model: StableDiffusion, samples: Samples, framing: Framing, cache: Cache, part: str, outside: float
) -> tuple[PreparedSamples, list[str]]:
    """The samples of a part as training takes them, and lines for the report."""
    from dpo_sd.data.batches import Latents, PreparedSamples

    frames, store, report = Frames(model, samples, framing), None, []
    if cache.keep == "off":
        broken = undecodable(samples, part)
    else:
        store, broken = encode_latents(model, samples, frames, cache, part)
        report += store.notes
    if broken:
        if len(broken) == len(samples):
            raise UserError(f"no {part} sample can be read: {next(iter(broken.values()))}")
        report += left_out(f"{part} samples that cannot be read to their end", list(broken.values()), len(samples))
        samples = samples.without(broken)
        frames = Frames(model, samples, framing)
    if store is None:
        sides = [Pixels(side, frames) for side in samples.sides]
    else:
        sides = [Latents(store.rows(frames.keys(side)), frames.time_ids(side)) for side in samples.sides]
    texts = sorted(set(samples.prompts))
    place = {text: row for row, text in enumerate(texts)}
    prompts, notes = encode_texts(model, texts, [place[prompt] for prompt in samples.prompts], cache)
    prepared = PreparedSamples(
        chosen=sides[0],
        rejected=sides[1] if len(sides) == 2 else None,
        prompts=prompts,
        label=samples.label,
        weight=samples.weight / samples.weight.mean(),
        sample_ids=np.fromiter(_ids(samples, sorted), np.int64, len(samples)),  # whoever wins
        content_ids=np.fromiter(_ids(samples, list), np.int64, len(samples)),
        sizes=frames.numbers,
        flip=framing.flip,
        random_crop=framing.random_crop,
        masks=None if samples.masks is None else Masks(samples.masks, frames, outside),
    )
    return prepared, [*report, *_sizes(frames, part), *notes]


def _sizes(frames: Frames, part: str) -> Iterator[str]:
    """Lines for the report where images are scaled up, or trained at several sizes."""
    if upscaled := frames.upscaled():
        yield f"{upscaled} {part} pictures are smaller than the training size and are scaled up"
    if len(used := Counter(frames.numbers.tolist())) > 1:
        named = ", ".join("{}x{}: {}".format(*frames.all_sizes[number], n) for number, n in used.most_common())
        yield f"{part} sizes: {named}"


def _ids(samples: Samples, arranged: Callable[[Iterable[bytes]], list[bytes]]) -> Iterator[int]:
    """An id of each sample's prompt and images, the images arranged in that way."""
    for row, prompt in enumerate(samples.prompts):
        number = 0 if samples.copies is None else samples.copies[row]
        copy = [b"copy %d" % number] if number else []
        yield sample_id(prompt, *arranged(bytes(side.sha256[row]) for side in samples.sides), *copy)
