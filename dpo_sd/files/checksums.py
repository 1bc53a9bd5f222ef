"""Checksums that files carry, by which a changed bit is noticed when they are read (XXH3 of 128 bits)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import xxhash

_MARK = b"dpo_sd xxh3 "  # at the end of a sealed file, before the 32 digits; zip archives may be followed by anything
_LENGTH = len(_MARK) + 32


def seal(file: Path) -> None:
    """Puts the checksum of a zip archive, as torch and numpy write them, behind its end, where no reader looks."""
    with open(file, "ab") as opened:
        opened.write(_MARK + _checksum(file, file.stat().st_size))


def is_whole(file: Path) -> bool:
    """Whether a file is sealed and every bit of it is as it was written.

    Raises:
        OSError: if it cannot be read.
    """
    length = file.stat().st_size - _LENGTH
    if length < 0:
        return False
    with open(file, "rb") as opened:
        opened.seek(length)
        return opened.read() == _MARK + _checksum(file, length)


def _checksum(file: Path, length: int) -> bytes:
    """Checksum of the first bytes of a file."""
    with open(file, "rb") as opened:
        return feed(xxhash.xxh3_128(), opened, 0, length).hexdigest().encode()


def feed(hashed: Any, opened: BinaryIO, begins: int, ends: int) -> Any:
    """The hash, given the bytes of an open file between two places."""
    opened.seek(begins)
    while begins < ends and (block := opened.read(min(ends - begins, 2**20))):
        hashed.update(block)
        begins += len(block)
    return hashed
