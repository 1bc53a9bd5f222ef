"""LoRAs to draw with, each with its weight."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from dpo_sd.errors import UserError
from dpo_sd.lora.finding import lora_digest
from dpo_sd.lora.weights import WEIGHTS_NAME


class WeightedLoRA(NamedTuple):
    """A LoRA to draw with.

    Args:
        path: file or folder, as it was given.
        weight: factor of what it adds; 1 is the strength that it was trained at.
        sha256: digest of the file or folder.
    """

    path: str
    weight: float
    sha256: str


def parse_lora(text: str) -> WeightedLoRA:
    """Reads `file`, `run folder`, or either with its weight as in `style.safetensors:0.8`.

    Raises:
        UserError: if the weight is not finite or the file cannot be used.
    """
    path, colon, weight = text.rpartition(":")
    try:
        strength = float(weight) if colon else 1.0
    except ValueError:  # a colon of the path itself
        colon, strength = "", 1.0
    if not colon:
        path = text
    if not math.isfinite(strength):
        raise UserError(f"loras={text}: the weight must be a finite number, got {weight}")
    return WeightedLoRA(path, strength, lora_digest(path))


def lora_name(path: Path) -> str:
    """The name of a LoRA for people: that of its run, or of its file."""
    if not path.expanduser().is_dir():
        return path.stem
    exported = [file for file in (path.expanduser() / "lora").glob("*.safetensors") if file.name != WEIGHTS_NAME]
    return exported[0].stem if exported else path.name
