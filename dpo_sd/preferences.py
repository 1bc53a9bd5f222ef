"""What people said about pairs: an append-only log of events, what the events come to, and what training reads."""

from __future__ import annotations

import atexit
import errno
import fcntl
import logging
import os
import re
import threading
from collections import Counter, defaultdict
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from operator import attrgetter, itemgetter
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, Literal, get_args
from uuid import uuid4

import dpo_sd
from dpo_sd.errors import UserError
from dpo_sd.files import write_text
from dpo_sd.pairs import (
    PAIRS,
    Pair,
    json_line,
    pair_id,
    parse_object,
    read_pairs,
    read_records,
)

ANNOTATIONS = "annotations.jsonl"
METADATA = "metadata.jsonl"
TORN = "annotations.torn.jsonl"  # lines that a crash cut short
REFUSED = "annotations.refused.jsonl"  # what was sent as votes and can be none here, with the reason
QUIET = 0.3  # seconds without a new event after which metadata.jsonl is written

Side = Literal["image_0", "image_1"]
Choice = Literal["image_0", "image_1", "tie", "both_bad", "skip"]
EventType = Literal["vote", "retract", "flag"]
Input = Literal["key", "mouse", "touch"]
Status = Literal["image_0", "image_1", "tie", "both_bad", "disputed", "skipped", "flagged", "undecided"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that an annotator did, as it stands in the log.

    Args:
        event_id: unique; of two events with the same one the first counts.
        event_type: a vote, the undoing of an earlier event, or a pair reported as unfit.
        retracts: event_id of what a retract undoes; None for the other types.
        presentation_id: of the showing at which it happened.
        pair_id, ranking_id, prompt, image_0, image_1, image_0_uid, image_1_uid: of the pair, as in `Pair`.
        choice: of a vote; None for the other types.
        left_image: the one that was shown on the left.
        repeat_of: what a swapped repeat of the same pair for the same annotator repeats; None at a first showing.
        annotator_id: who, not empty.
        session_id: of the sitting.
        presented_at, decided_at: UTC in milliseconds, as `now` gives it.
        duration_ms: from showing to decision, at least 0.
        input: what it was given with.
        zoomed: whether the images were enlarged at this showing.
        app_version: of dpo_sd.

    Raises:
        ValueError: when a value is of another type or out of range.
    """

    event_id: str
    event_type: EventType
    retracts: str | None
    presentation_id: str
    pair_id: str
    ranking_id: str | None
    prompt: str
    image_0: str
    image_1: str
    image_0_uid: str
    image_1_uid: str
    choice: Choice | None
    left_image: Side
    repeat_of: str | None
    annotator_id: str
    session_id: str
    presented_at: str
    decided_at: str
    duration_ms: int
    input: Input
    zoomed: bool
    app_version: str

    schema_version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        # a log has few combinations of types; looking at each value of each event takes as long as reading them
        if (combination := tuple(map(type, _values(self)))) not in _FITTING:
            for key, types in _TYPES.items():
                if type(getattr(self, key)) not in types:
                    raise ValueError(f"{key} must be {types[0].__name__}, got {getattr(self, key)!r:.100}")
            _FITTING.add(combination)
        for key, allowed in _ALLOWED.items():
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key} must be one of {', '.join(allowed)}, got {getattr(self, key)!r:.100}")
        if (self.choice in _CHOICES) != (self.event_type == "vote"):
            raise ValueError(f"choice {self.choice!r:.100} does not go with a {self.event_type}")
        if (self.retracts is not None) != (self.event_type == "retract"):
            raise ValueError(f"retracts {self.retracts!r:.100} does not go with a {self.event_type}")
        if not self.event_id or not self.annotator_id:
            raise ValueError("event_id and annotator_id must not be empty")
        if self.duration_ms < 0:
            raise ValueError(f"duration_ms must not be negative, got {self.duration_ms}")
        for time in (self.presented_at, self.decided_at):
            if not _is_time(time):
                raise ValueError(f"times must be like 2031-05-17T09:30:00.125Z, got {time!r:.100}")

    @property
    def label_0(self) -> float | None:
        """1 where the vote is for image_0, 0 where it is for image_1, ½ for a tie, None otherwise."""
        return _LABELS.get(self.choice)

    @property
    def label_1(self) -> float | None:
        """1 - label_0, or None."""
        return None if self.label_0 is None else 1 - self.label_0

    def to_json(self) -> str:
        """The event as a line of annotations.jsonl, with its newline."""
        return json_line({key: getattr(self, key) for key in _KEYS})

    @classmethod
    def from_json(cls, line: str | bytes) -> Event:
        """The event on a line of annotations.jsonl.

        Raises:
            ValueError: saying what is wrong with the line.
        """
        record = parse_object(line)
        version = record.pop("schema_version", None)
        if version != cls.schema_version:
            raise ValueError(f"schema_version is {version!r:.100}, not {cls.schema_version}: update dpo_sd to read it")
        labels = record.pop("label_0", None), record.pop("label_1", None)
        if record.keys() != _TYPES.keys():
            raise ValueError(f"missing or unknown keys: {', '.join(sorted(record.keys() ^ _TYPES.keys()))[:200]}")
        event = cls(*_in_order(record))  # 22 arguments by name take as long as all the checks
        label_0 = event.label_0
        if labels != (label_0, None if label_0 is None else 1 - label_0):
            raise ValueError(f"the labels {labels} contradict the choice {event.choice!r}")
        return event


_NULLABLE = {"retracts", "ranking_id", "choice", "repeat_of"}
_TYPES: dict[str, tuple[type, ...]] = {
    each.name: (str, NoneType) if each.name in _NULLABLE else (str,) for each in fields(Event)
} | {"duration_ms": (int,), "zoomed": (bool,)}
_values, _in_order = attrgetter(*_TYPES), itemgetter(*_TYPES)
_FITTING: set[tuple[type, ...]] = set()  # combinations of types that were found right
_ALLOWED = {"event_type": get_args(EventType), "left_image": get_args(Side), "input": get_args(Input)}
_CHOICES = get_args(Choice)
_LABELS: dict[str | None, float] = {"image_0": 1.0, "image_1": 0.0, "tie": 0.5}
_KEYS = ["schema_version", *_TYPES]
_KEYS[_KEYS.index("left_image") : _KEYS.index("left_image")] = ["label_0", "label_1"]
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", re.ASCII)


def now() -> str:
    """The time in UTC as JavaScript's toISOString writes it, which sorts as text: 2031-05-17T09:30:00.125Z."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def vote(
    pair: Pair,
    choice: Choice,
    left_image: Side,
    annotator_id: str,
    *,
    presentation_id: str | None = None,
    event_id: str | None = None,
    repeat_of: str | None = None,
    session_id: str = "",
    presented_at: str | None = None,
    decided_at: str | None = None,
    duration_ms: int = 0,
    input: Input = "key",
    zoomed: bool = False,
) -> Event:
    """An annotator's choice on a pair.

    Args:
        pair: the one that was shown.
        choice, left_image, annotator_id, repeat_of, session_id, duration_ms, input, zoomed: as in `Event`.
        presentation_id, event_id: drawn when None.
        presented_at, decided_at: the present moment when None.

    Raises:
        ValueError: when a value is of another type or out of range.
    """
    moment = now()
    return Event(
        event_id=str(uuid4()) if event_id is None else event_id,
        event_type="vote",
        retracts=None,
        presentation_id=str(uuid4()) if presentation_id is None else presentation_id,
        pair_id=pair.pair_id,
        ranking_id=pair.ranking_id,
        prompt=pair.prompt,
        image_0=pair.image_0,
        image_1=pair.image_1,
        image_0_uid=pair.image_0_uid,
        image_1_uid=pair.image_1_uid,
        choice=choice,
        left_image=left_image,
        repeat_of=repeat_of,
        annotator_id=annotator_id,
        session_id=session_id,
        presented_at=moment if presented_at is None else presented_at,
        decided_at=moment if decided_at is None else decided_at,
        duration_ms=duration_ms,
        input=input,
        zoomed=zoomed,
        app_version=dpo_sd.__version__,
    )


