"""Origin of a result: commit, versions, device."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any, Literal

import torch

import dpo_sd

PACKAGES = ("torch", "diffusers", "transformers", "peft", "lightning", "hydra-core", "numpy")


def git_commit() -> str | None:
    """Commit of the checkout that the package runs from, with `+changes` if files differ; None outside of one."""

    def git(*arguments: str) -> str:
        folder = Path(dpo_sd.__file__).parent
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def device_name(accelerator: Literal["cpu", "cuda"]) -> str:
    """Name of the GPU, or the processor's kind and number of cores."""
    if accelerator == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {os.cpu_count()} cores"


def versions() -> dict[str, Any]:
    """Versions of this package, its checkout, Python, and the libraries that results depend on."""
    return {
        "version": dpo_sd.__version__,
        "commit": git_commit(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
