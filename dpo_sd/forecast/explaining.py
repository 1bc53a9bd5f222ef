"""Running out of memory, explained."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from dpo_sd.errors import UserError
from dpo_sd.forecast.counting import CONTEXT

if TYPE_CHECKING:
    from dpo_sd.forecast.workload import Workload

DOING = {  # functions in a traceback: what was being done in them, and how the names of its phases begin
    "prepare": ("encoding the data", "encoding"),
    "draw": ("drawing pictures", "samples"),
    "validate": ("the validation", "validation"),
    "training_step": ("the forward pass of an update", "update"),
    "backward": ("the backward pass of an update", "update"),
}


@contextmanager
def explained(training: Workload, go_on: Callable[[str], str]) -> Iterator[None]:
    """Turns a card that has no more memory into a message with the nearest settings that take less.

    Args:
        go_on: what is kept, and the command that goes on with these overrides.

    Raises:
        UserError: when memory ran out inside.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        frames = traceback.extract_tb(error.__traceback__)
        doing, of = next((DOING[frame.name] for frame in frames if frame.name in DOING), ("the training", ""))
        # the plan was too hopeful: clearly less than it said is wanted
        said = max(phase.needs for phase in training.phases if phase.name.startswith(of))
        smaller = training.nearest(round(0.9 * (said - CONTEXT)) + CONTEXT, of)
        now = (training.resolution, training.cache)  # which a run that goes on cannot change
        found = next((other.overrides for other in smaller if (other.resolution, other.cache) == now), "")
        only = "" if found else "only a smaller framing.resolution or sampler.height takes less; "
        raise UserError(f"out of memory in {doing} ({str(error).splitlines()[0]}): {only}{go_on(found)}") from error
