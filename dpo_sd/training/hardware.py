"""The settings that a machine dictates: precision, micro-batch, memory; never what is learnt."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from dpo_sd.errors import UserError, check_range
from dpo_sd.models.families import SHIPPED
from dpo_sd.training.cluster import local_rank

if TYPE_CHECKING:
    import torch

    from dpo_sd.models.quantization import Weights

Accelerator = Literal["cpu", "cuda"]
Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
PRESETS = {8: "1x8gb", 12: "1x12gb", 16: "1x16gb", 24: "1x24gb", 80: "1x80gb"}  # by memory of their card, in GiB
AUTO = "auto"  # the option that takes the preset of this machine
# one of them is there where a GPU is: NVIDIA's driver, Windows' under WSL, AMD's driver, NVIDIA's on a Jetson
DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd", "/dev/nvmap")
ENOUGH = 0.9  # share of the memory a preset's card is sold with: a card never shows a program all that its name says


class Hardware:
    """Settings for one kind of machine.

    Args:
        accelerator: device that the networks live on.
        precision: arithmetic of a training step, in Lightning's words.
        weights: format of the frozen base; adapters always are float32. int8 and nf4 (4 bit) are for its linear
            layers, the rest of it is bfloat16 then.
        micro_batch: pairs in one forward pass on one device, at least 1.
        gradient_checkpointing: computes activations again in the backward pass instead of keeping them.
        num_workers: processes that load data, at least 0.
        memory_gib: memory of the GPU that these values were chosen for, in GiB, positive; None asks for none.
        compile: fuses operations in the UNet's transformer blocks with `torch.compile`, for which the first update
            waits. Where images have several sizes a resumed run may then round otherwise than an uninterrupted one.

    Raises:
        UserError: if a value is out of range.
    """

    def __init__(
        self,
        accelerator: Accelerator = "cpu",
        precision: Precision = "32-true",
        weights: Weights = "float32",
        micro_batch: int = 4,
        gradient_checkpointing: bool = False,
        num_workers: int = 0,
        memory_gib: float | None = None,
        compile: bool = False,
    ) -> None:
        check_range("micro_batch", micro_batch, 1, 4096)
        check_range("num_workers", num_workers, 0, 4 * (os.cpu_count() or 1))
        if memory_gib is not None and not memory_gib > 0:
            raise UserError(f"memory_gib must be positive, got {memory_gib}")
        if precision == "16-mixed" and accelerator == "cpu":
            raise UserError("precision 16-mixed needs a CUDA GPU: use 32-true or bf16-mixed on a CPU")
        if precision == "32-true" and weights != "float32":
            mixed = "hardware.precision=bf16-mixed" + ("" if accelerator == "cpu" else " or 16-mixed")
            raise UserError(f"weights {weights} need a mixed precision, got 32-true: use {mixed}")
        if weights == "nf4" and accelerator == "cpu":
            raise UserError("weights nf4 need a CUDA GPU: use hardware.weights=int8 or float32 on a CPU")
        self.accelerator: Accelerator = accelerator
        self.precision: Precision = precision
        self.weights: Weights = weights
        self.micro_batch = micro_batch
        self.gradient_checkpointing = gradient_checkpointing
        self.num_workers = num_workers
        self.memory_gib = memory_gib
        self.compile = compile

    @property
    def arithmetic(self) -> str:
        """All that decides the rounding of a training step, for keys of caches."""
        return f"{self.precision} {self.weights} {self.accelerator}" + (" compiled" if self.compile else "")

    @property
    def half(self) -> torch.dtype | None:
        """Type in which a training step multiplies; None for single precision."""
        import torch

        return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(self.precision)

    @property
    def device(self) -> torch.device:
        """Device of this process, one of several where a launcher started it."""
        import torch

        return torch.device("cpu" if self.accelerator == "cpu" else f"cuda:{local_rank()}")

    def accumulation(self, pairs_per_update: int, world_size: int = 1) -> int:
        """Number of micro-batches in one update; see `accumulation`."""
        return accumulation(pairs_per_update, self.micro_batch, world_size)

    def check(self, devices: int = 1, preset: str | None = None) -> None:
        """Refuse a machine that cannot do this, before anything is loaded.

        Args:
            devices: number of devices of this machine that the run uses, at least 1.
            preset: name of the option of the hardware group, for the message.

        Raises:
            UserError: if there is no such GPU, there are too few, one lacks the precision or the memory, or the library
                of nf4 or a tool of `compile` is not installed.
        """
        if self.weights == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
            raise UserError(
                "hardware.weights=nf4 needs bitsandbytes, which is not installed: run pip install -e '.[gpu]', "
                "or use hardware.weights=int8"
            )
        if self.compile:
            _check_compiler(self.accelerator)
        if self.accelerator == "cpu":
            check_range("trainer.devices", devices, 1, 2 * (os.cpu_count() or 1))
            return
        import torch

        wanted = "hardware.accelerator=cuda" if preset is None else f"hardware={preset}"
        if not torch.cuda.is_available():
            raise UserError(
                f"{wanted} needs a CUDA GPU, but this machine has none ({os.cpu_count()} CPU cores): use hardware=cpu"
            )
        if torch.cuda.device_count() < devices:
            raise UserError(
                f"trainer.devices={devices} needs as many GPUs, but this machine has {torch.cuda.device_count()}: "
                f"use trainer.devices={torch.cuda.device_count()}"
            )
        gpu = torch.cuda.get_device_properties(0)
        needs_bf16 = self.precision == "bf16-mixed" or self.weights == "bfloat16"
        # emulated bfloat16 would run, at a fraction of the speed
        if needs_bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
            weights = " hardware.weights=float16" if self.weights == "bfloat16" else ""
            raise UserError(
                f"{wanted} computes in bfloat16, which {gpu.name} cannot: use hardware.precision=16-mixed{weights}"
            )
        memory_gib = gpu.total_memory / 2**30
        if self.memory_gib is not None and memory_gib < ENOUGH * self.memory_gib:
            raise UserError(
                f"{wanted} is made for {self.memory_gib:g} GiB, but {gpu.name} has {memory_gib:.1f}: "
                f"use hardware={_largest_preset(memory_gib)}, or hardware.memory_gib=null to try nevertheless"
            )


class Choice(NamedTuple):
    """The preset that `hardware=auto` takes, and why."""

    preset: str
    why: str


def auto(model: str) -> Choice:
    """The largest preset that the first GPU of this machine holds; cpu where it holds none, and for the tiny model.

    Args:
        model: option of the group `model`.
    """
    if model == SHIPPED:
        return Choice("cpu", f"model={model} needs no GPU")
    gpu = _first_gpu()
    if gpu is None:
        return Choice("cpu", "no CUDA GPU is found")
    memory_gib = gpu.total_memory / 2**30
    preset = _largest_preset(memory_gib)
    return Choice(preset, f"{gpu.name}, {memory_gib:.1f} GiB" + (", is too small" if preset == "cpu" else ""))


def _largest_preset(memory_gib: float) -> str:
    return next((name for gib, name in sorted(PRESETS.items(), reverse=True) if memory_gib >= ENOUGH * gib), "cpu")


def _first_gpu() -> Any:
    """What torch says of it; None where there is none. Torch takes seconds to import, and is not where no driver is."""
    if "torch" not in sys.modules and not any(map(os.path.exists, DRIVERS)):
        return None
    import torch

    return torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None


def _check_compiler(accelerator: Accelerator) -> None:
    """Refuse a machine without what torch.compile calls: a C++ compiler, Python's headers, and on a GPU Triton."""
    lacking = [] if any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))) else ["a C++ compiler"]
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        lacking.append("Python's headers")
    if accelerator == "cuda" and importlib.util.find_spec("triton") is None:
        lacking.append("triton")
    if lacking:
        raise UserError(
            f"hardware.compile=true needs {' and '.join(lacking)}: install it (on Debian g++ and python3-dev, and "
            "pip install triton), or leave hardware.compile out"
        )


def accumulation(pairs_per_update: int, micro_batch: int, world_size: int = 1) -> int:
    """Number of micro-batches on every process in one optimiser update.

    Args:
        pairs_per_update: pairs behind one update, over all processes, at least 1.
        micro_batch: pairs in one forward pass of one process, at least 1.
        world_size: number of processes, at least 1.

    Raises:
        UserError: if a number is below 1, or pairs_per_update is not divisible by micro_batch times world_size.
    """
    for name, value in (
        ("pairs_per_update", pairs_per_update),
        ("hardware.micro_batch", micro_batch),
        ("world_size", world_size),
    ):
        check_range(name, value, 1)
    together = micro_batch * world_size
    if pairs_per_update % together:
        below = pairs_per_update // together * together
        nearest = f"{below} or {below + together}" if below else f"{together}"
        raise UserError(
            f"pairs_per_update={pairs_per_update} does not divide into {together} pairs at a time "
            f"(hardware.micro_batch={micro_batch} on each of {world_size} devices): "
            f"use pairs_per_update={nearest}, or another hardware.micro_batch"
        )
    return pairs_per_update // together
