"""Peak of an update as the allocator measures it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dpo_sd.data.batches import Batch
from dpo_sd.forecast.counting import Alive
from dpo_sd.forecast.units import GIB
from dpo_sd.forecast.workload import Workload, micro_step
from dpo_sd.lora.adapters import policy_parameters


def measured(workload: Workload, device: torch.device) -> int:
    """Bytes at the peak of a micro-step with random weights, which `Forecast.peak_of_update` foretells.

    On a CUDA device the process may take no more than the card that the hardware names would have.
    """
    cuda = device.type == "cuda"
    if cuda and workload.hardware.memory_gib is not None:
        share = workload.hardware.memory_gib * GIB / torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
    model = workload.build(device)
    module = workload.module(model).to(device)
    module.set_training(True)
    batch, half = workload.batch(model, workload.hardware.micro_batch, device), workload.hardware.half
    trained = list(itertools.chain(*policy_parameters(model).values()))
    state = [torch.empty(workload.optimizer.state_bytes(p.numel()), dtype=torch.uint8, device=device) for p in trained]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)

    def step() -> None:
        with nullcontext() if half is None else torch.autocast(device.type, half):
            loss = micro_step(module, batch)
        torch.autograd.backward(loss)

    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device)
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    before = Alive([*module.parameters(), *module.buffers(), *gradients, *state, *_tensors(batch)]).now
    return before + _allocated(step)


def _allocated(work: Callable[[], None]) -> int:
    """Bytes that the CPU's allocator holds at the peak of some work, beyond what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    results: Any = profile.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events), default=0)


def _tensors(batch: Batch) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tuple(batch)) if isinstance(leaf, Tensor))
