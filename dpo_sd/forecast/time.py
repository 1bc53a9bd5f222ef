"""Hours of a training, from a measured rate or from the figures that cards are sold with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from dpo_sd.forecast.counting import OWNED
from dpo_sd.forecast.operations import Budget, of_training
from dpo_sd.forecast.units import GIB, counted, duration, flop

if TYPE_CHECKING:
    from dpo_sd.data.source import Found
    from dpo_sd.forecast.phases import Forecast

# GiB, and TFLOP/s in dense 16-bit tensor arithmetic with 32-bit sums: NVIDIA's data sheets and architecture papers
CARDS = {
    "RTX 3070": (8, 40.6),
    "RTX 4070": (12, 58.3),
    "RTX 4080": (16, 97.5),
    "RTX 3090": (24, 71.2),
    "RTX 4090": (24, 165.2),
    "A100 80GB": (80, 312.0),
    "H100 SXM": (80, 989.4),
}
# invoke-training's guide names 1.4 s for 8 pairs on an RTX 4090 where 58 TFLOP are done: 25 % of that card's figure
REACHED = 0.25


def at_rate(rate: float, visits: int, sample: str) -> str:
    """Line of the plan for a rate that a run has shown.

    Args:
        rate: samples a second.
        visits: samples behind all updates together.
        sample: word for one of them.
    """
    return f"time     {duration(visits / rate)} for {counted(visits, sample)} at {rate:g} a second"


def time_lines(forecast: Forecast, found: Found, budget: Budget) -> Iterator[str]:
    """Lines of the plan on operations, and on their hours on each of `CARDS` that is large enough."""
    parts = of_training(forecast, found, budget)
    named = ", ".join(f"{name} {flop(count)}" for name, count in parts.items() if count)
    each = " on each device" if budget.devices > 1 else ""
    line = f"time     {named}{each}; samples and verdict not counted"
    if forecast.workload.hardware.accelerator == "cpu":
        yield f"{line}; rate=<pairs a second> turns it into hours"
        return
    yield line
    needs = forecast.worst.needs
    cards = {name: speed for name, (memory, speed) in CARDS.items() if memory * OWNED * GIB >= needs}
    figures = f"at {REACHED:.0%} of a card's figure, not measured:" if cards else "on no card that is listed"
    yield f"           {figures}"
    for name, tera in cards.items():
        yield f"           {name:<10} {duration(sum(parts.values()) / (tera * 1e12 * REACHED))}"
