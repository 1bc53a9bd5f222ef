"""From samples to what the training step takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dpo_sd.data.cache import Cache
from dpo_sd.data.frames import Frames, Framing
from dpo_sd.data.latents import Pixels, encode_latents, undecodable
from dpo_sd.data.samples import left_out
from dpo_sd.data.source import PreparedData
from dpo_sd.data.texts import encode_texts, too_long
from dpo_sd.errors import UserError
from dpo_sd.noise import sample_id

if TYPE_CHECKING:
    from dpo_sd.data.batches import PreparedSamples
    from dpo_sd.data.samples import Found, Samples
    from dpo_sd.models.stable_diffusion import StableDiffusion


def prepare(
    model: StableDiffusion, found: Found, framing: Framing, cache: Cache, held_out: Sequence[str] | None = None
) -> PreparedData:
    """Encodes what the cache does not hold yet, and hands over the rest from there.

    Args:
        held_out: prompts for samples and the verdict; None takes those of the validation samples.

    Raises:
        UserError: when all samples of a part turn out unreadable, and when there is no room for the cache.
    """
    report = list(found.report)
    train = _prepare(model, found.train, framing, cache, report, "training")
    validation = _prepare(model, found.validation, framing, cache, report, "validation")
    texts = sorted({*found.train.prompts, *found.validation.prompts})
    report += too_long(model, texts)
    known = set(found.train.prompts)
    candidates = sorted(set(found.validation.prompts)) if held_out is None else list(held_out)
    unseen = [prompt for prompt in candidates if prompt not in known]
    return PreparedData(train, validation, unseen or candidates, report)  # pictures may all have the same caption


def _prepare(
    model: StableDiffusion, samples: Samples, framing: Framing, cache: Cache, report: list[str], what: str
) -> PreparedSamples:
    from dpo_sd.data.batches import Latents, PreparedSamples

    frames, store = Frames(model, samples, framing), None
    if cache.keep == "off":
        broken = undecodable(samples, what)
    else:
        store, broken = encode_latents(model, samples, frames, cache, what)
        report += store.notes
    if broken:
        left_out(f"{what} samples that cannot be read to their end", list(broken.values()), len(samples), report)
        if len(broken) == len(samples):
            raise UserError(f"no {what} sample can be read: {next(iter(broken.values()))}")
        samples = samples.without(broken)
        frames = Frames(model, samples, framing)
    if store is None:
        sides = [Pixels(side, frames) for side in samples.sides]
    else:
        sides = [Latents(store.rows(frames.keys(side)), frames.time_ids(side)) for side in samples.sides]
    if upscaled := frames.upscaled():
        report.append(f"{upscaled} {what} pictures are smaller than the training size and are scaled up")
    if len(used := Counter(frames.numbers.tolist())) > 1:
        named = ", ".join("{}x{}: {}".format(*frames.all_sizes[number], n) for number, n in used.most_common())
        report.append(f"{what} sizes: {named}")
    texts = sorted(set(samples.prompts))
    place = {text: row for row, text in enumerate(texts)}
    return PreparedSamples(
        chosen=sides[0],
        rejected=sides[1] if len(sides) == 2 else None,
        prompts=encode_texts(model, texts, [place[prompt] for prompt in samples.prompts], cache, report),
        label=samples.label,
        weight=samples.weight / samples.weight.mean(),
        sample_ids=np.fromiter(_ids(samples, sorted), np.int64, len(samples)),  # whoever wins
        content_ids=np.fromiter(_ids(samples, list), np.int64, len(samples)),
        sizes=frames.numbers,
        flip=framing.flip,
        random_crop=framing.random_crop,
    )


def _ids(samples: Samples, arranged: Callable[[Iterable[bytes]], list[bytes]]) -> Iterator[int]:
    for row, prompt in enumerate(samples.prompts):
        yield sample_id(prompt, *arranged(bytes(side.sha256[row]) for side in samples.sides))
