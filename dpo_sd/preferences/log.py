"""The append-only log of a pair folder: durable, exactly-once, safe for several threads and processes."""

from __future__ import annotations

import atexit
import errno
import fcntl
import logging
import os
import threading
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from dpo_sd.errors import UserError
from dpo_sd.files.atomic import write_text
from dpo_sd.files.claims import take_turn
from dpo_sd.files.json_lines import json_line
from dpo_sd.preferences.events import Event
from dpo_sd.preferences.metadata import METADATA, metadata_text
from dpo_sd.preferences.outcome import fold
from dpo_sd.preferences.pair_folder import PAIRS, Pair, read_pairs

ANNOTATIONS = "annotations.jsonl"
TORN = "annotations.torn.jsonl"  # lines that a crash cut short
REFUSED = "annotations.refused.jsonl"  # records that were sent as votes and can never be one here, with the reason
QUIET = 0.3  # seconds without a new event after which metadata.jsonl is written
logger = logging.getLogger(__name__)
# two logs of one folder in one process take turns, so that the later text is the newer one
_WRITING_METADATA = threading.Lock()


class EventLog:
    """The annotations.jsonl of one pair folder: durable, exactly-once, safe for several threads and processes.

    It keeps metadata.jsonl up to date: that is written on opening, soon after the last new event, and on closing.

    Args:
        folder: with a pairs.jsonl, and writable.

    Attributes:
        pairs: the folder's pairs by their pair_id, in the order of pairs.jsonl.
        events: the log's events in its order, each event_id once.
        notes: sentences that the user should read.

    Raises:
        UserError: if the pairs or the log cannot be read, naming the line; if the folder is read-only; if there is a
            metadata.jsonl without a log that it could come from.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.pairs: dict[str, Pair] = {pair.pair_id: pair for pair in read_pairs(self.folder)}
        self.events: list[Event] = []
        self.notes: list[str] = []
        self._ids: set[str] = set()
        self._file = self.folder / ANNOTATIONS
        self._inode: int | None = None  # of the log as first seen
        self._offset = self._lines = 0  # how much of the log is in `events`
        self._lock = threading.RLock()
        self._timer = threading.Timer(QUIET, self._flush_or_note)
        if not os.access(self.folder, os.W_OK):
            raise UserError(f"{self.folder} is read-only, and votes are saved there: annotate a copy of it")
        # in this order: another process may be creating the one and then the other
        if (self.folder / METADATA).exists() and not self._file.exists():
            raise UserError(
                f"{self.folder / METADATA} is there without an {ANNOTATIONS} that it could come from, and annotating "
                "would overwrite it: move it away first"
            )
        if self._file.exists():
            with self._lock, _locked(self._file, os.O_RDONLY, fcntl.LOCK_SH) as log:
                if tail := self._take_in(log):
                    self.notes.append(f"{_torn(self._file, tail)}; the next vote moves it to {TORN}")
                self._schedule()
        atexit.register(self._flush_or_note)

    def append(self, events: Sequence[Event]) -> int:
        """Adds the events that the log does not hold yet; when this returns, they are on the disk.

        Args:
            events: events on pairs of this folder, in any number and however often sent before.

        Returns:
            The number of new ones.

        Raises:
            OSError: if the disk is full or the log cannot be written. Then the log holds none of them, and the same
                call may be made again.
            UserError: if an event is not on a pair of this folder, or another program left a broken line in the log.
        """
        if foreign := [event.pair_id for event in events if event.pair_id not in self.pairs]:
            raise UserError(f"pair {foreign[0]} is not in {self.folder}")
        with self._lock:
            # a log that has vanished is not begun anew: that would hide the loss
            flags = os.O_RDWR | os.O_APPEND | (os.O_CREAT if self._inode is None else 0)
            with _locked(self._file, flags, fcntl.LOCK_EX) as log:
                tail = self._take_in(log)
                new: dict[str, Event] = {}
                for event in events:
                    if event.event_id not in self._ids:
                        new.setdefault(event.event_id, event)
                if tail:
                    self._set_aside(log, tail)
                # also without anything new: whoever wrote these events may have died before they were on the disk
                _write_whole(log, "".join(event.to_json() for event in new.values()).encode())
                self._take_in(log)
            if new:
                self._schedule()
            return len(new)

    def set_refused_aside(self, reasons: Mapping[str, str]) -> None:
        """Keeps records that can never be votes, for people to look at; they are on the disk when this returns.

        Args:
            reasons: why each record is refused, by the record's text.

        Raises:
            OSError: if the disk is full or the folder cannot be written; then none of them is kept.
        """
        if not reasons:
            return
        lines = [json_line({"reason": reason, "sent": sent}) for sent, reason in reasons.items()]
        with _locked(self.folder / REFUSED, os.O_WRONLY | os.O_APPEND | os.O_CREAT, fcntl.LOCK_EX) as refused:
            _write_whole(refused, "".join(lines).encode())
        self.notes += [f"a vote was refused and put into {REFUSED}: {reason}" for reason in reasons.values()]

    def refresh(self) -> bool:
        """Takes in the events that other processes added; returns whether there were any.

        Raises:
            OSError: if the log cannot be read.
            UserError: if another program left a broken line in it.
        """
        news = self._refresh()
        if news:
            self._schedule()
        return news

    def flush_metadata(self) -> None:
        """Writes metadata.jsonl from the events; without a log there is nothing to write.

        Raises:
            OSError: if the folder cannot be written.
        """
        with _WRITING_METADATA:
            self._refresh()
            while self._inode is not None:
                events = list(self.events)
                write_text(self.folder / METADATA, metadata_text(fold(self.pairs.values(), events)))
                # again if others added meanwhile: whoever writes last has seen all that is in the log
                self._refresh()
                if len(self.events) == len(events):
                    return

    def close(self) -> None:
        """Brings metadata.jsonl up to date, which the end of the program does as well.

        Raises:
            OSError: if the folder cannot be written. The votes are safe: the next opening writes it.
        """
        atexit.unregister(self._flush_or_note)
        with self._lock:
            timer = self._timer
            timer.cancel()
        if timer.is_alive():
            timer.join()
        self.flush_metadata()

    def _refresh(self) -> bool:
        with self._lock:
            known = len(self.events)
            if self._inode is not None or self._file.exists():
                with _locked(self._file, os.O_RDONLY, fcntl.LOCK_SH) as log:
                    self._take_in(log)
            return len(self.events) > known

    def _take_in(self, log: int) -> bytes:
        """Adds what the log holds beyond `_offset` to `events`; returns the cut line at its end, b"" without one."""
        status = os.fstat(log)
        if self._inode is None:
            _sync_folder(self.folder)  # or a power cut could take the new file away with all that is in it
            self._inode = status.st_ino
        if self._inode != status.st_ino or status.st_size < self._offset:
            reason = "replaced or shortened by another program while it was open: start again to read it anew"
            raise OSError(errno.ESTALE, reason, str(self._file))
        whole, tail = _whole_lines(log, self._offset)
        events = _parse(whole, self._file, self.pairs.keys(), self._lines)
        self._offset += len(whole)
        self._lines += whole.count(b"\n")
        for event in events:
            if event.event_id not in self._ids:
                self._ids.add(event.event_id)
                self.events.append(event)
        return tail

    def _set_aside(self, log: int, tail: bytes) -> None:
        with _locked(self.folder / TORN, os.O_WRONLY | os.O_APPEND | os.O_CREAT, fcntl.LOCK_EX) as torn:
            _write_whole(torn, tail + b"\n")
        os.ftruncate(log, self._offset)
        self.notes.append(f"{_torn(self._file, tail)}; moved to {TORN}")

    def _schedule(self) -> None:
        with self._lock:
            self._timer.cancel()
            self._timer = threading.Timer(QUIET, self._flush_or_note)
            self._timer.daemon = True  # the end of the program does not wait for it: it flushes by itself
            self._timer.start()

    def _flush_or_note(self) -> None:
        try:
            self.flush_metadata()
        except (OSError, UserError) as error:
            note = f"{self.folder / METADATA} could not be brought up to date: {error}"
            self.notes.append(note)
            logger.warning(note)


def read_events(file: Path, pair_ids: Container[str]) -> list[Event]:
    """The events of a log in its order; a last line that a crash cut short is left out with a warning.

    Args:
        file: an annotations.jsonl.
        pair_ids: ids of the pairs that its events may be on.

    Raises:
        UserError: if there is no such file, or a line is broken or on another pair; the message names it.
    """
    if not file.is_file():
        raise UserError(f"no file {file}: give the {ANNOTATIONS} of a pair folder")
    with _locked(file, os.O_RDONLY, fcntl.LOCK_SH) as log:
        whole, tail = _whole_lines(log, 0)
    if tail:
        logger.warning("%s; left out", _torn(file, tail))
    return _parse(whole, file, pair_ids, 0)


def merge(folder: str | Path, logs: Sequence[Path]) -> int:
    """Adds the events of other logs about the same pairs to the log of a folder; nothing is written if one is bad.

    Args:
        folder: pair folder.
        logs: annotations.jsonl files, such as come from other machines.

    Returns:
        The number of new events.

    Raises:
        UserError: as `EventLog` and `read_events` do.
        OSError: as `EventLog.append` does.
    """
    with closing(EventLog(folder)) as log:
        return log.append([event for file in logs for event in read_events(Path(file), log.pairs.keys())])


@contextmanager
def _locked(file: Path, flags: int, operation: int) -> Iterator[int]:
    descriptor = os.open(file, flags, 0o666)
    try:
        take_turn(descriptor, operation)  # ends with the descriptor, also when the process is killed
        yield descriptor
    finally:
        os.close(descriptor)


def _write_whole(descriptor: int, data: bytes) -> None:
    """Appends all of the data and makes it durable, or leaves the file as it was."""
    size = os.fstat(descriptor).st_size
    try:
        while data:
            data = data[os.write(descriptor, data) :]
        os.fsync(descriptor)
    except BaseException:
        with suppress(OSError):
            os.ftruncate(descriptor, size)
        raise


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _whole_lines(descriptor: int, offset: int) -> tuple[bytes, bytes]:
    """The bytes of a file from the offset on: those up to its last newline, and those after it."""
    with open(descriptor, "rb", closefd=False) as file:
        file.seek(offset)
        data = file.read()
    end = data.rfind(b"\n") + 1
    return data[:end], data[end:]


def _parse(lines: bytes, file: Path, pair_ids: Container[str], after: int) -> list[Event]:
    events = []
    for number, line in enumerate(lines.split(b"\n"), start=after + 1):
        if not line.strip():
            continue
        try:
            event = Event.from_json(line)
            if event.pair_id not in pair_ids:
                raise ValueError(f"pair {event.pair_id!r:.100} is not in {PAIRS}: this log is of another pair folder")
        except ValueError as error:
            raise UserError(f"{file}, line {number}: {error}") from error
        events.append(event)
    return events


def _torn(file: Path, tail: bytes) -> str:
    return f"the last line of {file} was cut short by a crash ({len(tail)} bytes) and does not count"
