"""Workloads of tests: of the tiny model on the CPU, and of real ones on a card."""

from __future__ import annotations

from typing import Any

from dpo_sd.forecast.workload import Workload
from dpo_sd.lora.attaching import LoRA
from dpo_sd.losses import DiffusionDPOLoss
from dpo_sd.models.sampling import Sampler
from dpo_sd.training.hardware import Hardware
from dpo_sd.training.optimizers import AdamW


def workload(family: Any = "tiny", resolution=64, loss=None, lora=None, cache="all", **hardware: Any) -> Workload:
    parts = (lora or LoRA(rank=4), loss or DiffusionDPOLoss(), AdamW(), Hardware(**hardware), Sampler(batch_size=1))
    return Workload(family, *parts, resolution, cache)


def on_card(
    family: Any,
    resolution: int,
    micro_batch: int = 1,
    weights="bfloat16",
    checkpointing=True,
    memory_gib=8.0,
    **settings: Any,
) -> Workload:
    hardware = {"precision": "bf16-mixed", "weights": weights, "micro_batch": micro_batch, "memory_gib": memory_gib}
    return workload(
        family, resolution, accelerator="cuda", gradient_checkpointing=checkpointing, **hardware, **settings
    )
