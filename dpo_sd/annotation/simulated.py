"""Annotation without people: votes by a judge, with known faults, as the same events in the same log."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from uuid import NAMESPACE_OID, uuid5

from dpo_sd import noise
from dpo_sd.annotation.annotator import Annotator
from dpo_sd.annotation.desk import Desk
from dpo_sd.annotation.items import Showing, judgements, unjudged, upcoming
from dpo_sd.errors import UserError
from dpo_sd.preferences.events import Event, vote
from dpo_sd.preferences.outcome import standing
from dpo_sd.preferences.pair_folder import Pair, check_image, image_file, load_image

if TYPE_CHECKING:
    from dpo_sd.judges.judge import Judge

BATCH = 64  # votes that are written at a time


class SimulatedAnnotator(Annotator):
    """Annotator who sees a judge's scores through logistic noise: the Bradley-Terry model, with known faults.

    Every answer is a function of (seed, pair_id) and the two scores, never of the order of asking.

    Args:
        temperature: in units of the score, at least 0: P(image_0) is the sigmoid of
            (score_0 - score_1) / temperature; 0 always takes the higher score.
        tie_band: scores that differ by at most this much are a tie, at least 0; at 0 only equal scores are.
        side_bias: log-odds added to the image shown on the left, which is drawn per pair; finite, below 0 for the
            right.
        flip_rate: share of the answers that are reversed, in [0, 1]; a tie stays a tie.
        seed: seed of all draws, in [0, 2^64).
        name: name in the log; several of different names vote beside each other.
        repeats: share of the pairs that are asked again with the sides swapped, in [0, 1].

    Raises:
        UserError: if a value is out of range, or side_bias meets temperature 0, where no finite log-odds change the
            answer.
    """

    def __init__(
        self,
        temperature: float = 0.0,
        tie_band: float = 0.0,
        side_bias: float = 0.0,
        flip_rate: float = 0.0,
        seed: int = 0,
        name: str = "oracle",
        repeats: float = 0.0,
    ) -> None:
        if not 0 <= temperature < math.inf:
            raise UserError(f"temperature must be at least 0 and finite, got {temperature}")
        if not 0 <= tie_band < math.inf:
            raise UserError(f"tie_band must be at least 0 and finite, got {tie_band}")
        if not math.isfinite(side_bias):
            raise UserError(f"side_bias must be finite, got {side_bias}")
        if side_bias != 0 and temperature == 0:
            raise UserError(f"side_bias={side_bias} has no effect at temperature 0: give a temperature above 0")
        if not 0 <= flip_rate <= 1:
            raise UserError(f"flip_rate must be in [0, 1], got {flip_rate}")
        noise.check_uint64("seed", seed)
        if not name.strip():
            raise UserError("name must not be empty")
        if not 0 <= repeats <= 1:
            raise UserError(f"repeats must be in [0, 1], got {repeats}")
        self.temperature = temperature
        self.tie_band = tie_band
        self.side_bias = side_bias
        self.flip_rate = flip_rate
        self.seed = seed
        self.name = name.strip()
        self.repeats = repeats

    def left_image(self, pair_id: str) -> Literal["image_0", "image_1"]:
        """The image that this annotator is shown on the left."""
        coin = noise.uniform(self.seed, noise.sample_id(pair_id), 0, "annotator side")
        return "image_0" if coin < 0.5 else "image_1"

    def choose(self, pair_id: str, score_0: float, score_1: float) -> Literal["image_0", "image_1", "tie"]:
        """The better image in this annotator's eyes.

        Args:
            pair_id: key of the pair's draws.
            score_0, score_1: true scores, finite, higher is better.

        Raises:
            UserError: if a score is not finite.
        """
        if not (math.isfinite(score_0) and math.isfinite(score_1)):
            raise UserError(f"scores must be finite, got {score_0} and {score_1} for pair {pair_id}")
        gap = score_0 - score_1
        if abs(gap) <= self.tie_band:
            return "tie"
        rng = noise.generator(self.seed, noise.sample_id(pair_id), 0, "annotator choice")
        bias = self.side_bias if self.left_image(pair_id) == "image_0" else -self.side_bias
        # a logistic variable is below x with probability sigmoid(x): adding one to the log-odds gives Bradley-Terry,
        # and multiplying by the temperature instead of dividing keeps 0 an ordinary value
        prefers_0 = gap + self.temperature * (bias + rng.logistic()) > 0
        flipped = rng.random() < self.flip_rate
        return "image_0" if prefers_0 != flipped else "image_1"

    def annotate(self, folder: Path, judge: Judge | None) -> None:
        """Votes on the pairs that this annotator has not voted on, and prints how many there were.

        Raises:
            UserError: if there is no judge, the folder cannot be annotated, or a pair cannot be judged.
            OSError: if the votes cannot be written.
        """
        if judge is None:
            raise UserError("a simulated annotator votes by a judge, and there is none: add judge=oracle")
        desk = Desk(folder)
        with closing(desk.log):
            given: Counter[str] = Counter()
            votes = self._votes(desk, judge)
            while batch := list(itertools.islice(votes, BATCH)):
                desk.log.append(batch)
                given.update(str(event.choice) for event in batch if event.repeat_of is None)
            counts = ", ".join(f"{given[choice]} {choice}" for choice in ("image_0", "image_1", "tie", "skip"))
            print(f"{folder}: {given.total()} new votes by {self.name} ({judge.name}): {counts}")

    def _votes(self, desk: Desk, judge: Judge) -> Iterator[Event]:
        before = standing(desk.log.events)
        items = desk.items["pairs"]
        fresh = unjudged(items, before, self.name, "all")
        showings = list(upcoming(fresh, judgements(before, self.name, items), self.name, self.repeats, self.seed))
        _check(showings, desk.log.folder, judge)
        originals = {each.pair_id: each.event_id for each in before if each.annotator_id == self.name}
        for showing in showings:
            (pair,) = showing.item.pairs
            with _naming(pair):
                images = [load_image(desk.log.folder, image) for image in (pair.image_0, pair.image_1)]
                scores = judge.scores(images, [pair.prompt] * 2)
                event = self._vote(pair, scores, originals.get(pair.pair_id) if showing.repeat else None)
            originals[pair.pair_id] = event.event_id
            yield event

    def _vote(self, pair: Pair, scores: Sequence[float], repeat_of: str | None) -> Event:
        left = self.left_image(pair.pair_id)
        asked = pair.pair_id  # key of this showing's draws
        if repeat_of is not None:
            others = (f"{pair.pair_id} again {k}" for k in itertools.count())
            asked = next(other for other in others if self.left_image(other) != left)
        identity = f"{self.seed} {self.name} {asked}"
        return vote(
            pair,
            self.choose(asked, *scores),
            self.left_image(asked),
            self.name,
            event_id=str(uuid5(NAMESPACE_OID, f"dpo_sd vote {identity}")),
            presentation_id=str(uuid5(NAMESPACE_OID, f"dpo_sd presentation {identity}")),
            repeat_of=repeat_of,
            session_id="simulation",
        )


def _check(showings: Sequence[Showing], folder: Path, judge: Judge) -> None:
    """Refuses images and prompts that cannot be judged before the first vote is written."""
    for pair in {showing.item.key: showing.item.pairs[0] for showing in showings}.values():
        with _naming(pair):
            for image in (pair.image_0, pair.image_1):
                judge.check(check_image(image_file(folder, image)), [pair.prompt])


@contextmanager
def _naming(pair: Pair) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"pair {pair.pair_id} cannot be judged: {error}") from error
