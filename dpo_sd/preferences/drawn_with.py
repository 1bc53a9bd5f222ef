"""The record of how the images of a pair folder were drawn: model, LoRAs, seed and sampler, in generate.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dpo_sd.errors import UserError
from dpo_sd.files.atomic import write_json

RECORD = "generate.json"
_LORA = {"path": str, "weight": int | float, "sha256": str}


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Writes how the images of a folder are drawn, whole or not at all.

    Args:
        folder: the pair folder, made where there is none.
        record: with at least "model", the base's name, and "loras", a list of dicts of path, weight and sha256.

    Raises:
        OSError: if the folder cannot be written.
    """
    write_json(folder / RECORD, record)


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a folder; None for a folder without one.

    Raises:
        UserError: if the record is damaged.
    """
    file = folder / RECORD
    if not file.exists():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        fitting = [isinstance(lora[key], kind) for lora in record["loras"] for key, kind in _LORA.items()]
        if not (isinstance(record["model"], str) and all(fitting)):
            raise ValueError("a value is of another type")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}): choose another folder with out=") from error
    return record


def drawn_with(folder: Path) -> dict[str, Any] | None:
    """The record of a folder; None where it has none that can be read, as with images from elsewhere."""
    try:
        return read_record(folder)
    except UserError:
        return None
