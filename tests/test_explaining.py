"""Running out of memory ends in a message that helps."""

from __future__ import annotations

import pytest
import torch
from workloads import on_card, workload

from dpo_sd.errors import UserError
from dpo_sd.forecast.explaining import explained


def test_a_run_out_of_memory_names_what_it_did_what_is_kept_and_what_takes_less():
    def training_step():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    with (
        pytest.raises(UserError) as error,
        explained(on_card("sd15", 512, 4), lambda overrides: f"last.ckpt is kept; go on with resume=run {overrides}"),
    ):
        training_step()
    assert str(error.value) == (
        "out of memory in the forward pass of an update (CUDA out of memory. Tried to allocate 2 GiB.): "
        "last.ckpt is kept; go on with resume=run hardware.micro_batch=2"
    )


def test_other_errors_are_not_explained():
    with pytest.raises(ZeroDivisionError), explained(workload(), str):
        _ = 1 / 0
