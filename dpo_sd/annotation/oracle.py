"""Annotation without people: votes by a known taste, as the same events in the same log."""

from __future__ import annotations

import itertools
from collections import Counter
from contextlib import closing
from pathlib import Path
from uuid import NAMESPACE_OID, uuid5

from dpo_sd.annotation.desk import Desk
from dpo_sd.annotation.items import judgements, unjudged, upcoming
from dpo_sd.errors import UserError
from dpo_sd.judges.oracle import Oracle
from dpo_sd.preferences.events import Event, vote
from dpo_sd.preferences.outcome import standing
from dpo_sd.preferences.pair_folder import Pair, load_image
from dpo_sd.shapes.annotator import SimulatedAnnotator

BATCH = 64  # votes that are written at a time


class OracleAnnotator:
    """Votes on pictures of the shapes world by what is measured in them, with known faults.

    Args:
        preference: what it likes, a name in `dpo_sd.shapes.oracle.UTILITIES`.
        style: that the pictures are drawn in, one of `dpo_sd.shapes.scenes.STYLES`.
        temperature, tie_band, side_bias, flip_rate, seed: as for `SimulatedAnnotator`.
        name: in the log; several oracles of different names vote beside each other.
        repeats: share of the pairs that it is asked again with the sides swapped, in [0, 1].

    Raises:
        UserError: when a value is out of range or a name is unknown.
    """

    def __init__(
        self,
        preference: str = "centred",
        style: str = "flat",
        temperature: float = 0.0,
        tie_band: float = 0.0,
        side_bias: float = 0.0,
        flip_rate: float = 0.0,
        seed: int = 0,
        name: str = "oracle",
        repeats: float = 0.0,
    ) -> None:
        if not name.strip():
            raise UserError("name must not be empty")
        if not 0 <= repeats <= 1:
            raise UserError(f"repeats must be in [0, 1], got {repeats}")
        self.taste = Oracle(preference, style)
        self.annotator = SimulatedAnnotator(temperature, tie_band, side_bias, flip_rate, seed)
        self.name = name.strip()
        self.repeats = repeats

    def annotate(self, folder: Path) -> None:
        """Votes on the pairs that this annotator has not voted on, and says how many there were.

        Raises:
            UserError: when the folder cannot be annotated or a picture is not of the shapes world.
            OSError: when the votes cannot be written.
        """
        desk = Desk(folder)
        with closing(desk.log):
            given: Counter[str] = Counter()
            events = self._votes(desk)
            while batch := list(itertools.islice(events, BATCH)):
                desk.log.append(batch)
                given.update(str(event.choice) for event in batch if event.repeat_of is None)
            counts = ", ".join(f"{given[choice]} {choice}" for choice in ("image_0", "image_1", "tie", "skip"))
            print(f"{folder}: {given.total()} new votes by {self.name} ({self.taste.name}): {counts}")

    def _votes(self, desk: Desk):
        items = desk.items["pairs"]
        standing_votes = standing(desk.log.events)
        judged = judgements(standing_votes, self.name, items)
        fresh = unjudged(items, standing_votes, self.name, "all")
        originals = {each.pair_id: each.event_id for each in standing_votes if each.annotator_id == self.name}
        for showing in upcoming(fresh, judged, self.name, self.repeats, self.annotator.seed):
            (pair,) = showing.item.pairs
            event = self._vote(desk.log.folder, pair, originals.get(pair.pair_id) if showing.repeat else None)
            originals[pair.pair_id] = event.event_id
            yield event

    def _vote(self, folder: Path, pair: Pair, repeat_of: str | None) -> Event:
        left = self.annotator.left_image(pair.pair_id)
        asked = pair.pair_id  # what the annotator's draws hang on
        if repeat_of is not None:
            others = (f"{pair.pair_id} again {k}" for k in itertools.count())
            asked = next(other for other in others if self.annotator.left_image(other) != left)
        try:
            images = [load_image(folder, image) for image in (pair.image_0, pair.image_1)]
            choice = self.annotator.choose(asked, *self.taste.scores(images, [pair.prompt] * 2))
        except UserError as error:
            raise UserError(f"pair {pair.pair_id} cannot be judged: {error}") from error
        identity = f"{self.annotator.seed} {self.name} {asked}"
        return vote(
            pair,
            choice,
            self.annotator.left_image(asked),
            self.name,
            event_id=str(uuid5(NAMESPACE_OID, f"dpo_sd vote {identity}")),
            presentation_id=str(uuid5(NAMESPACE_OID, f"dpo_sd presentation {identity}")),
            repeat_of=repeat_of,
            session_id="simulation",
        )
