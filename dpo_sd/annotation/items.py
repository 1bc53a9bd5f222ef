"""The items that annotators judge, and their order: functions of pairs and votes, so that nothing has to be resumed."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from dpo_sd.noise import sample_id
from dpo_sd.preferences.events import Choice, Event
from dpo_sd.preferences.outcome import counting, fold
from dpo_sd.preferences.pair_folder import Pair, current

REPEAT_AFTER = 20  # items from a vote to its repeat

Mode = Literal["pairs", "best_worst"]
Show = Literal["all", "undecided", "disputed"]


@dataclass(frozen=True)
class Item:
    """A pair, or the set of four images that six pairs share, to be judged at one showing.

    Args:
        key: the pair_id, or the ranking_id of a set.
        pairs: the pairs that one judgement decides: one, or six.
        images: paths in the folder: two, or four.
    """

    key: str
    pairs: tuple[Pair, ...]
    images: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """The prompt of all its images."""
        return self.pairs[0].prompt

    def arranged(self, annotator: str, showing: int) -> tuple[str, ...]:
        """The images from left to right, drawn for each annotator; every other showing has them the other way round.

        Args:
            annotator: name, which the draw depends on.
            showing: how often this annotator has judged the item before.
        """
        images = sorted(self.images, key=lambda image: sample_id("side", annotator, self.key, image))
        return tuple(images if showing % 2 == 0 else reversed(images))


class Showing(NamedTuple):
    """An item that an annotator is shown next."""

    item: Item
    showing: int  # how often the annotator has judged it before, which decides how it is arranged
    repeat: bool  # whether it asks for a judgement again, to see how steady the annotator is


class Judged(NamedTuple):
    """An annotator's judgement of an item, in one presentation."""

    item: Item
    presentation_id: str
    showing: int  # how often the annotator had judged the item before
    repeat: bool
    skipped: bool  # or reported as unfit: there is no judgement that could be asked for again


def make_items(pairs: Collection[Pair], mode: Mode) -> list[Item]:
    """The items of a folder, in an order that mixes the prompts and is the same for every annotator.

    Pairs whose images were drawn anew since are no longer asked about.

    Args:
        pairs: all pairs of the folder.
        mode: "pairs" makes each pair an item, "best_worst" each complete set of four and nothing else.
    """
    pairs = current(pairs)
    if mode == "pairs":
        items = [Item(pair.pair_id, (pair,), (pair.image_0, pair.image_1)) for pair in pairs]
    else:
        sets: defaultdict[str, list[Pair]] = defaultdict(list)
        for pair in pairs:
            if pair.ranking_id is not None:
                sets[pair.ranking_id].append(pair)
        items = []
        for key, members in sets.items():
            images = dict.fromkeys(image for pair in members for image in (pair.image_0, pair.image_1))
            if len(images) == 4 and len(members) == 6:
                items.append(Item(key, tuple(members), tuple(images)))
    return sorted(items, key=lambda item: sample_id("order", item.key))


def implied(best: int, worst: int, place_0: int, place_1: int) -> Choice | None:
    """The choice between two images that follows from the best and the worst of several; None where none follows.

    Args:
        best, worst: places of the two named images; of two images one is the best and the other the worst.
        place_0, place_1: places of image_0 and image_1.
    """
    if best == place_0 or worst == place_1:
        return "image_0"
    if best == place_1 or worst == place_0:
        return "image_1"
    return None


def judgements(votes: Iterable[Event], annotator: str, items: Iterable[Item]) -> list[Judged]:
    """An annotator's judgements in their order, one for each presentation.

    Args:
        votes: votes and flags that stand, in the order of the log.
        annotator: name.
        items: the items of one mode; votes on other pairs are left out, and so are votes that were given in the other
            mode: on sets if the items are pairs, on single pairs if they are sets.
    """
    votes = [vote for vote in votes if vote.annotator_id == annotator]
    together = Counter(vote.presentation_id for vote in votes)
    owner = {pair.pair_id: item for item in items for pair in item.pairs}
    showings: Counter[str] = Counter()
    found: dict[str, Judged] = {}
    for vote in votes:
        item = owner.get(vote.pair_id)
        if item is None or (together[vote.presentation_id] > 1) != (len(item.pairs) > 1):
            continue
        if vote.presentation_id not in found:
            skipped = vote.choice in ("skip", None)
            found[vote.presentation_id] = Judged(
                item, vote.presentation_id, showings[item.key], vote.repeat_of is not None, skipped
            )
            showings[item.key] += 1
    return list(found.values())


def unjudged(items: Iterable[Item], votes: Collection[Event], annotator: str, show: Show) -> list[Item]:
    """The items that a filter lets through and the annotator has yet to judge.

    Args:
        items: all items of one mode.
        votes: votes and flags that stand, by all annotators.
        annotator: name.
        show: "all" lets through whatever this annotator has not judged; "undecided" of these only what nobody else has
            decided or reported; "disputed" pairs without a majority, again if others voted on them since.
    """
    if show == "disputed":
        asking = _asking_again(items, votes, annotator)
        return [item for item in items if any(pair.pair_id in asking for pair in item.pairs)]
    settled = {vote.pair_id for vote in votes if vote.annotator_id == annotator}
    if show == "undecided":
        settled |= {vote.pair_id for vote in votes if vote.choice != "skip"}
    return [item for item in items if not any(pair.pair_id in settled for pair in item.pairs)]


def _asking_again(items: Iterable[Item], votes: Collection[Event], annotator: str) -> set[str]:
    """Pairs without a majority on which others voted after this annotator."""
    mine: dict[str, str] = {}
    others: dict[str, str] = {}
    for (pair_id, who), vote in counting(votes).items():
        latest = mine if who == annotator else others
        latest[pair_id] = max(latest.get(pair_id, ""), vote.decided_at)
    pairs = [pair for item in items for pair in item.pairs if pair.pair_id in others]
    return {
        each.pair.pair_id
        for each in fold(pairs, votes)
        if each.status == "disputed" and others[each.pair.pair_id] > mine.get(each.pair.pair_id, "")
    }


def upcoming(
    fresh: Iterable[Item], judged: Sequence[Judged], annotator: str, repeats: float = 0.0, seed: int = 0
) -> Iterator[Showing]:
    """The coming showings of an annotator: fresh items, and between them some that come back with the sides swapped.

    A repeat comes `REPEAT_AFTER` items after the first judgement or later, and not at all if the items end before.

    Args:
        fresh: items not judged yet, in their order.
        judged: the annotator's judgements, in their order.
        annotator: name.
        repeats: share of the items that come back, in [0, 1].
        seed: seed of the draw of those items.
    """
    showings = Counter(each.item.key for each in judged)
    repeated = {each.item.key for each in judged if each.repeat}
    due: deque[tuple[int, Item]] = deque()

    def drawn(item: Item) -> bool:  # sample_id is uniform below 2^63
        return item.key not in repeated and sample_id("repeat", str(seed), annotator, item.key) < repeats * 2**63

    due.extend(
        (place, each.item)
        for place, each in enumerate(judged)
        if each.showing == 0 and not each.skipped and drawn(each.item)
    )

    coming = iter(fresh)
    place = len(judged)
    while True:
        repeat = bool(due) and place - due[0][0] >= REPEAT_AFTER
        item = due.popleft()[1] if repeat else next(coming, None)
        if item is None:
            return
        yield Showing(item, showings[item.key], repeat)
        if not repeat and item.key not in showings and drawn(item):
            due.append((place, item))
        showings[item.key] += 1
        place += 1
