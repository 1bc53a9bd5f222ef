"""Atomic writes: files that appear whole or not at all."""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import shutil
import socket
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dpo_sd.files.claims import is_alive

_HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"
_NUMBERS = itertools.count()  # of the files that this process has written
_PARTIAL = re.compile(r"\.([0-9a-f]{8})-(\d+)-\d+\.partial")  # machine and process that write it
_A_DAY = 24 * 60 * 60  # seconds; another machine's process cannot be asked whether it lives


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Context with a path to write instead of `path`: leaving it renames the file, an exception keeps the former one.

    Whatever kills the program meanwhile, and whatever goes wrong, `path` is the old file or the whole new one. What
    killed programs left in its folder is removed.

    Raises:
        OSError: if the folder cannot be made or written, or the disk is full.
    """
    temporary = _temporary(Path(path))
    mode = _mode_of_new_files(temporary)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        with suppress(PermissionError):  # a mount where all files have the same mode
            os.chmod(temporary, mode)  # safetensors makes its files private
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Context with a new folder to fill: leaving it renames the folder to `path`, an exception removes it.

    Raises:
        OSError: if `path` is there and not an empty folder, or cannot be written.
    """
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file in UTF-8 by `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, record: dict[str, Any]) -> None:
    """Writes a record as indented JSON by `replacing`."""
    write_text(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def _temporary(path: Path) -> Path:
    """A new name beside `path`, in its folder, which is made and cleared of what killed programs left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path.parent.absolute())
    return path.with_name(f".{_HOST}-{os.getpid()}-{next(_NUMBERS)}.partial")


@functools.cache  # once is enough
def _remove_abandoned(folder: Path) -> None:
    for file in folder.glob(".*.partial"):
        if match := _PARTIAL.fullmatch(file.name):
            with suppress(OSError):
                old = time.time() - file.stat().st_mtime > _A_DAY
                if old if match[1] != _HOST else not is_alive(int(match[2])):
                    shutil.rmtree(file) if file.is_dir() else file.unlink()


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