def flag(pair: Pair, left_image: Side, annotator_id: str, **details: Any) -> Event:
    """An annotator's report that a pair is unfit for training, whatever is voted on it.

    Args:
        pair, left_image, annotator_id, details: as for `vote`.

    Raises:
        ValueError: when a value is of another type or out of range.
    """
    return replace(vote(pair, "skip", left_image, annotator_id, **details), event_type="flag", choice=None)


def retract(
    event: Event,
    *,
    event_id: str | None = None,
    session_id: str | None = None,
    decided_at: str | None = None,
    input: Input = "key",
) -> Event:
    """The undoing of a vote or a flag.

    Args:
        event: what is undone.
        event_id, decided_at, input: as for `vote`.
        session_id: that of the event when None.

    Raises:
        ValueError: when the event is a retract itself, or a value is of another type or out of range.
    """
    if event.event_type == "retract":
        raise ValueError("a retract cannot be undone: vote again")
    return replace(
        event,
        event_id=str(uuid4()) if event_id is None else event_id,
        event_type="retract",
        retracts=event.event_id,
        choice=None,
        session_id=event.session_id if session_id is None else session_id,
        decided_at=now() if decided_at is None else decided_at,
        duration_ms=0,
        input=input,
        app_version=dpo_sd.__version__,
    )


