"""Operations of a pair, against the passes that it takes."""

from __future__ import annotations

import pytest
from workloads import workload

from dpo_sd.forecast.fitting import using
from dpo_sd.forecast.operations import per_sample
from dpo_sd.forecast.phases import Forecast


@pytest.mark.parametrize("cache", ["all", "off"])
def test_the_operations_of_a_pair_are_those_of_its_passes(cache):
    """Back through a frozen base goes the gradient of what passes alone: as much as forward, and the adapters' own."""
    forecast = Forecast(workload(micro_batch=2, cache=cache))
    needed = per_sample(forecast)
    text = needed.text if cache == "off" else 0.0  # which the encoders do in every pass, without gradients
    assert needed.reference == pytest.approx(needed.forward)
    assert 1.9 < (needed.policy - text) / (needed.forward - text) < 2.3
    assert needed.encoding > 0 and needed.text > 0
    again = per_sample(using(forecast, gradient_checkpointing=True))
    assert again.reference == needed.reference and 0.5 < (again.policy - needed.policy) / needed.forward < 1
