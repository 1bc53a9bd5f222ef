"""Text files as all kinds of programs leave them."""

from __future__ import annotations

import codecs
import re
from pathlib import Path

from dpo_sd.errors import UserError

_HALF = re.compile("[\ud800-\udfff]")


def utf_8(file: Path) -> bytes:
    """The bytes of a text file without a byte-order mark; where the mark is that of UTF-16, in UTF-8.

    Raises:
        UserError: if the file cannot be read, or is not the UTF-16 that it says it is.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from error
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return _decoded(data, file, "utf-16").encode()
    return data.removeprefix(codecs.BOM_UTF8)


def read_text(file: Path) -> str:
    """The text of a file in UTF-8 or marked UTF-16, without the mark, line ends as they are.

    Raises:
        UserError: as `utf_8`, and if it is in another encoding, naming the first wrong byte.
    """
    text = _decoded(utf_8(file), file, "utf-8")
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{file} is no text in UTF-8 (line {line} has a zero byte, as UTF-16 has): save it as UTF-8")
    return text


def is_text(text: str) -> bool:
    """Whether UTF-8 has bytes for it: not for half of a surrogate pair, as which bytes in a name reach Python too."""
    return _HALF.search(text) is None


def whole(text: str) -> str:
    """The text with � for each half of a surrogate pair, as a cut emoji leaves it; UTF-8 has no bytes for one."""
    return _HALF.sub("\ufffd", text)


def _decoded(data: bytes, file: Path, encoding: str) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{file} is no text in UTF-8 (line {line}, offset {error.start}: byte {data[error.start]:#04x}): save it "
            "as UTF-8"
        ) from error
