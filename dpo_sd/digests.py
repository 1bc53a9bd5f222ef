"""SHA-256 of files, remembered until a file changes: content addresses without reading everything at every start."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sqlite3
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path

log = logging.getLogger(__name__)

RACY = 2.0  # seconds; a file that changed so shortly ago could change again without a new time stamp


def digest(file: str | Path) -> str:
    """SHA-256 of a file's bytes: 64 hexadecimal digits; see `digests`."""
    return next(digests([file]))


def digests(files: Iterable[str | Path]) -> Iterator[str]:
    """SHA-256 of each file's bytes, read anew only where path, size, times of change or inode are not as remembered.

    The change time of a file cannot be set back, so an edited file is always noticed. The memory is
    `digests.sqlite` in $DPO_SD_CACHE or ~/.cache/dpo_sd; where it cannot be used every file is read.

    Raises:
        OSError: when a file cannot be read.
    """
    memory = Path(os.environ.get("DPO_SD_CACHE", "~/.cache/dpo_sd")).expanduser() / "digests.sqlite"
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(memory, timeout=30, isolation_level=None)  # every insertion stands by itself
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = OFF")  # what a power cut takes away is read again
        connection.execute("CREATE TABLE IF NOT EXISTS digests (path TEXT PRIMARY KEY, state TEXT, sha256 TEXT)")
    except (OSError, sqlite3.Error) as error:
        log.warning("%s cannot be used (%s): files are read anew at every start", memory, error)
        yield from map(_read, files)
        return
    with closing(connection):
        for file in files:
            yield _remembered(connection, os.path.abspath(file))


def _remembered(connection: sqlite3.Connection, file: str) -> str:
    status = os.lstat(file)
    if stat.S_ISLNK(status.st_mode):
        file = os.path.realpath(file)
        folder, name = os.path.split(file)
        if os.path.basename(folder) == "blobs" and re.fullmatch("[0-9a-f]{64}", name):
            return name  # the Hub's cache names a large file by its SHA-256
        status = os.stat(file)
    state = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino} {status.st_dev}"
    row = connection.execute("SELECT state, sha256 FROM digests WHERE path = ?", (file,)).fetchone()
    if row is not None and row[0] == state:
        return row[1]
    sha256 = _read(file)
    if time.time() - max(status.st_mtime, status.st_ctime) > RACY:
        try:
            connection.execute("INSERT OR REPLACE INTO digests VALUES (?, ?, ?)", (file, state, sha256))
        except sqlite3.Error as error:  # a full disk, or a lock that does not end
            log.warning("the digest of %s is not remembered: %s", file, error)
    return sha256


def _read(file: str | Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