@dataclass(frozen=True)
class Preference:
    """What the votes on one pair come to.

    Args:
        pair: the one they are about.
        votes_0, votes_1, votes_tie, votes_bad: annotators by their choice, at least 0.
        skips: annotators who only skipped it.
        flagged: whether somebody reported it as unfit.
        decided_at: of the latest vote that counts, None without one.
    """

    pair: Pair
    votes_0: int
    votes_1: int
    votes_tie: int
    votes_bad: int
    skips: int
    flagged: bool
    decided_at: str | None

    @property
    def n_votes(self) -> int:
        """Votes that count, skips not among them."""
        return self.votes_0 + self.votes_1 + self.votes_tie + self.votes_bad

    @property
    def status(self) -> Status:
        """The choice with more votes than any other; "disputed" where several share the first place."""
        if self.flagged:
            return "flagged"
        if self.n_votes == 0:
            return "skipped" if self.skips else "undecided"
        votes: dict[Status, int] = {
            "image_0": self.votes_0,
            "image_1": self.votes_1,
            "tie": self.votes_tie,
            "both_bad": self.votes_bad,
        }
        first: list[Status] = [choice for choice, count in votes.items() if count == max(votes.values())]
        return first[0] if len(first) == 1 else "disputed"

    @property
    def label_0(self) -> float:
        """Share of the votes for image_0 in [0, 1]: a tie is half a vote, "both bad" none; ½ without votes."""
        directed = self.votes_0 + self.votes_1 + self.votes_tie
        return (self.votes_0 + self.votes_tie / 2) / directed if directed else 0.5

    @property
    def agreement(self) -> float:
        """Share of the votes that the most frequent choice has, in [0, 1]; 0 without votes."""
        return max(self.votes_0, self.votes_1, self.votes_tie, self.votes_bad) / max(self.n_votes, 1)


def standing(events: Iterable[Event]) -> list[Event]:
    """Votes and flags that are not undone, each once, wherever in the log they and their retracts stand."""
    unique: dict[str, Event] = {}
    for event in events:
        unique.setdefault(event.event_id, event)
    undone = {event.retracts for event in unique.values()}
    return [each for each in unique.values() if each.event_type != "retract" and each.event_id not in undone]


def counting(events: Iterable[Event]) -> dict[tuple[str, str], Event]:
    """The one vote that counts for each (pair_id, annotator_id).

    It is the last of those at first showings, the last of the repeats where there is no other, and a skip only where
    there is nothing else. "Last" goes by (decided_at, event_id), never by the order in the log.
    """

    def weight(event: Event) -> tuple[bool, bool, str, str]:
        return event.choice != "skip", event.repeat_of is None, event.decided_at, event.event_id

    votes: dict[tuple[str, str], Event] = {}
    for event in standing(events):
        if event.event_type == "vote":
            key = event.pair_id, event.annotator_id
            votes[key] = max(votes.get(key, event), event, key=weight)
    return votes


def fold(pairs: Iterable[Pair], events: Collection[Event]) -> list[Preference]:
    """What the events come to: one preference per pair, in the order of the pairs, whatever the order of the events."""
    votes: defaultdict[str, list[Event]] = defaultdict(list)
    for (pair, _), event in counting(events).items():
        votes[pair].append(event)
    flagged = {event.pair_id for event in standing(events) if event.event_type == "flag"}
    preferences = []
    for pair in pairs:
        counts = Counter(event.choice for event in votes[pair.pair_id])
        decided = [event.decided_at for event in votes[pair.pair_id] if event.choice != "skip"]
        preferences.append(
            Preference(
                pair=pair,
                votes_0=counts["image_0"],
                votes_1=counts["image_1"],
                votes_tie=counts["tie"],
                votes_bad=counts["both_bad"],
                skips=counts["skip"],
                flagged=pair.pair_id in flagged,
                decided_at=max(decided, default=None),
            )
        )
    return preferences


