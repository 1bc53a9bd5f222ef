"""Events of the log: votes, retracts and flags, each on one line."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from operator import attrgetter, itemgetter
from types import NoneType
from typing import Any, ClassVar, Literal, get_args
from uuid import uuid4

import dpo_sd
from dpo_sd.files.json_lines import json_line, parse_object
from dpo_sd.preferences.pair_folder import Pair

Side = Literal["image_0", "image_1"]
Choice = Literal["image_0", "image_1", "tie", "both_bad", "skip"]
EventType = Literal["vote", "retract", "flag"]
Input = Literal["key", "mouse", "touch"]
LABELS: dict[str | None, float] = {"image_0": 1.0, "image_1": 0.0, "tie": 0.5}  # P(image_0 is better) by choice


@dataclass(frozen=True, slots=True)
class Event:
    """One act of an annotator, as it stands in the log.

    Args:
        event_id: unique; of two events with the same id the first counts.
        event_type: a vote, the undoing of an earlier event, or a report that a pair is unfit.
        retracts: event_id of the event that a retract undoes; None for the other types.
        presentation_id: id of the showing at which it happened.
        pair_id, ranking_id, prompt, image_0, image_1, image_0_uid, image_1_uid: the pair, as in `Pair`.
        choice: the vote; None for the other types.
        left_image: the image that was shown on the left.
        repeat_of: event_id of the vote that a swapped repeat asks for again; None at a first showing.
        annotator_id: name of the annotator, not empty.
        session_id: id of the sitting.
        presented_at, decided_at: UTC in milliseconds, as `now` gives it.
        duration_ms: milliseconds from showing to decision, at least 0.
        input: the device that it was given with.
        zoomed: whether the images were enlarged at this showing.
        app_version: version of dpo_sd.

    Raises:
        ValueError: if a value is of another type or out of range.
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
            if not is_time(time):
                raise ValueError(f"times must be like 2031-05-17T09:30:00.125Z, got {time!r:.100}")

    @property
    def label_0(self) -> float | None:
        """1 where the vote is for image_0, 0 where it is for image_1, ½ for a tie, None otherwise."""
        return LABELS.get(self.choice)

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
            ValueError: if the line is not an event; the message says why.
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
_FITTING: set[tuple[type, ...]] = set()  # combinations of types that have been found right
_ALLOWED = {"event_type": get_args(EventType), "left_image": get_args(Side), "input": get_args(Input)}
_CHOICES = get_args(Choice)
_KEYS = ["schema_version", *_TYPES]
_KEYS[_KEYS.index("left_image") : _KEYS.index("left_image")] = ["label_0", "label_1"]


def now() -> str:
    """The time in UTC as JavaScript's toISOString writes it, which sorts as text: 2031-05-17T09:30:00.125Z."""
    return time_text(datetime.now(UTC))


def time_text(moment: datetime) -> str:
    """A time as `now` writes it."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", re.ASCII)


def is_time(text: str) -> bool:
    """Whether a text is a time as `now` gives it."""
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return _TIME.fullmatch(text) is not None


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
    """Event of an annotator's choice on a pair.

    Args:
        pair: the pair that was shown.
        choice, left_image, annotator_id, repeat_of, session_id, duration_ms, input, zoomed: as in `Event`.
        presentation_id, event_id: drawn if None.
        presented_at, decided_at: the present moment if None.

    Raises:
        ValueError: if a value is of another type or out of range.
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
    """Event of an annotator's report that a pair is unfit for training, whatever is voted on it.

    Args:
        pair, left_image, annotator_id, details: as for `vote`.

    Raises:
        ValueError: if a value is of another type or out of range.
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
    """Event that undoes a vote or a flag.

    Args:
        event: the event that is undone.
        event_id, decided_at, input: as for `vote`.
        session_id: id of the sitting; None takes that of the event.

    Raises:
        ValueError: if the event is a retract itself, or a value is of another type or out of range.
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
