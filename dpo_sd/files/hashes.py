"""Per-file results (hash, size, decodability), kept in SQLite until the file changes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sqlite3
import stat
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)
RACY = 2.0  # seconds; a file that has changed this recently could change again without a new time stamp


def remembered(
    files: Iterable[str | Path],
    what: str,
    compute: Callable[[str], Any],
    unreadable: Callable[[str, OSError], Any] | None = None,
) -> Iterator[Any]:
    """`compute(file)` of each file; it is called only if path, size, times of change or inode are new.

    The change time of a file cannot be set back, so an edited file is always noticed. The results are kept in
    `files.sqlite` in $DPO_SD_CACHE or ~/.cache/dpo_sd; if that cannot be used, everything is computed.

    Args:
        files: any number of files, which are taken one by one.
        what: name of the computation, with its version.
        compute: makes a result that JSON can hold from the path of a file.
        unreadable: makes the result for a file that cannot be read, which is not kept; None raises.

    Raises:
        OSError: if a file cannot be read and there is no `unreadable`.
    """

    def tried(file: str, result: Callable[[str], Any]) -> Any:
        try:
            return result(file)
        except OSError as error:
            if unreadable is None:
                raise
            return unreadable(file, error)

    memory = Path(os.environ.get("DPO_SD_CACHE") or "~/.cache/dpo_sd") / "files.sqlite"
    try:
        memory = memory.expanduser()
        memory.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(memory, timeout=30, isolation_level=None)  # each insertion is committed at once
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = OFF")  # what a power cut takes away is computed again
        connection.execute(
            "CREATE TABLE IF NOT EXISTS files (what TEXT, path TEXT, state TEXT, value TEXT, PRIMARY KEY (what, path))"
        )
    except (OSError, RuntimeError, sqlite3.Error) as error:  # a user without a home has no ~
        log.warning("%s cannot be used (%s): files are read anew at every start", memory, error)
        yield from (tried(os.path.abspath(file), compute) for file in files)
        return
    with closing(connection):
        for file in files:
            yield tried(os.path.abspath(file), lambda file: _remembered(connection, file, what, compute))


def _remembered(connection: sqlite3.Connection, file: str, what: str, compute: Callable[[str], Any]) -> Any:
    now, status = time.time(), os.lstat(file)
    if stat.S_ISLNK(status.st_mode):
        file = os.path.realpath(file)
        status = os.stat(file)
    state = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino} {status.st_dev}"
    path = file.encode("utf-8", "backslashreplace").decode()  # SQLite takes no name that is not UTF-8
    try:
        row = connection.execute("SELECT state, value FROM files WHERE what = ? AND path = ?", (what, path)).fetchone()
    except sqlite3.Error:  # damaged: the insertion below says so
        row = None
    if row is not None and row[0] == f"{state} {_checksum(row[1])}":
        return json.loads(row[1])
    value = compute(file)
    if now - max(status.st_mtime, status.st_ctime) > RACY:
        try:
            text = json.dumps(value)
            connection.execute(
                "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", (what, path, f"{state} {_checksum(text)}", text)
            )
        except sqlite3.Error as error:  # a full disk, or a lock that does not end
            log.warning("%s is not remembered: %s", file, error)
    return value


def _checksum(text: Any) -> int:
    """Checksum of a result as it is kept: what is not of our writing is computed again."""
    return zlib.crc32(str(text).encode())


def sha256(file: str | Path) -> str:
    """SHA-256 of a file's bytes, read only if the file is new or has changed: 64 hexadecimal digits."""
    target = Path(os.path.realpath(file))
    if target.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", target.name):
        return target.name  # the Hub's cache names a large file by its SHA-256
    return next(remembered([target], "sha256", read_sha256))


def read_sha256(file: str | Path) -> str:
    """SHA-256 of a file's bytes as they are now: 64 hexadecimal digits."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
