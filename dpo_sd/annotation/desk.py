"""The desk of a pair folder: hands out what comes next to each annotator, and writes down the votes that come back."""

from __future__ import annotations

import errno
import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID, uuid5

from dpo_sd.annotation.items import Item, Judged, Mode, Show, implied, judgements, make_items, unjudged, upcoming
from dpo_sd.errors import UserError
from dpo_sd.files.hashes import sha256
from dpo_sd.preferences.events import Event, flag, retract, time_text, vote
from dpo_sd.preferences.log import REFUSED, EventLog
from dpo_sd.preferences.outcome import standing
from dpo_sd.preferences.pair_folder import PAIRS, changed_images, check_image, image_file, is_uid, load_image

WINDOW = 48  # items that the client gets at a time: more than anyone judges before the server answers
UNDOABLE = 10  # judgements that can be undone after a reload
PACE_OF = 30  # judgements over which the pace is measured


class ServedImage(NamedTuple):
    """An image file that may be shown."""

    file: Path
    checked: bool  # whether its bytes are known to be those that the token stands for


class Receipt(NamedTuple):
    """Answer to the votes that a client sent."""

    acknowledged: list[str]  # ids of the votes that are on the disk
    problem: str = ""  # why the others are not on the disk, "" without others
    refused: tuple[str, ...] = ()  # why some can never be votes here; they are kept in `REFUSED`


class Desk:
    """Serves one pair folder to any number of annotators and browser windows.

    Args:
        folder: with a pairs.jsonl.
        repeats: share of the items that come back with the sides swapped, in [0, 1].

    Attributes:
        log: the folder's log.
        items: what there is to judge in each mode, in the order in which it is shown.

    Raises:
        UserError: if `EventLog` refuses the folder.
    """

    def __init__(self, folder: str | Path, repeats: float = 0.05) -> None:
        self.log = EventLog(folder)
        self.repeats = repeats
        self.items = {mode: make_items(self.log.pairs.values(), mode) for mode in ("pairs", "best_worst")}
        self._by_key = {item.key: item for items in self.items.values() for item in items}
        self._images = {
            token(image, uid): (image, uid)
            for pair in self.log.pairs.values()
            for image, uid in ((pair.image_0, pair.image_0_uid), (pair.image_1, pair.image_1_uid))
        }
        self._refused: set[str] = set()

    @property
    def name(self) -> str:
        """Name of the folder, for people."""
        return self.log.folder.resolve().name

    @property
    def folder_id(self) -> str:
        """Key of the folder, for clients that keep votes of several."""
        return _digest(str(self.log.folder.resolve()))

    def image(self, image_token: str) -> ServedImage | None:
        """The file behind a token, after a check that it is the listed image and can be read to its end.

        Returns:
            None if there is no such token.

        Raises:
            UserError: if the file is missing, leads out of the folder, is not such an image or has changed.
        """
        if image_token not in self._images:
            return None
        relative, uid = self._images[image_token]
        file = image_file(self.log.folder, relative)
        try:
            changed = is_uid(uid) and sha256(file) != uid
        except OSError as error:
            raise UserError(f"image {file} cannot be read: {error.strerror}") from error
        if changed:
            raise UserError(
                f"image {file} has changed since {PAIRS} listed it, and votes on it would be about another picture: "
                "put the former one back, or list the pair anew, which python -m dpo_sd.generate does for its own"
            )
        check_image(file)
        load_image(self.log.folder, relative)  # a browser would show the half of an image that was cut short
        return ServedImage(file, is_uid(uid))

    def note_changes(self) -> str:
        """Note on the images that have changed since they were voted on, "" without any, which the log's notes get too.

        All images that were voted on are read.
        """
        voted = {event.pair_id for event in standing(list(self.log.events))}
        pairs = [pair for pair in self.log.pairs.values() if pair.pair_id in voted]
        changed = changed_images(self.log.folder, pairs)
        if not changed:
            return ""
        images = sorted({image for images in changed.values() for image in images})
        named = ", ".join(images[:3]) + (", …" if len(images) > 3 else "")
        note = f"pictures of {count(len(changed), 'pair')} have changed since they were voted on: {named}"
        self.log.notes.append(note)
        return note

    def window(self, annotator: str, mode: Mode, show: Show) -> dict[str, Any]:
        """The items that a client shows next, and what else it needs to go on by itself for a while, as JSON.

        Args:
            annotator: name of whoever judges.
            mode, show: which items.

        Raises:
            OSError, UserError: if the log cannot be read.
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

    def receive(self, queue: Sequence[Mapping[str, Any]], clock: str | None = None) -> Receipt:
        """Writes down the votes, flags and retractions of a client, each once however often it is sent.

        A record that can never be a vote on this folder is written to `REFUSED` instead. Times are those of this
        computer's clock, or a client whose clock is slow would never have the last word.

        Args:
            queue: the records without an acknowledgement, in the order of the key presses.
            clock: what the client's clock showed when it sent them, in ISO 8601; None takes its times as they are.
        """
        events: list[Event] = []
        refused: dict[str, str] = {}  # reasons, by the record
        for record in queue:
            try:
                events += self._events(_by_our_clock(record, clock), events)
            except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
                refused[json.dumps(record, default=str)] = str(error) if type(error) is ValueError else repr(error)
        try:
            self.log.append(events)
            new = {record: reason for record, reason in refused.items() if record not in self._refused}
            self.log.set_refused_aside(new)
        except OSError as error:
            return Receipt([], not_saved(error))
        except UserError as error:
            return Receipt([], f"vote not saved: {error}")
        self._refused.update(new)
        return Receipt([str(record["id"]) for record in queue if "id" in record], "", tuple(new.values()))

    def _events(self, record: Mapping[str, Any], earlier: Sequence[Event]) -> list[Event]:
        """The events that a client's record stands for; ids follow from the record's, so that none counts twice."""
        record_id, annotator, choice = UUID(record["id"]), record["annotator"], record["choice"]
        known = [*self.log.events, *earlier] if choice == "retract" or record["repeat"] else []
        if choice == "retract":
            return [
                retract(
                    event,
                    event_id=str(uuid5(record_id, event.event_id)),
                    session_id=record["session_id"],
                    decided_at=record["decided_at"],
                    input=record["input"],
                )
                for event in known
                if event.presentation_id == record["presentation_id"] and event.event_type != "retract"
            ]
        item = self._by_key.get(record["item"])
        tokens = _tokens(item) if item else {}
        if item is None or sorted(record["shown"]) != sorted(tokens):
            raise ValueError("it is about other pictures than those that are here")
        images = [tokens[shown] for shown in record["shown"]]
        originals = _originals(standing(known), annotator)
        events = []
        for pair in item.pairs:
            places = images.index(pair.image_0), images.index(pair.image_1)
            said = implied(record["best"], record["worst"], *places) if choice == "best" else choice
            if said is None:
                continue
            details = {
                "left_image": "image_0" if places[0] < places[1] else "image_1",
                "annotator_id": annotator,
                "presentation_id": record["presentation_id"],
                "event_id": str(record_id) if len(item.pairs) == 1 else str(uuid5(record_id, pair.pair_id)),
                "repeat_of": originals.get(pair.pair_id) if record["repeat"] else None,
                "session_id": record["session_id"],
                "presented_at": record["presented_at"],
                "decided_at": record["decided_at"],
                "duration_ms": record["duration_ms"],
                "input": record["input"],
                "zoomed": record["zoomed"],
            }
            events.append(flag(pair, **details) if said == "flag" else vote(pair, said, **details))
        return events


def _by_our_clock(record: Mapping[str, Any], clock: str | None) -> Mapping[str, Any]:
    if clock is None:
        return record
    ahead = datetime.now(UTC) - datetime.fromisoformat(clock)

    def ours(time: str) -> str:
        return time_text(datetime.fromisoformat(time) + ahead)

    return {**record, **{key: ours(record[key]) for key in ("presented_at", "decided_at")}}


def token(image: str, uid: str) -> str:
    """Address of an image that tells nothing about it, and changes with its bytes.

    Args:
        image: path in the folder.
        uid: SHA-256 of the bytes, as the pair gives it.
    """
    return _digest(f"{image} {uid}")


def refusal(reasons: Sequence[str]) -> str:
    """Message for an annotator about votes that can never be stored; "" without any."""
    if not reasons:
        return ""
    return f"{count(len(reasons), 'vote')} not counted but kept in {REFUSED}: {reasons[-1]}"


def not_saved(error: OSError) -> str:
    """Message for an annotator whose votes could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "vote not saved: disk full — will be saved once there is room"
    return f"vote not saved: {error.strerror or error} — will be tried again"


