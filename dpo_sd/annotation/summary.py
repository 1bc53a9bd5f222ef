"""Statistics of the votes: win rates of the models, habits of the annotators, and how far to trust them."""

from __future__ import annotations

import shlex
import statistics
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpo_sd.errors import override
from dpo_sd.models.families import SHIPPED
from dpo_sd.preferences.drawn_with import drawn_with
from dpo_sd.preferences.events import Event
from dpo_sd.preferences.outcome import Preference, counting, fold, standing
from dpo_sd.preferences.pair_folder import Pair
from dpo_sd.statistics import WinRate, flip_rate, krippendorff_alpha, position_bias, votes_to_detect, wilson

TOO_FAST_MS = 400  # nobody compares two pictures in less


@dataclass(frozen=True)
class Votes:
    """Counts and habits of one annotator's votes, or of everybody's.

    Args:
        name: the annotator's.
        votes: number of pairs that were voted on, repeats not among them.
        skips: number of pairs that were only skipped.
        seconds: median time for a decision, None where none was measured.
        too_fast: number of votes given in less than `TOO_FAST_MS`.
        left: share of the left image among votes for an image, with its exact interval; None without votes.
        left_p: p-value of the exact test that neither side is favoured, None without votes.
        steady: share of repeats that chose the same image as at first, None without repeats.
    """

    name: str
    votes: int
    skips: int
    seconds: float | None
    too_fast: int
    left: WinRate | None
    left_p: float | None
    steady: WinRate | None

    @property
    def flip_rate(self) -> float | None:
        """Share of the votes that are slips, in [0, ½]; None without repeats."""
        return None if self.steady is None else flip_rate(self.steady.rate)


@dataclass(frozen=True)
class Summary:
    """Statistics of the votes of a folder.

    Args:
        statuses: numbers of pairs by their status.
        annotators: the one with the most votes first.
        together: all annotators as one.
        models: win rates against all others, best first; empty where all pairs were drawn by one. Their n are pairs,
            because several votes on one pair are not independent.
        agreement: Krippendorff's α between annotators, None where no pair has two.
        shared: number of pairs that more than one annotator voted on.
    """

    statuses: Counter[str]
    annotators: list[Votes]
    together: Votes
    models: list[tuple[str, WinRate]]
    agreement: float | None
    shared: int

    @property
    def decided(self) -> int:
        """Number of pairs of which one image is preferred."""
        return self.statuses["image_0"] + self.statuses["image_1"]


def summarise(pairs: Collection[Pair], events: Collection[Event]) -> Summary:
    """Statistics of the votes of a folder.

    Args:
        pairs: all pairs of the folder.
        events: all events of its log.
    """
    votes = [event for event in standing(events) if event.event_type == "vote"]
    by_annotator: defaultdict[str, list[Event]] = defaultdict(list)
    for vote in votes:
        by_annotator[vote.annotator_id].append(vote)
    preferences = fold(pairs, events)
    agreement, shared = _agreement(counting(events).values())
    return Summary(
        statuses=Counter(each.status for each in preferences),
        annotators=sorted((_votes_of(*each) for each in by_annotator.items()), key=lambda who: (-who.votes, who.name)),
        together=_votes_of("all", votes),
        models=_models(preferences),
        agreement=agreement,
        shared=shared,
    )


def _votes_of(name: str, votes: Sequence[Event]) -> Votes:
    counted = counting(votes).values()
    given = [vote for vote in votes if vote.choice != "skip"]
    # a set of four is one decision, and the simulated annotator takes no time
    times = {vote.presentation_id: vote.duration_ms for vote in given if vote.duration_ms > 0}
    chosen = [vote for vote in given if vote.choice in ("image_0", "image_1")]
    left = sum(vote.choice == vote.left_image for vote in chosen)
    share, p, low, high = position_bias(left, len(chosen) - left) if chosen else (None, None, 0.0, 0.0)
    first = {vote.event_id: vote.choice for vote in chosen}
    same = [vote.choice == first[vote.repeat_of] for vote in chosen if vote.repeat_of in first]
    return Votes(
        name=name,
        votes=sum(vote.choice != "skip" for vote in counted),
        skips=sum(vote.choice == "skip" for vote in counted),
        seconds=statistics.median(times.values()) / 1000 if times else None,
        too_fast=sum(time < TOO_FAST_MS for time in times.values()),
        left=None if share is None else WinRate(share, low, high, len(chosen)),
        left_p=p,
        steady=wilson(sum(same), len(same)) if same else None,
    )


