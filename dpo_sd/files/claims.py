"""Files and folders that processes share: made anew, held by one of them, or taken in turns."""

from __future__ import annotations

import errno
import fcntl
import functools
import itertools
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dpo_sd.errors import UserError

LOCK = ".lock"  # in a folder that is held: who has it, and since when
# what a file system answers that has no locks: some network and cluster mounts
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
log = logging.getLogger(__name__)


def made_anew(folder: Path) -> Path:
    """Makes a folder that was not there, and returns it: `folder`, or the first of folder-2, folder-3, … that is free.

    Of processes that ask for the same one at the same time, each gets its own.

    Raises:
        OSError: if it cannot be made.
    """
    for candidate in (folder if n == 1 else folder.with_name(f"{folder.name}-{n}") for n in itertools.count(1)):
        with suppress(FileExistsError):
            candidate.mkdir(parents=True)
            return candidate
    raise AssertionError


@contextmanager
def held(place: Path, beside: bool = False) -> Iterator[None]:
    """Inside, this process has the folder, which is made if need be; it is let go however the process ends.

    Args:
        beside: keeps the lock beside the place, which may be a file, or a folder that is not to be there yet.

    Raises:
        UserError: if another process has it, with that process and the time since when.
        OSError: if the folder cannot be written.
    """
    file = place.with_name(f".{place.name}{LOCK}") if beside else place / LOCK
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _locked(place, file)
    try:
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": datetime.now(UTC).isoformat("T", "seconds")}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(owner).encode(), 0)
        yield
    finally:
        with suppress(OSError):
            file.unlink()
        os.close(descriptor)


def _locked(place: Path, file: Path) -> int:
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # of POSIX' kind: those of flock live on in workers that were forked, when their parent was killed
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.fstat(descriptor).st_ino == file.stat().st_ino:  # its last owner has not just deleted it
                    return descriptor
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise _taken(place, _owner(file)) from None
            if error.errno not in _NO_LOCKS:
                raise
            owner = _owner(file)
            here = owner.get("host") == socket.gethostname()
            if here and owner["pid"] != os.getpid() and is_alive(owner["pid"]):
                raise _taken(place, owner) from None
            if owner and not here:
                log.warning(
                    "%s was in use by process %s on %s, and this disk has no locks to ask whether it still is",
                    *(place, owner["pid"], owner["host"]),
                )
            return descriptor
        os.close(descriptor)


def _owner(file: Path) -> dict[str, Any]:
    """Who wrote a lock; empty where that cannot be told."""
    try:
        owner = json.loads(file.read_text(encoding="utf-8"))
        return {key: owner[key] for key in ("host", "pid", "since")}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def _taken(place: Path, owner: dict[str, Any]) -> UserError:
    who = f"process {owner['pid']} on {owner['host']}, since {owner['since']}" if owner else "another process"
    return UserError(f"{place} is in use by {who}: wait for its end, or choose another place")


@contextmanager
def in_turn(file: Path) -> Iterator[None]:
    """Inside, this process is the only one of all that asked for a turn with the file, which is made and stays.

    Raises:
        OSError: if its folder cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        take_turn(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def take_turn(descriptor: int, operation: int) -> None:
    """`fcntl.flock`, but a warning where the disk has no locks; the turn ends with the descriptor.

    Args:
        operation: LOCK_SH or LOCK_EX.
    """
    try:
        fcntl.flock(descriptor, operation)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _say_lockless()


@functools.cache  # once
def _say_lockless() -> None:
    log.warning("this disk has no locks: let no two programs write the same folder at the same time")


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True
