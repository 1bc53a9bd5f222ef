"""Names of files: as other systems spell them, and as a message can hold them."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from functools import lru_cache
from pathlib import Path, PurePosixPath


def spelt(folder: str | Path, relative: str) -> str:
    """The path of a file in a folder as the disk spells it, where a text may spell it in the way of another system.

    A file of just this name comes first. Otherwise an accent may be one character or two (macOS), backslashes may
    stand between folders (Windows), blanks around the path do not count, nor does the case of letters where only one
    name is meant, and an absolute path or one with ".." may lead into the folder.

    Args:
        folder: where the path begins.
        relative: the path as the text has it.

    Returns:
        The path below the folder; an address, a path that leads out of it, and one of no file as they are.
    """
    direct = not os.path.isabs(relative) and ".." not in relative
    if direct and os.path.lexists(os.path.join(folder, relative)):
        return relative
    for root in (os.path.abspath(folder), os.path.realpath(folder)):
        path = PurePosixPath(os.path.normpath(os.path.join(root, relative.strip().replace("\\", "/"))))
        if path.is_relative_to(root):
            break
    else:
        return relative
    found = ""
    for part in path.relative_to(root).parts:
        place = os.path.join(folder, found)
        if not os.path.lexists(os.path.join(place, part)):
            try:
                names, alone = _names(place, os.stat(place).st_mtime_ns)
            except (OSError, ValueError):  # a zero byte is in no name
                return relative
            part = names.get(composed(part)) or alone.get(composed(part).casefold(), "")
            if not part:
                return relative
        found = os.path.join(found, part)
    return found or relative


def composed(name: str) -> str:
    """A name with each accented letter as one character, as most systems write it; macOS writes two."""
    return unicodedata.normalize("NFC", name)


@lru_cache(maxsize=64)
def _names(folder: str, changed: int) -> tuple[dict[str, str], dict[str, str]]:
    """The names in a folder by their composed form, and by its case-folded one those that are alone in it.

    Args:
        changed: time of its last change, so that a later look is a new one.
    """
    names = {composed(name): name for name in os.listdir(folder)}
    folded = Counter(map(str.casefold, names))
    return names, {key: name for whole, name in names.items() if folded[key := whole.casefold()] == 1}


def printable(text: str) -> str:
    """The text on one line, with escapes for what cannot be printed: line ends, controls, bytes that are not UTF-8."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)
