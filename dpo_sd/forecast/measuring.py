"""Peaks of a run's phases with random weights, as the allocator measures them."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from typing import Any, NamedTuple

import torch

from dpo_sd.forecast.counting import Alive
from dpo_sd.forecast.phases import Forecast, Job, OnCard, update
from dpo_sd.forecast.units import GIB
from dpo_sd.forecast.workload import Workload
from dpo_sd.training.hardware import Hardware


class Peak(NamedTuple):
    """Bytes at the peak of some work.

    Args:
        allocated: of all tensors.
        reserved: with what the allocator holds beside them on a CUDA device; as much as `allocated` elsewhere.
    """

    allocated: int
    reserved: int


def measured(workload: Workload, device: torch.device) -> int:
    """Bytes at the peak of a micro-step, which `Forecast.peak_of_update` foretells; capped as by `cap`."""
    cap(workload.hardware, device)
    card = OnCard.of(workload, device)
    return peak(update(workload, card), device).allocated


def measured_phases(workload: Workload, device: torch.device) -> Iterator[tuple[str, Peak | None]]:
    """Phases of a run, by the names that the plan has for them, with their peaks; None where memory ran out.

    The phases of an update are one, "update"; capped as by `cap`.
    """
    cap(workload.hardware, device)
    forecast, card = Forecast(workload), OnCard.of(workload, device)
    for job in itertools.chain.from_iterable(forecast.jobs(work, card) for work in forecast.works):
        try:
            yield job.name, peak(job, device)
        except torch.OutOfMemoryError:
            yield job.name, None


def cap(hardware: Hardware, device: torch.device) -> None:
    """On a CUDA device, allows this process no more than the card that the hardware names would have."""
    if device.type == "cuda" and hardware.memory_gib is not None:
        share = hardware.memory_gib * GIB / torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)


def peak(job: Job, device: torch.device) -> Peak:
    """Does the job on the device, where its networks are for the while.

    Raises:
        torch.OutOfMemoryError: if it does not fit.
    """
    casting = nullcontext() if job.half is None else torch.autocast(device.type, job.half)
    with ExitStack() as stack:
        for network in job.networks:
            stack.callback(network.to, "cpu")
            network.to(device)
        kept = [tensor.to(device) for tensor in job.stays]
        stack.enter_context(casting)
        stack.enter_context(torch.no_grad())
        if device.type != "cuda":
            before = Alive([*job.tensors, *kept]).now
            allocated = before + _allocated(job.work)
            return Peak(allocated, allocated)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        job.work()
        return Peak(torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device))


def _allocated(work: Callable[[], object]) -> int:
    """Bytes that a CPU's allocator is asked for at the peak of some work, beyond what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    results: Any = profile.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events), default=0)