def count(n: int, noun: str) -> str:
    """A number with its noun: "1 pair", "2 pairs"."""
    return f"{n} {noun}{'s' * (n != 1)}"


def _shown(item: Item, annotator: str, showing: int, repeat: bool) -> dict[str, Any]:
    images = {image: shown for shown, image in _tokens(item).items()}
    shown = [images[image] for image in item.arranged(annotator, showing)]
    return {"key": item.key, "prompt": item.prompt, "shown": shown, "repeat": repeat}


def _tokens(item: Item) -> dict[str, str]:
    """Paths of an item's images by their tokens."""
    uids = {pair.image_0: pair.image_0_uid for pair in item.pairs}
    uids |= {pair.image_1: pair.image_1_uid for pair in item.pairs}
    return {token(image, uids[image]): image for image in item.images}


def _digest(text: str) -> str:
    return hashlib.sha256(f"dpo_sd annotation {text}".encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _originals(votes: Sequence[Event], annotator: str) -> dict[str, str]:
    """Ids of an annotator's votes at first showings, by pair."""
    return {
        each.pair_id: each.event_id
        for each in votes
        if each.annotator_id == annotator and each.event_type == "vote" and each.repeat_of is None
    }


def _pace(votes: Sequence[Event], judged: Sequence[Judged]) -> float | None:
    """Items per minute over the last `PACE_OF` judgements; None before there is anything to measure."""
    recent = {each.presentation_id for each in judged[-PACE_OF:]}
    durations = {each.presentation_id: each.duration_ms for each in votes if each.presentation_id in recent}
    middle = statistics.median(durations.values()) if durations else 0
    return 60_000 / middle if middle > 0 else None
