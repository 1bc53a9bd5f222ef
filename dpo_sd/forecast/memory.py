"""The plan's table of memory, phase by phase, and whether the card has room for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from dpo_sd.forecast.counting import CONTEXT, OWNED, SPARE, Phase
from dpo_sd.forecast.fitting import nearest, overrides
from dpo_sd.forecast.phases import Forecast
from dpo_sd.forecast.units import GIB, counted, gib, size


def memory_lines(forecast: Forecast, pairs_per_update: int) -> Iterator[str]:
    """Lines of the plan on memory: what stays on the card, every phase, and the phase that needs the most.

    Args:
        pairs_per_update: samples behind one update, over all devices.
    """
    workload = forecast.workload
    hardware = workload.hardware
    yield f"model    {workload.family} at {workload.resolution} pixels, {hardware.weights}, {hardware.precision}"
    checkpointing = ", gradient checkpointing" if hardware.gradient_checkpointing else ""
    compiled = ", planned as if it were not compiled" if hardware.compile else ""
    each = f"{hardware.micro_batch} at a time{checkpointing}{compiled}"
    yield f"update   {counted(pairs_per_update, workload.sample)}, {each}"
    yield "stays    " + ", ".join(f"{name} {size(part)}" for name, part in forecast.card.sizes.items() if part)
    yield ""
    no_card = hardware.accelerator == "cpu" and workload.limit is None
    columns = ("stays", "passes", "peak") if no_card else ("stays", "passes", "peak", "needs")
    yield f"{'GiB':<20} " + " ".join(f"{column:>7}" for column in columns)
    for phase in forecast.phases:
        yield f"{phase.name:<20} " + " ".join(f"{gib(getattr(phase, column)):>7}" for column in columns)
    yield ""
    yield from _no_card_lines(forecast) if no_card else _card_lines(forecast)


def _no_card_lines(forecast: Forecast) -> Iterator[str]:
    worst = forecast.worst
    yield f"peak     {gib(worst.peak)} GiB in {worst.name}, beside what Python and PyTorch take for themselves"


def _card_lines(forecast: Forecast) -> Iterator[str]:
    yield (
        f"needs    the peak, {SPARE:.0%} of what passes for gaps and workspaces, {gib(CONTEXT)} GiB for CUDA: "
        "allowances, not measured"
    )
    worst, workload = forecast.worst, forecast.workload
    if workload.limit is None:
        yield f"fits?    {needs(worst)} GiB; hardware.memory_gib, the card's, is not given"
        return
    card = f"{gib(workload.limit)} GiB, {OWNED:.0%} of the card's {workload.hardware.memory_gib:g}"
    yield f"fits?    {'yes' if forecast.fits() else 'no'}: {needs(worst)} of {card}"


def needs(phase: Phase) -> str:
    return f"{phase.name} needs {gib(phase.needs)}"


def advice(forecast: Forecast, allowed: Callable[[str], bool]) -> str:
    """Overrides of settings that fit, one a line; the smallest card that does where a training may have none of them.

    Args:
        forecast: settings that do not fit.
        allowed: whether a training may have such overrides.
    """
    settings = (overrides(forecast.workload, other.workload) for other in nearest(forecast))
    if found := [f"\n  {each}" for each in settings if allowed(each)]:
        return "does not fit: the nearest that does, the cheapest first" + "".join(found)
    return (
        f"does not fit: no setting is known that does (a smaller lora.rank or optimizer=adamw8bit may); "
        f"the smallest card for it has {smallest_card(forecast)} GiB"
    )


def smallest_card(forecast: Forecast) -> int:
    """GiB that a card must be sold with to hold every phase."""
    return math.ceil(forecast.worst.needs / (OWNED * GIB))