def metadata_rows(preferences: Iterable[Preference]) -> list[dict[str, Any]]:
    """The rows of metadata.jsonl: pairs of which one image is preferred, with hard labels; a seed that is unknown is
    left out, a text that is unknown is ""."""
    decided = [each for each in preferences if each.status in ("image_0", "image_1")]
    per_prompt = Counter(each.pair.prompt for each in decided)
    rows = []
    for preference in decided:
        pair, prefer_0 = preference.pair, preference.status == "image_0"
        row = {
            "prompt": pair.prompt,
            "image_0": pair.image_0,
            "image_1": pair.image_1,
            "prefer_0": prefer_0,
            "prefer_1": not prefer_0,
            "caption": pair.prompt,
            "label_0": float(prefer_0),
            "label_1": float(not prefer_0),
            "has_label": True,
            "are_different": pair.image_0_uid != pair.image_1_uid,
            "best_image_uid": pair.image_0_uid if prefer_0 else pair.image_1_uid,
            "image_0_uid": pair.image_0_uid,
            "image_1_uid": pair.image_1_uid,
            "model_0": pair.model_0 or "",
            "model_1": pair.model_1 or "",
            "ranking_id": pair.ranking_id or "",
            "created_at": preference.decided_at or "",
            "num_example_per_prompt": per_prompt[pair.prompt],
            "pair_id": pair.pair_id,
            "n_votes": preference.n_votes,
            "votes_0": preference.votes_0,
            "votes_1": preference.votes_1,
            "votes_tie": preference.votes_tie,
            "agreement": preference.agreement,
        }
        seeds = {"seed_0": pair.seed_0, "seed_1": pair.seed_1}
        rows.append(row | {key: seed for key, seed in seeds.items() if seed is not None})
    return rows


