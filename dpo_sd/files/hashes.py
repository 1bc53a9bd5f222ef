"""What follows from a file's bytes, remembered until the file changes: no reading of everything at every start."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sqlite3
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)
RACY = 2.0  # seconds; a file that changed so shortly ago could change again without a new time stamp


def remembered(files: Iterable[str | Path], what: str, compute: Callable[[str], Any]) -> Iterator[Any]:
    """`compute(file)` of each file, done anew only where path, size, times of change or inode are not as remembered.

    The change time of a file cannot be set back, so an edited file is always noticed. The memory is
    `files.sqlite` in $DPO_SD_CACHE or ~/.cache/dpo_sd; where it cannot be used everything is computed.

    Args:
        files: in any number; they are taken one by one.
        what: name of the computation, with its version.
        compute: from the path of a file to something that JSON holds.

    Raises:
        OSError: when a file cannot be read.
    """
    memory = Path(os.environ.get("DPO_SD_CACHE", "~/.cache/dpo_sd")).expanduser() / "files.sqlite"
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(memory, timeout=30, isolation_level=None)  # every insertion stands by itself
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = OFF")  # what a power cut takes away is computed again
        connection.execute(
            "CREATE TABLE IF NOT EXISTS files (what TEXT, path TEXT, state TEXT, value TEXT, PRIMARY KEY (what, path))"
        )
    except (OSError, sqlite3.Error) as error:
        log.warning("%s cannot be used (%s): files are read anew at every start", memory, error)
        yield from (compute(os.path.abspath(file)) for file in files)
        return
    with closing(connection):
        for file in files:
            yield _remembered(connection, os.path.abspath(file), what, compute)


def _remembered(connection: sqlite3.Connection, file: str, what: str, compute: Callable[[str], Any]) -> Any:
    now, status = time.time(), os.lstat(file)
    if stat.S_ISLNK(status.st_mode):
        file = os.path.realpath(file)
        status = os.stat(file)
    state = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino} {status.st_dev}"
    try:
        row = connection.execute("SELECT state, value FROM files WHERE what = ? AND path = ?", (what, file)).fetchone()
    except sqlite3.Error:  # damaged: the insertion below says so
        row = None
    if row is not None and row[0] == state:
        return json.loads(row[1])
    value = compute(file)
    if now - max(status.st_mtime, status.st_ctime) > RACY:
        try:
            connection.execute(
                "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", (what, file, state, json.dumps(value))
            )
        except sqlite3.Error as error:  # a full disk, or a lock that does not end
            log.warning("%s is not remembered: %s", file, error)
    return value


def sha256(file: str | Path) -> str:
    """SHA-256 of a file's bytes, remembered: 64 hexadecimal digits."""
    target = Path(os.path.realpath(file))
    if target.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", target.name):
        return target.name  # the Hub's cache names a large file by its SHA-256
    return next(remembered([target], "sha256", read_sha256))


def read_sha256(file: str | Path) -> str:
    """SHA-256 of a file's bytes, read now: 64 hexadecimal digits."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
