"""One pair folder at work: hands out what comes next, and writes down what comes back."""

from __future__ import annotations

import errno
import hashlib
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID, uuid5

from dpo_sd.annotation.items import (
    Item,
    Judged,
    Mode,
    Show,
    implied,
    judgements,
    make_items,
    unjudged,
    upcoming,
)
from dpo_sd.errors import UserError
from dpo_sd.pairs import check_image, image_file, load_image
from dpo_sd.preferences import Event, EventLog, retract, standing, vote

WINDOW = 48  # items that the client gets at a time: more than anyone judges before the server answers
UNDOABLE = 10  # judgements that can be undone after a reload
PACE_OF = 30  # judgements that the pace is measured on


class Receipt(NamedTuple):
    """What became of the votes that a client sent."""

    acknowledged: list[str]  # ids of those that are on the disk, or can never be
    problem: str  # why the others are not, "" without others


class Desk:
    """One pair folder at work, for any number of annotators and browser windows.

    Args:
        folder: with pairs.jsonl.
        repeats: share of the items that come back with the sides swapped, in [0, 1].

    Raises:
        UserError: when `EventLog` refuses the folder.
    """

    def __init__(self, folder: str | Path, repeats: float = 0.05) -> None:
        self.log = EventLog(folder)
        self.repeats = repeats
        self.items = {mode: make_items(self.log.pairs.values(), mode) for mode in ("pairs", "best_worst")}
        self._by_key = {item.key: item for items in self.items.values() for item in items}
        images = {image for pair in self.log.pairs.values() for image in (pair.image_0, pair.image_1)}
        self._images = {token(image): image for image in images}

    @property
    def name(self) -> str:
        """Of the folder, for people."""
        return self.log.folder.resolve().name

    @property
    def folder_id(self) -> str:
        """Tells folders apart, for clients that keep votes of several."""
        return token(str(self.log.folder.resolve()))

    def image(self, image_token: str) -> Path | None:
        """The file behind a token, known to be an image that can be read to its end; None for a token of none.

        Raises:
            UserError: when the file is missing, leads out of the folder or is not such an image.
        """
        if image_token not in self._images:
            return None
        relative = self._images[image_token]
        file = image_file(self.log.folder, relative)
        check_image(file)
        load_image(self.log.folder, relative)  # a browser would show the half of an image that was cut short
        return file

    def window(self, annotator: str, mode: Mode, show: Show) -> dict[str, Any]:
        """What a client needs to go on by itself for a while, as JSON.

        Args:
            annotator: who judges.
            mode, show: what.

        Raises:
            OSError, UserError: when the log cannot be read.
        """
        self.log.refresh()
        votes = standing(list(self.log.events))
        items = self.items[mode]
        judged = judgements(votes, annotator, items)
        fresh = unjudged(items, votes, annotator, show)
        coming = list(upcoming(fresh, judged, annotator, self.repeats if show != "disputed" else 0.0))
        return {
            "items": [_shown(each.item, annotator, each.showing, each.repeat) for each in coming[:WINDOW]],
            "history": [
                _shown(each.item, annotator, each.showing, each.repeat) | {"presentation_id": each.presentation_id}
                for each in judged[-UNDOABLE:]
            ],
            "judged": len(judged),
            "left": len(coming),
            "pace": _pace(votes, judged),
        }

    def receive(self, queue: Sequence[Mapping[str, Any]]) -> Receipt:
        """Writes down the votes and retractions of a client, each once however often it is sent.

        Args:
            queue: what the client has no acknowledgement for, in the order of the key presses.
        """
        events: list[Event] = []
        refused: list[str] = []
        for record in queue:
            try:
                events += self._events(record, events)
            except (KeyError, ValueError, TypeError, IndexError) as error:
                refused.append(f"{type(error).__name__}: {error}")
        try:
            self.log.append(events)
        except OSError as error:
            return Receipt([], not_saved(error))
        except UserError as error:
            return Receipt([], f"vote not saved: {error}")
        problem = (
            f"{len(refused)} votes do not belong to this folder and were left out ({refused[0]})" if refused else ""
        )
        return Receipt([str(record["id"]) for record in queue if "id" in record], problem)

    def _events(self, record: Mapping[str, Any], earlier: Sequence[Event]) -> list[Event]:
        """The events that a client's record stands for; ids follow from the record's, so that none counts twice."""
        record_id, annotator = UUID(record["id"]), record["annotator"]
        known = [*self.log.events, *earlier] if record["choice"] == "retract" or record["repeat"] else []
        if record["choice"] == "retract":
            return [
                retract(
                    event,
                    event_id=str(uuid5(record_id, event.event_id)),
                    session_id=record["session_id"],
                    decided_at=record["decided_at"],
                    input=record["input"],
                )
                for event in known
                if event.presentation_id == record["presentation_id"] and event.event_type == "vote"
            ]
        item = self._by_key[record["item"]]
        images = [self._images[shown] for shown in record["shown"]]
        if sorted(images) != sorted(item.images):
            raise ValueError("other images were shown than the item has")
        originals = _originals(standing(known), annotator)
        events = []
        for pair in item.pairs:
            places = images.index(pair.image_0), images.index(pair.image_1)
            choice = record["choice"]
            if choice == "best":
                choice = implied(record["best"], record["worst"], *places)
            if choice is None:
                continue
            events.append(
                vote(
                    pair,
                    choice,
                    left_image="image_0" if places[0] < places[1] else "image_1",
                    annotator_id=annotator,
                    presentation_id=record["presentation_id"],
                    event_id=str(record_id) if len(item.pairs) == 1 else str(uuid5(record_id, pair.pair_id)),
                    repeat_of=originals.get(pair.pair_id) if record["repeat"] else None,
                    session_id=record["session_id"],
                    presented_at=record["presented_at"],
                    decided_at=record["decided_at"],
                    duration_ms=record["duration_ms"],
                    input=record["input"],
                    zoomed=record["zoomed"],
                )
            )
        return events


def token(name: str) -> str:
    """An address for a file that tells nothing about it."""
    return hashlib.sha256(f"dpo_sd annotation {name}".encode("utf-8", "surrogatepass")).hexdigest()[:32]


def not_saved(error: OSError) -> str:
    """What to tell an annotator whose votes could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "vote not saved: disk full — will be saved once there is room"
    return f"vote not saved: {error.strerror or error} — will be tried again"


def _shown(item: Item, annotator: str, showing: int, repeat: bool) -> dict[str, Any]:
    images = item.arranged(annotator, showing)
    return {"key": item.key, "prompt": item.prompt, "shown": [token(image) for image in images], "repeat": repeat}


def _originals(votes: Sequence[Event], annotator: str) -> dict[str, str]:
    """Event ids of an annotator's votes at first showings, by pair."""
    return {
        each.pair_id: each.event_id
        for each in votes
        if each.annotator_id == annotator and each.event_type == "vote" and each.repeat_of is None
    }


def _pace(votes: Sequence[Event], judged: Sequence[Judged]) -> float | None:
    """Items per minute lately; None before there is anything to measure."""
    recent = {each.presentation_id for each in judged[-PACE_OF:]}
    durations = {each.presentation_id: each.duration_ms for each in votes if each.presentation_id in recent}
    middle = statistics.median(durations.values()) if durations else 0
    return 60_000 / middle if middle > 0 else None