class EventLog:
    """The annotations.jsonl of one pair folder: durable, exactly-once, safe for several threads and processes.

    metadata.jsonl follows it by itself: it is written on opening, soon after the last new event, and on closing.

    Args:
        folder: with a pairs.jsonl, and writable.

    Attributes:
        pairs: by their pair_id, in the order of pairs.jsonl.
        events: in the order of the log, each event_id once.
        notes: what the user should know, in words.

    Raises:
        UserError: when the pairs or the log cannot be read, naming the line; when the folder is read-only; when there
            is a metadata.jsonl that is not from a log here.
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
        """Adds events to the log, those that it does not hold yet; when this returns, they are on the disk.

        Args:
            events: of pairs in this folder, in any number and however often sent before.

        Returns:
            How many of them were new.

        Raises:
            OSError: when the disk is full or the log cannot be written. Then nothing of them is in the log, and the
                same call may be made again.
            UserError: when an event is not of this folder, or another program left a broken line in the log.
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
                # also without anything new: who wrote these events may have died before they were on the disk
                _write_whole(log, "".join(event.to_json() for event in new.values()).encode())
                self._take_in(log)
            if new:
                self._schedule()
            return len(new)

    def set_refused_aside(self, reasons: Mapping[str, str]) -> None:
        """Keeps what was sent as votes and can never be any, for people to look at; on the disk when this returns.

        Args:
            reasons: why it is refused, by what was sent.

        Raises:
            OSError: when the disk is full or the folder cannot be written; then nothing of it is kept.
        """
        if not reasons:
            return
        lines = [json_line({"reason": reason, "sent": sent}) for sent, reason in reasons.items()]
        with _locked(self.folder / REFUSED, os.O_WRONLY | os.O_APPEND | os.O_CREAT, fcntl.LOCK_EX) as refused:
            _write_whole(refused, "".join(lines).encode())
        self.notes += [f"a vote was refused and put into {REFUSED}: {reason}" for reason in reasons.values()]

    def refresh(self) -> bool:
        """Takes in what other processes added; whether there was anything.

        Raises:
            OSError: when the log cannot be read.
            UserError: when another program left a broken line in it.
        """
        news = self._refresh()
        if news:
            self._schedule()
        return news

    def flush_metadata(self) -> None:
        """Writes metadata.jsonl from the events; without a log there is nothing to write.

        Raises:
            OSError: when the folder cannot be written.
        """
        with _WRITING_METADATA:
            self._refresh()
            while self._inode is not None:
                events = list(self.events)
                write_text(self.folder / METADATA, _metadata(fold(self.pairs.values(), events)))
                # again if others added meanwhile: whoever writes last has seen all that is in the log
                self._refresh()
                if len(self.events) == len(events):
                    return

    def close(self) -> None:
        """Brings metadata.jsonl up to date, which the end of the program does as well.

        Raises:
            OSError: when the folder cannot be written. The votes are safe: the next opening writes it.
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


# `replacing` names its temporary file by the process: two logs of one folder in one process take turns
_WRITING_METADATA = threading.Lock()


def read_events(file: Path, pair_ids: Container[str]) -> list[Event]:
    """The events of a log, as they stand in it; a last line cut short by a crash is left out with a warning.

    Args:
        file: an annotations.jsonl.
        pair_ids: of the pairs that it may be about.

    Raises:
        UserError: when there is no such file, and on a line that is broken or about another pair, naming it.
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
        folder: a pair folder.
        logs: annotations.jsonl files, such as come from other machines.

    Returns:
        How many events were new.

    Raises:
        UserError: as `EventLog` and `read_events` do.
        OSError: as `EventLog.append` does.
    """
    with closing(EventLog(folder)) as log:
        return log.append([event for file in logs for event in read_events(Path(file), log.pairs.keys())])


def read_preferences(folder: str | Path) -> list[Preference]:
    """What is preferred in a pair folder: from its events where it has some, otherwise from its metadata.jsonl.

    Of metadata.jsonl the five keys prompt, image_0, image_1, prefer_0 and prefer_1 suffice.

    Raises:
        UserError: when there is neither, and on a line that is broken, naming it.
    """
    folder = Path(folder)
    if (folder / ANNOTATIONS).exists():  # metadata.jsonl could be older
        pairs = read_pairs(folder)
        return fold(pairs, read_events(folder / ANNOTATIONS, {pair.pair_id for pair in pairs}))
    file = folder / METADATA
    if not file.is_file():
        where = f"{folder} holds no votes yet" if folder.is_dir() else f"no folder {folder}"
        raise UserError(f"{where}: choose between its pairs with python -m dpo_sd.annotate pairs={folder}")
    preferences = []
    for number, row in read_records(file):
        try:
            preferences.append(_preference(row))
        except ValueError as error:
            raise UserError(f"{file}, line {number}: {error}") from error
    return preferences


def _preference(row: dict[str, Any]) -> Preference:
    """From a row of metadata.jsonl."""
    for key in ("prompt", "image_0", "image_1", "prefer_0", "prefer_1"):
        if key not in row:
            raise ValueError(f"the key {key!r} is missing")
    if not (type(row["prefer_0"]) is type(row["prefer_1"]) is bool and row["prefer_0"] != row["prefer_1"]):
        raise ValueError("exactly one of prefer_0 and prefer_1 must be true: leave ties out")
    pair = Pair(
        pair_id=row.get("pair_id") or pair_id(str(row["prompt"]), str(row["image_0"]), str(row["image_1"])),
        prompt=row["prompt"],
        image_0=row["image_0"],
        image_1=row["image_1"],
        image_0_uid=row.get("image_0_uid") or "",
        image_1_uid=row.get("image_1_uid") or "",
        ranking_id=row.get("ranking_id") or None,
        model_0=row.get("model_0") or None,
        model_1=row.get("model_1") or None,
        seed_0=row.get("seed_0"),
        seed_1=row.get("seed_1"),
    )
    votes_0, votes_1 = _count(row, "votes_0", int(row["prefer_0"])), _count(row, "votes_1", int(row["prefer_1"]))
    votes_tie = _count(row, "votes_tie", 0)
    votes_bad = _count(row, "n_votes", votes_0 + votes_1 + votes_tie) - votes_0 - votes_1 - votes_tie
    created = row.get("created_at")
    decided_at = created if isinstance(created, str) and _is_time(created) else None
    preference = Preference(pair, votes_0, votes_1, votes_tie, votes_bad, 0, False, decided_at)
    if votes_bad < 0 or preference.status != ("image_0" if row["prefer_0"] else "image_1"):
        raise ValueError("the numbers of votes contradict prefer_0 and prefer_1")
    return preference


def _count(row: dict[str, Any], key: str, default: int) -> int:
    value = row.get(key, default)
    if type(value) is not int or value < 0:
        raise ValueError(f"{key} must be a whole number of at least 0, got {value!r:.100}")
    return value


def _metadata(preferences: Iterable[Preference]) -> str:
    return "".join(json_line(row) for row in metadata_rows(preferences))


@contextmanager
def _locked(file: Path, flags: int, operation: int) -> Iterator[int]:
    descriptor = os.open(file, flags, 0o666)
    try:
        fcntl.flock(descriptor, operation)  # ends with the descriptor, also when the process is killed
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
    """What a file holds from the offset on, up to its last newline and after it."""
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


def _is_time(text: str) -> bool:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return _TIME.fullmatch(text) is not None