def _models(preferences: Iterable[Preference]) -> list[tuple[str, WinRate]]:
    wins: Counter[str] = Counter()
    pairs: Counter[str] = Counter()
    for each in preferences:
        model_0, model_1 = each.pair.model_0, each.pair.model_1
        directed = each.votes_0 + each.votes_1 + each.votes_tie
        if model_0 is None or model_1 is None or model_0 == model_1 or each.flagged or not directed:
            continue
        pairs.update((model_0, model_1))
        wins.update({model_0: each.label_0, model_1: 1 - each.label_0})
    rates = [(model, wilson(wins[model], pairs[model])) for model in pairs]
    return sorted(rates, key=lambda each: (-each[1].rate, each[0]))


def _agreement(votes: Iterable[Event]) -> tuple[float | None, int]:
    by_pair: defaultdict[str, dict[str, Event]] = defaultdict(dict)
    for vote in votes:
        if vote.choice != "skip":
            by_pair[vote.pair_id][vote.annotator_id] = vote
    shared = [given for given in by_pair.values() if len(given) > 1]
    if not shared:
        return None, 0
    rows = {name: row for row, name in enumerate(sorted({name for given in shared for name in given}))}
    choices = ("image_0", "image_1", "tie", "both_bad")
    values = np.full((len(rows), len(shared)), np.nan)
    for column, given in enumerate(shared):
        for name, vote in given.items():
            values[rows[name], column] = choices.index(str(vote.choice))
    return krippendorff_alpha(values), len(shared)


def position_words(who: Votes) -> str:
    """Sentence on whether one side is favoured, and how many votes it takes to see it."""
    needed = votes_to_detect()
    if who.left is None or who.left_p is None:
        return f"No votes yet; to see a 60/40 habit takes {needed}."
    seen = f"Left was chosen in {who.left}, p = {who.left_p:.2g}: "
    if who.left_p < 0.05:
        return seen + "one side is favoured. Blind sides keep that out of the labels; it costs accuracy."
    if who.left.n < needed:
        return seen + f"nothing to see yet, and a 60/40 habit would take {needed} votes to see."
    return seen + "no habit to be seen."


def smoothing_words(who: Votes) -> str:
    """Sentence on the share of the votes that are slips, as the repeats show it."""
    if who.steady is None or who.flip_rate is None:
        return "How often votes are slips is not known yet: it takes repeats."
    low, high = flip_rate(who.steady.high), flip_rate(who.steady.low)
    seen = f"Repeats were answered alike in {who.steady}, so {who.flip_rate:.3f} [{low:.3f}, {high:.3f}] of the votes"
    if smoothing_override(who) is None:
        return seen + " are slips, which is as good as chance: there is nothing to learn from them."
    return seen + " are slips. To tell the loss, add"


def smoothing_override(who: Votes) -> str | None:
    """The setting that tells the loss the share of slips; None where that is not known or as good as chance."""
    rate = who.flip_rate
    return None if rate is None or rate >= 0.5 else f"loss.label_smoothing={rate:.3f}"


def train_command(folder: Path) -> str:
    """The shell command that trains on the preferences of a folder: with the model that drew its images, from the LoRA
    that did."""
    words = ["python", "-m", "dpo_sd.train", "experiment=style_dpo", override("data.pairs", str(folder))]
    made_by = drawn_with(folder)
    if made_by and made_by["model"] != SHIPPED:  # which the experiment has
        words.append(override("model", made_by["model"]))
    if made_by and len(made_by["loras"]) == 1:
        words.append(override("lora.init_from", made_by["loras"][0]["path"]))
    return shlex.join(words)
