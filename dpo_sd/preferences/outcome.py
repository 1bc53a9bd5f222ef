"""Outcome of the votes: from events to one preference per pair."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dpo_sd.preferences.pair_folder import Pair

if TYPE_CHECKING:
    from dpo_sd.preferences.events import Event

Status = Literal["image_0", "image_1", "tie", "both_bad", "disputed", "skipped", "flagged", "undecided"]
SIDES: tuple[Status, Status] = ("image_0", "image_1")  # the outcomes that decide a pair


@dataclass(frozen=True)
class Preference:
    """Outcome of the votes on one pair.

    Args:
        pair: the pair.
        votes_0, votes_1, votes_tie, votes_bad: numbers of annotators by their choice, at least 0.
        skips: number of annotators who only skipped it.
        flagged: whether somebody reported it as unfit.
        decided_at: time of the latest vote that counts, None without one.
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
        """Number of votes that count, skips not among them."""
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
    """The votes and flags that are not undone, each once, wherever in the log they and their retracts stand."""
    unique: dict[str, Event] = {}
    for event in events:
        unique.setdefault(event.event_id, event)
    undone = {event.retracts for event in unique.values()}
    return [each for each in unique.values() if each.event_type != "retract" and each.event_id not in undone]


def counting(events: Iterable[Event]) -> dict[tuple[str, str], Event]:
    """The one vote that counts for each (pair_id, annotator_id).

    It is the last vote at a first showing; without one the last repeat, and a skip only if there is nothing else.
    "Last" goes by (decided_at, event_id), never by the order in the log.
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
    """One preference per pair, in the order of the pairs; the order of the events does not matter."""
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


def merged(preferences: Sequence[Preference]) -> tuple[list[Preference], list[str]]:
    """One preference per pair of files, and lines for the report where a list has a pair more than once.

    The votes of all places are added up, also where the images stand in the other order; so opposite verdicts make a
    pair disputed, unless one has more votes.
    """
    by_files: dict[tuple[str, frozenset[tuple[str, str]]], list[Preference]] = defaultdict(list)
    for each in preferences:
        pair = each.pair
        files = frozenset([(pair.image_0, pair.image_0_uid), (pair.image_1, pair.image_1_uid)])
        by_files[pair.prompt, files].append(each)
    several = [group for group in by_files.values() if len(group) > 1]
    if not several:
        return list(preferences), []
    turned = [group for group in several if len({each.pair.image_0 for each in group}) > 1]
    line = f"{len(several)} pairs are listed more than once"
    line += f", {len(turned)} of them in both orders" if turned else ""
    line += ": each counts once, with the votes of all its places"
    opposite = [group[0].pair for group in several if len(set(map(_winner, group)) - {None}) > 1]
    if opposite:
        named = "; ".join(f"{pair.image_0} and {pair.image_1}" for pair in opposite[:5])
        line += f"; {len(opposite)} of them have opposite verdicts: {named}{' …' if len(opposite) > 5 else ''}"
    return [_added_up(group) for group in by_files.values()], [line]


def _winner(preference: Preference) -> str | None:
    pair = preference.pair
    return {"image_0": pair.image_0, "image_1": pair.image_1}.get(preference.status)


def _added_up(group: Sequence[Preference]) -> Preference:
    first = group[0]
    if len(group) == 1:
        return first
    alike = [each.pair.image_0 == first.pair.image_0 for each in group]
    sides = [(each.votes_0, each.votes_1) for each in group]
    return Preference(
        pair=first.pair,
        votes_0=sum(votes[not same] for votes, same in zip(sides, alike, strict=True)),
        votes_1=sum(votes[same] for votes, same in zip(sides, alike, strict=True)),
        votes_tie=sum(each.votes_tie for each in group),
        votes_bad=sum(each.votes_bad for each in group),
        skips=sum(each.skips for each in group),
        flagged=any(each.flagged for each in group),
        decided_at=max(filter(None, (each.decided_at for each in group)), default=None),
    )
