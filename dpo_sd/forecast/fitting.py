"""Search for the nearest settings whose run fits a card."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from dpo_sd.forecast.phases import WORKS, Forecast
from dpo_sd.forecast.workload import Workload


class Tuned(NamedTuple):
    """A setting that the search may change.

    Args:
        key: key on the command line.
        part: attribute of `Workload` that holds the setting; None where the workload itself does.
        works: keys of `WORKS` whose phases depend on it.
        rebuilds: whether other networks follow from it.
    """

    key: str
    part: str | None
    works: frozenset[str] = frozenset(WORKS)
    rebuilds: bool = True

    def holder(self, workload: Workload) -> Any:
        return workload if self.part is None else getattr(workload, self.part)


TUNED = {  # by attribute
    "micro_batch": Tuned(
        "hardware.micro_batch", "hardware", frozenset({"images of a step", "update", "validation"}), rebuilds=False
    ),
    "gradient_checkpointing": Tuned("hardware.gradient_checkpointing", "hardware", frozenset({"update"})),
    "precision": Tuned("hardware.precision", "hardware"),
    "weights": Tuned("hardware.weights", "hardware"),
    "batch_size": Tuned("sampler.batch_size", "sampler", frozenset({"denoising", "decoding"}), rebuilds=False),
    "cache": Tuned("cache", None),
    "text_encoder": Tuned("lora.text_encoder", "lora"),
    "resolution": Tuned(
        "framing.resolution", None, frozenset({"images", "images of a step", "update", "validation"}), rebuilds=False
    ),
}
SMALLER_WEIGHTS = ("float32", "bfloat16", "int8", "nf4")  # from the largest to the smallest; float16 is as bfloat16


def using(forecast: Forecast, **settings: Any) -> Forecast:
    """A forecast with other values for settings of `TUNED`, which knows the phases that these do not change."""
    values = {name: getattr(TUNED[name].holder(forecast.workload), name) for name in settings}
    new = {name: value for name, value in settings.items() if value != values[name]}
    stale = frozenset().union(*(TUNED[name].works for name in new))
    known = {work: phases for work, phases in forecast.known.items() if work not in stale}
    card = None if any(TUNED[name].rebuilds for name in new) else forecast.built
    return Forecast(_changed(forecast.workload, new), known, card)


def _changed(workload: Workload, settings: dict[str, Any]) -> Workload:
    own = {name: value for name, value in settings.items() if TUNED[name].part is None}
    parts = {part: copy.copy(getattr(workload, part)) for part in ("hardware", "sampler", "lora")}
    for name in settings.keys() - own:
        setattr(parts[TUNED[name].part or ""], name, settings[name])
    return replace(workload, **parts, **own)


def overrides(before: Workload, after: Workload) -> str:
    """Settings of `TUNED` that differ, as they are written on a command line."""
    changed = {
        tuned.key: value
        for name, tuned in TUNED.items()
        if (value := getattr(tuned.holder(after), name)) != getattr(tuned.holder(before), name)
    }
    if "lora.text_encoder" in changed and after.optimizer.text_encoder_lr is not None:
        changed["optimizer.text_encoder_lr"] = "null"
    return " ".join(f"{key}={str(value).lower()}" for key, value in changed.items())


def nearest(start: Forecast, fits: Callable[[Forecast], bool] = Forecast.fits) -> Iterator[Forecast]:
    """The nearest settings that fit, the cheapest first.

    First settings that learn the same, with the base stored smaller only where nothing else fits; then settings that
    leave the text encoders alone; smaller images only where neither is found.

    Args:
        start: settings that do not fit.
        fits: whether a forecast fits.
    """
    workload = start.workload
    bases = [{"weights": weights} for weights in (workload.hardware.weights, *_smaller_weights(workload))]
    kept = [base | {"cache": "all", "text_encoder": False} for base in bases if workload.cache != "all"]
    smaller_images = [{"resolution": side} for side in (768, 512) if side < workload.resolution]
    learns_the_same = [bases, kept] if workload.lora.text_encoder else [kept + bases]

    def first(candidates: list[dict[str, Any]]) -> Forecast | None:
        tried = (_first_that_fits(start, fits, **settings) for settings in candidates)
        return next((found for found in tried if found is not None), None)

    found = False
    for candidates in learns_the_same:
        if (other := first(candidates)) is not None:
            found = True
            yield other
    if not found and (other := first(smaller_images)) is not None:
        yield other


def _smaller_weights(workload: Workload) -> Iterator[str]:
    now = "bfloat16" if workload.hardware.weights == "float16" else workload.hardware.weights
    for weights in SMALLER_WEIGHTS[SMALLER_WEIGHTS.index(now) + 1 :]:
        if workload.hardware.accelerator == "cuda" or weights == "bfloat16":
            yield weights


def _first_that_fits(start: Forecast, fits: Callable[[Forecast], bool], **settings: Any) -> Forecast | None:
    """These settings with the largest micro-batch that fits, checkpointing only where none fits without it."""
    hardware, sampler, pairs = start.workload.hardware, start.workload.sampler, start.workload.pairs
    if settings.get("weights", "float32") != "float32" and hardware.precision == "32-true":
        settings["precision"] = "bf16-mixed"
    micro_batches = [n for n in range(hardware.micro_batch, 0, -1) if pairs % n == 0]
    batch_sizes = [sampler.batch_size >> halvings for halvings in range(sampler.batch_size.bit_length())]
    for checkpointing in sorted({hardware.gradient_checkpointing, True}):
        least = using(start, gradient_checkpointing=checkpointing, micro_batch=1, **settings)
        if least.overweight:
            return None
        drawing = (using(least, batch_size=n) for n in batch_sizes)
        if (least := next(filter(fits, drawing), None)) is not None:
            return next(filter(fits, (using(least, micro_batch=n) for n in micro_batches)))
    return None
