"""Atomic writes: files that appear whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Context with a path to write instead of `path`: leaving it renames the file, an exception keeps the former one.

    Whatever kills the program meanwhile, and whatever goes wrong, `path` is the old file or the whole new one.

    Raises:
        OSError: if the folder cannot be made or written, or the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    mode = _mode_of_new_files(temporary)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, mode)  # safetensors makes its files private
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file in UTF-8 by `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, record: dict[str, Any]) -> None:
    """Writes a record as indented JSON by `replacing`."""
    write_text(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def _mode_of_new_files(probe: Path) -> int:
    # reading the umask of the process means setting it for a moment, in which other threads make files too open
    with suppress(FileNotFoundError):
        probe.unlink()
    descriptor = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return os.fstat(descriptor).st_mode & 0o777
    finally:
        os.close(descriptor)
        probe.unlink()
