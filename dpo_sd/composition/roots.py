"""The types of the top level of each command's settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class Train:
    """Types of the top level of train.yaml, which holds the values; the groups bring types of their own."""

    name: str = MISSING
    seed: int = MISSING
    pairs_per_update: int = MISSING
    resume: str | None = MISSING
    cache: str = field(default=MISSING, metadata={"choices": ("all", "latents", "off")})
    cache_dir: str = MISSING
    model: Any = MISSING
    lora: Any = MISSING
    data: Any = MISSING
    loss: Any = MISSING
    judge: Any = MISSING
    optimizer: Any = MISSING
    trainer: Any = MISSING
    callbacks: Any = field(default_factory=dict)
    logger: Any = field(default_factory=dict)
    sampler: Any = MISSING
    framing: Any = MISSING
    noising: Any = MISSING
    hardware: Any = MISSING


@dataclass
class Plan(Train):
    """Types of the top level of plan.yaml."""

    rate: float | None = MISSING
    measure: bool = MISSING


@dataclass
class Benchmark(Train):
    """Types of the top level of benchmark.yaml."""

    card: bool = MISSING


@dataclass
class Generate:
    """Types of the top level of generate.yaml."""

    out: str = MISSING
    prompts: Any = field(default=MISSING, metadata={"choices": ()})  # no group: text or a list
    loras: Any = field(default=MISSING, metadata={"choices": ()})
    set_size: int = MISSING
    num_sets: int = MISSING
    seed: int = MISSING
    model: Any = MISSING
    sampler: Any = MISSING
    hardware: Any = MISSING


@dataclass
class Annotate:
    """Types of the top level of annotate.yaml."""

    pairs: str = MISSING
    merge: list[str] = field(default_factory=list)
    export: str | None = MISSING
    annotator: Any = MISSING
    judge: Any = field(default_factory=dict)


@dataclass
class Exported:
    """Types of `lora` in export.yaml, for which `lora=<path>` stands."""

    path: str | None = None


@dataclass
class Export:
    """Types of the top level of export.yaml."""

    lora: Exported = field(default_factory=Exported)
    format: str = field(default=MISSING, metadata={"choices": ("kohya", "diffusers", "peft", "merged")})
    out: str = MISSING
    model: Any = MISSING


@dataclass
class Trainer:
    """Types of the trainer group, whose values conf/trainer holds and the entry point reads."""

    max_steps: int = MISSING
    max_epochs: float | None = MISSING
    max_hours: float | None = MISSING
    ema_decay: float | None = MISSING
    validate_every: int = MISSING
    log_every: int = MISSING
    devices: int = MISSING
    num_nodes: int = MISSING
    strategy: str = field(default=MISSING, metadata={"choices": ("auto", "ddp")})
    gradient_clip: float | None = MISSING
    deterministic: bool = MISSING
