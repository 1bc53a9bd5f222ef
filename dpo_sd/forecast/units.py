"""Quantities as the plan writes them."""

from __future__ import annotations

from collections.abc import Sequence

GIB, MIB = 2**30, 2**20
SIZES = (("GiB", GIB), ("MiB", MIB))
TIMES = (("hour", 3600), ("minute", 60), ("second", 1))
OPERATIONS = (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9))


def counted(n: int | str, what: str) -> str:
    """A number with its noun, in the plural unless it is one: "3 passes"."""
    several = "es" if what.endswith("s") else "s"
    return f"{n} {what}" + ("" if str(n) == "1" else several)


def size(n_bytes: float) -> str:
    unit, length = _unit(n_bytes, SIZES)
    return f"{n_bytes / length:.1f} {unit}"


def gib(n_bytes: float) -> str:
    """GiB as the columns of a table have them, without the unit."""
    return f"{n_bytes / GIB:.2f}"


def duration(seconds: float) -> str:
    unit, length = _unit(seconds / 2, TIMES)  # 119 minutes say more than 2 hours
    number = seconds / length
    return counted(f"{number:.0f}" if number >= 10 else f"{number:.2g}", unit)


def flop(n: float) -> str:
    unit, length = _unit(n, OPERATIONS)
    return f"{n / length:.3g} {unit}"


def _unit(n: float, units: Sequence[tuple[str, float]]) -> tuple[str, float]:
    """The largest unit that goes into the number, or the smallest of all."""
    return next((unit for unit in units if n >= unit[1]), units[-1])
