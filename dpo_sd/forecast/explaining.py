"""Running out of memory, explained with the nearest settings that take less."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from dpo_sd.errors import UserError
from dpo_sd.forecast.counting import CONTEXT
from dpo_sd.forecast.fitting import nearest, overrides
from dpo_sd.forecast.phases import Forecast
from dpo_sd.forecast.workload import Workload
from dpo_sd.models.sampling import Sampler
from dpo_sd.training.hardware import PRESETS, Hardware

DOING = {  # by functions in a traceback: what they do, and how the names of their phases begin
    "prepare": ("encoding the data", "encoding"),
    "draw": ("drawing pictures", "samples"),
    "validate": ("the validation", "validation"),
    "training_step": ("the forward pass of an update", "update"),
    "backward": ("the backward pass of an update", "update"),
}


@contextmanager
def explained(workload: Workload, go_on: Callable[[str], str]) -> Iterator[None]:
    """Context that turns an exhausted card into a message with the nearest settings that take less.

    Args:
        workload: settings of the run.
        go_on: given overrides, says what is kept and names the command that goes on with them.

    Raises:
        UserError: if memory runs out inside.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        frames = traceback.extract_tb(error.__traceback__)
        doing, of = next((DOING[frame.name] for frame in frames if frame.name in DOING), ("the training", ""))
        found = smaller(Forecast(workload), of)
        only = "" if found else "only a smaller framing.resolution or sampler.height takes less; "
        raise UserError(f"out of memory in {doing} ({str(error).splitlines()[0]}): {only}{go_on(found)}") from error


@contextmanager
def drawing_explained(sampler: Sampler, hardware: Hardware) -> Iterator[None]:
    """Context in which pictures are drawn, that turns an exhausted card into a message with settings that take less.

    Raises:
        UserError: if memory runs out inside.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        fewer = f"go on with sampler.batch_size={sampler.batch_size // 2}. " if sampler.batch_size > 1 else ""
        presets = [name for gib, name in PRESETS.items() if gib < (hardware.memory_gib or 0)]
        preset = f" or a smaller preset (hardware={presets[-1]})" if presets else ""
        stored = "" if hardware.weights in ("int8", "nf4") else " or a base in 8 bit (hardware.weights=int8)"
        raise UserError(
            f"out of memory in drawing ({str(error).splitlines()[0]}); what is drawn is kept. {fewer.capitalize()}"
            f"Less is taken by a smaller sampler.width and sampler.height too{preset}{stored}; where the command then "
            "says that the folder was drawn with other settings, name another one with out="
        ) from error


def smaller(forecast: Forecast, of: str) -> str:
    """Overrides with which a run can go on in clearly less memory; empty where there are none.

    Args:
        of: beginning of the names of the phases that ran out of memory.
    """
    workload = forecast.workload
    # the forecast was too low: nine tenths of it leave room for that
    needed = max(phase.needs for phase in forecast.phases if phase.name.startswith(of))
    limit = round(0.9 * (needed - CONTEXT)) + CONTEXT
    for other in nearest(forecast, lambda other: other.fits(limit, of)):
        if (other.workload.resolution, other.workload.cache) == (workload.resolution, workload.cache):
            return overrides(workload, other.workload)  # a run that goes on cannot change the other two
    return ""
