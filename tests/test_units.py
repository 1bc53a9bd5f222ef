"""Quantities as a plan writes them."""

from __future__ import annotations

import pytest

from dpo_sd.forecast.units import counted, duration, flop, size


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (counted(1, "pass"), "1 pass"),
        (counted(2, "pass"), "2 passes"),
        (counted("1.5", "update"), "1.5 updates"),
        (duration(0.5), "0.5 seconds"),
        (duration(119), "119 seconds"),
        (duration(2 * 3600), "2 hours"),
        (duration(2 * 3600 - 60), "119 minutes"),
        (size(2**30 - 2**20), "1023.0 MiB"),
        (size(2**30), "1.0 GiB"),
        (flop(1.5e15), "1.5 PFLOP"),
        (flop(1e6), "0.001 GFLOP"),
    ],
)
def test_a_quantity_is_in_the_unit_that_people_read(written, expected):
    assert written == expected
