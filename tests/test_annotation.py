"""What comes next, what is written down, what the votes say, and the pages; the keys are tested in a browser."""

from __future__ import annotations

import errno
import itertools
import json
import math
import shlex
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from PIL import Image
from streamlit.testing.v1 import AppTest

from dpo_sd.annotation import views
from dpo_sd.annotation.app import Person
from dpo_sd.annotation.desk import WINDOW, Desk, token
from dpo_sd.annotation.items import REPEAT_AFTER, implied, judgements, make_items, unjudged, upcoming
from dpo_sd.annotation.summary import position_words, smoothing_override, smoothing_words, summarise, train_command
from dpo_sd.errors import UserError
from dpo_sd.files.hashes import read_sha256
from dpo_sd.preferences.drawn_with import RECORD, write_record
from dpo_sd.preferences.events import Event, flag, time_text, vote
from dpo_sd.preferences.log import REFUSED
from dpo_sd.preferences.outcome import standing
from dpo_sd.preferences.pair_folder import Pair, pair_id, write_pairs

NOON = "2031-05-17T12:00:00.000Z"


def make_pair(number: int, a: int = 0, b: int = 1, ranking_id: str | None = None) -> Pair:
    prompt = f"prompt {number}"
    uids = f"{number}-{a}", f"{number}-{b}"
    image_0, image_1 = (f"images/{uid}.png" for uid in uids)
    return Pair(pair_id(prompt, *uids), prompt, image_0, image_1, *uids, ranking_id, "tiny", "tiny + style:0.8")


def make_set(number: int, size: int = 4) -> list[Pair]:
    return [make_pair(number, a, b, f"set/{number}") for a, b in itertools.combinations(range(size), 2)]


@pytest.fixture
def pairs() -> list[Pair]:
    return [make_pair(number) for number in range(200)]


@pytest.fixture
def desk(tmp_path: Path, pairs: list[Pair]) -> Iterator[Desk]:
    yield from opened(tmp_path, pairs[:30])


@pytest.fixture
def desk_of_sets(tmp_path: Path) -> Iterator[Desk]:
    yield from opened(tmp_path, [pair for number in range(3) for pair in make_set(number)])


def opened(folder: Path, pairs: list[Pair]) -> Iterator[Desk]:
    write_pairs(folder, pairs)
    desk = Desk(folder)
    with closing(desk.log):
        yield desk


def record(item: dict[str, Any], choice: str = "best", best: int | None = 0, worst: int | None = 1, **more: Any):
    """What the client sends for a key press."""
    return {
        "id": str(uuid4()),
        "annotator": "anna",
        "session_id": "sitting",
        "item": item["key"],
        "shown": item["shown"],
        "repeat": item["repeat"],
        "presentation_id": str(uuid4()),
        "presented_at": NOON,
        "decided_at": NOON,
        "duration_ms": 900,
        "zoomed": False,
        "input": "key",
        "choice": choice,
        "best": best,
        "worst": worst,
    } | more


def token_of(event: Event, image: str) -> str:
    """The address of image_0 or image_1."""
    return token(getattr(event, image), getattr(event, f"{image}_uid"))


# what comes next


def walk(pairs: list[Pair], n: int, repeats: float, annotator: str = "anna"):
    """The first n showings of somebody who never skips."""
    return list(itertools.islice(upcoming(make_items(pairs, "pairs"), [], annotator, repeats), n))


def test_the_order_mixes_the_prompts_and_is_the_same_in_any_order_of_the_file(pairs):
    items = make_items(pairs, "pairs")
    assert items == make_items(pairs[::-1], "pairs")
    assert [item.pairs[0] for item in items] != pairs
    assert sorted(item.key for item in items) == sorted(pair.pair_id for pair in pairs)


def test_each_image_is_on_the_left_about_as_often_and_not_alike_for_all_annotators(pairs):
    items = make_items(pairs, "pairs")
    sides = {who: [item.arranged(who, 0)[0] == item.images[0] for item in items] for who in ("anna", "ben")}
    assert all(80 <= sum(left) <= 120 for left in sides.values())
    assert sides["anna"] != sides["ben"]


def test_a_repeat_comes_at_least_twenty_items_later_once_and_with_the_sides_swapped(pairs):
    showings = walk(pairs, 10_000, repeats=0.3)
    keys = [each.item.key for each in showings]
    repeats = [place for place, each in enumerate(showings) if each.repeat]
    assert 30 <= len(repeats) <= 80
    for place in repeats:
        first = keys.index(keys[place])
        assert place - first >= REPEAT_AFTER
        item = showings[place].item
        assert item.arranged("anna", showings[place].showing) == item.arranged("anna", showings[first].showing)[::-1]
    assert max(Counter(keys).values()) == 2


def test_the_share_of_repeats_is_what_was_asked_for():
    many = [make_pair(number) for number in range(4000)]
    assert 150 <= sum(each.repeat for each in walk(many, 10_000, repeats=0.05)) <= 250
    assert not any(each.repeat for each in walk(many, 10_000, repeats=0.0))


def test_stopping_and_going_on_shows_what_would_have_come(pairs):
    items = make_items(pairs, "pairs")
    whole = walk(pairs, 120, repeats=0.3)
    votes: list[Event] = []
    for each in whole[:70]:
        original = next((v.event_id for v in votes if v.pair_id == each.item.key), None)
        votes.append(
            vote(each.item.pairs[0], "image_0", "image_0", "anna", repeat_of=original if each.repeat else None)
        )
    judged = judgements(votes, "anna", items)
    going_on = upcoming(unjudged(items, votes, "anna", "all"), judged, "anna", 0.3)
    assert list(itertools.islice(going_on, 50)) == whole[70:]


def test_skipped_items_do_not_come_back(pairs):
    items = make_items(pairs, "pairs")
    votes = [vote(item.pairs[0], "skip", "image_0", "anna") for item in items[:50]]
    judged = judgements(votes, "anna", items)
    left = list(upcoming(unjudged(items, votes, "anna", "all"), judged, "anna", repeats=1.0))
    assert not {item.key for item in items[:50]} & {each.item.key for each in left}


def test_the_filters_show_what_they_say(pairs):
    items = make_items(pairs[:5], "pairs")
    mine, others, split, skipped, untouched = (item.pairs[0] for item in items)
    votes = [
        vote(mine, "image_0", "image_0", "anna"),
        vote(others, "image_0", "image_0", "ben"),
        vote(split, "image_0", "image_0", "ben"),
        vote(split, "image_1", "image_0", "carla"),
        vote(skipped, "skip", "image_0", "ben"),
    ]

    def shown(show: Any, who: str = "anna") -> list[Pair]:
        return [item.pairs[0] for item in unjudged(items, votes, who, show)]

    assert shown("all") == [others, split, skipped, untouched]
    assert shown("undecided") == [skipped, untouched]
    assert shown("disputed") == [split]


def test_a_disputed_pair_asks_those_who_were_answered_since_but_not_twice(pairs):
    items = make_items(pairs[:1], "pairs")

    def at(second: int, who: str, choice: Any) -> Event:
        return vote(pairs[0], choice, "image_0", who, decided_at=f"2031-05-17T12:00:{second:02}.000Z")

    votes = [at(1, "anna", "image_0"), at(2, "ben", "image_1")]
    assert unjudged(items, votes, "anna", "disputed") == items
    assert unjudged(items, votes, "ben", "disputed") == []
    assert unjudged(items, [*votes, at(3, "anna", "image_0")], "anna", "disputed") == []


# sets of four


def test_sets_of_four_are_one_item_each_and_others_are_left_out():
    pairs = [*make_set(0), *make_set(1), *make_set(2, size=3), *make_set(3)[:5], make_pair(4)]
    items = make_items(pairs, "best_worst")
    assert {item.key for item in items} == {"set/0", "set/1"}
    assert all(len(item.images) == 4 and len(item.pairs) == 6 for item in items)


def test_best_and_worst_say_something_about_five_of_the_six_pairs():
    said = {(a, b): implied(2, 0, a, b) for a, b in itertools.combinations(range(4), 2)}
    assert said == {
        (0, 1): "image_1",
        (0, 2): "image_1",
        (0, 3): "image_1",
        (1, 2): "image_1",
        (1, 3): None,
        (2, 3): "image_0",
    }


@pytest.mark.parametrize(("best", "choice"), [(0, "image_0"), (1, "image_1")])
def test_of_two_the_best_is_all_there_is_to_say(best, choice):
    assert implied(best, 1 - best, 0, 1) == choice


def test_the_implied_votes_share_a_ranking_and_a_showing_and_are_undone_together(desk_of_sets):
    (item, *_) = desk_of_sets.window("anna", "best_worst", "all")["items"]
    sent = record(item, best=3, worst=1)
    assert desk_of_sets.receive([sent]) == ([sent["id"]], "", ())
    events = desk_of_sets.log.events
    assert len(events) == 5
    assert {(each.ranking_id, each.presentation_id) for each in events} == {(item["key"], sent["presentation_id"])}
    wins = Counter(token_of(each, str(each.choice)) for each in events)
    assert wins[item["shown"][3]] == 3
    assert wins[item["shown"][1]] == 0
    desk_of_sets.receive([record(item, "retract", presentation_id=sent["presentation_id"])])
    assert standing(desk_of_sets.log.events) == []
    assert desk_of_sets.window("anna", "best_worst", "all")["items"][0] == item


def test_what_was_judged_in_the_one_mode_is_left_out_in_the_other_and_not_counted_there(desk_of_sets):
    set_of_four = desk_of_sets.window("anna", "best_worst", "all")["items"][0]
    desk_of_sets.receive([record(set_of_four, best=3, worst=1)])
    pairs = desk_of_sets.window("anna", "pairs", "all")
    assert (pairs["judged"], pairs["left"], pairs["history"]) == (0, 13, [])
    other = next(item for item in pairs["items"] if not set(item["shown"]) <= set(set_of_four["shown"]))
    desk_of_sets.receive([record(other)])
    sets = desk_of_sets.window("anna", "best_worst", "all")
    assert (sets["judged"], sets["left"]) == (1, 1)
    assert [each["key"] for each in sets["history"]] == [set_of_four["key"]]


def test_a_tie_between_four_is_six_ties(desk_of_sets):
    item = desk_of_sets.window("anna", "best_worst", "all")["items"][0]
    desk_of_sets.receive([record(item, "tie", None, None)])
    assert [each.choice for each in desk_of_sets.log.events] == ["tie"] * 6


# what is written down


def test_a_vote_names_the_image_that_stood_where_the_key_points(desk):
    for place, item in enumerate(desk.window("anna", "pairs", "all")["items"][:10]):
        best = place % 2
        desk.receive([record(item, best=best, worst=1 - best)])
        event = desk.log.events[-1]
        assert token_of(event, str(event.choice)) == item["shown"][best]
        assert token_of(event, event.left_image) == item["shown"][0]


def test_a_queue_that_is_sent_again_counts_once(desk):
    items = desk.window("anna", "pairs", "all")["items"]
    queue = [record(item) for item in items[:3]]
    queue.append(record(items[2], "retract", presentation_id=queue[-1]["presentation_id"]))
    for end in (1, 3, 4, 4):
        assert desk.receive(queue[:end]).acknowledged == [each["id"] for each in queue[:end]]
    assert len(desk.log.events) == 4
    assert len(standing(desk.log.events)) == 2


def test_what_was_judged_is_gone_from_the_window_and_can_be_undone(desk):
    before = desk.window("anna", "pairs", "all")
    sent = record(before["items"][0])
    desk.receive([sent])
    after = desk.window("anna", "pairs", "all")
    assert (after["judged"], after["left"]) == (1, before["left"] - 1)
    assert after["items"][0] == before["items"][1]
    assert after["history"] == [before["items"][0] | {"presentation_id": sent["presentation_id"]}]
    assert after["pace"] == pytest.approx(60 / 0.9)
    assert desk.window("ben", "pairs", "all")["judged"] == 0


def test_a_repeat_names_the_vote_that_it_asks_for_again(desk):
    (item, *_) = desk.window("anna", "pairs", "all")["items"]
    first, again = record(item), record(item | {"repeat": True, "shown": item["shown"][::-1]})
    desk.receive([first, again])
    assert [each.repeat_of for each in desk.log.events] == [None, first["id"]]
    sides = [each.left_image for each in desk.log.events]
    assert sorted(sides) == ["image_0", "image_1"]


def test_votes_have_the_time_of_this_computer_whatever_the_clients_clock_shows(desk):
    item = desk.window("anna", "pairs", "all")["items"][0]
    late = datetime.now(UTC) - timedelta(hours=1)
    sent = record(item) | {"presented_at": time_text(late - timedelta(seconds=9)), "decided_at": time_text(late)}
    assert desk.receive([sent], time_text(late + timedelta(seconds=2))).acknowledged == [sent["id"]]
    (event,) = desk.log.events
    ago = datetime.now(UTC) - datetime.fromisoformat(event.decided_at)
    assert timedelta(seconds=1.9) < ago < timedelta(seconds=10)
    assert datetime.fromisoformat(event.decided_at) - datetime.fromisoformat(event.presented_at) == timedelta(seconds=9)


@pytest.mark.parametrize(
    "wrong",
    [
        {"item": "of another folder"},
        {"shown": ["no", "tokens"]},
        {"choice": "image_0 please"},
        {"id": "no uuid"},
        {"id": 5},
        {"shown": 5},
        {"annotator": ""},
        {"decided_at": "yesterday"},
        {"duration_ms": "long"},
    ],
)
def test_what_cannot_be_a_vote_is_named_and_does_not_hold_up_the_others(desk, wrong):
    items = desk.window("anna", "pairs", "all")["items"]
    queue = [record(items[0]) | wrong, record(items[1])]
    receipt = desk.receive(queue)
    assert len(receipt.acknowledged) == 2  # or the client would send it for ever
    assert receipt.problem == "" and len(receipt.refused) == 1
    assert len(desk.log.events) == 1
    (kept,) = map(json.loads, (desk.log.folder / REFUSED).read_text().splitlines())
    assert json.loads(kept["sent"]) == queue[0] and kept["reason"] == receipt.refused[0]
    assert any(REFUSED in note for note in desk.log.notes)
    assert desk.receive(queue).refused == ()  # an acknowledgement that was lost
    assert len((desk.log.folder / REFUSED).read_text().splitlines()) == 1


def test_what_is_refused_is_not_acknowledged_before_it_is_on_the_disk(desk, monkeypatch):
    queue = [record(desk.window("anna", "pairs", "all")["items"][0]) | {"item": "of another folder"}]

    def full(_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(desk.log, "set_refused_aside", full)
        assert desk.receive(queue) == ([], "vote not saved: disk full — will be saved once there is room", ())
    assert desk.receive(queue).acknowledged == [queue[0]["id"]]


def test_a_pair_reported_as_unfit_is_judged_and_the_report_can_be_undone(desk):
    item = desk.window("anna", "pairs", "all")["items"][0]
    sent = record(item, "flag", None, None)
    assert desk.receive([sent]) == ([sent["id"]], "", ())
    (event,) = desk.log.events
    assert (event.event_type, event.choice, event.pair_id) == ("flag", None, item["key"])
    after = desk.window("anna", "pairs", "all")
    assert item not in after["items"] and after["judged"] == 1
    assert after["history"] == [item | {"presentation_id": sent["presentation_id"]}]
    assert item["key"] not in {each["key"] for each in desk.window("ben", "pairs", "undecided")["items"]}
    desk.receive([record(item, "retract", presentation_id=sent["presentation_id"])])
    assert standing(desk.log.events) == []
    assert desk.window("anna", "pairs", "all")["items"][0] == item


def test_a_reported_pair_does_not_come_back_as_a_repeat(pairs):
    items = make_items(pairs, "pairs")
    flags = [flag(item.pairs[0], "image_0", "anna") for item in items[:50]]
    judged = judgements(flags, "anna", items)
    left = upcoming(unjudged(items, flags, "anna", "all"), judged, "anna", repeats=1.0)
    assert not {item.key for item in items[:50]} & {each.item.key for each in left}


def test_a_report_of_four_is_about_all_their_pairs(desk_of_sets):
    item = desk_of_sets.window("anna", "best_worst", "all")["items"][0]
    desk_of_sets.receive([record(item, "flag", None, None)])
    assert [each.event_type for each in desk_of_sets.log.events] == ["flag"] * 6


def test_a_full_disk_acknowledges_nothing_and_later_everything(desk, monkeypatch):
    queue = [record(desk.window("anna", "pairs", "all")["items"][0])]

    def full(_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(desk.log, "append", full)
        assert desk.receive(queue) == ([], "vote not saved: disk full — will be saved once there is room", ())
    assert desk.receive(queue) == ([queue[0]["id"]], "", ())


def test_a_window_is_of_bounded_size(tmp_path, pairs):
    for desk in opened(tmp_path, pairs):
        assert len(desk.window("anna", "pairs", "all")["items"]) == WINDOW


def test_the_window_tells_nothing_of_models_and_files(desk):
    window = str(desk.window("anna", "pairs", "all"))
    assert not [secret for secret in ("tiny", "image_0", "image_1", ".png", "images/") if secret in window]


# pictures


def draw(folder: Path, pair: Pair, seed: int = 0) -> Pair:
    """The pair with its two images on the disk, noise that no two seeds share, and their uids."""
    rng = np.random.default_rng([seed, *pair.pair_id.encode()])
    for image in (pair.image_0, pair.image_1):
        (folder / image).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / image)
    uids = read_sha256(folder / pair.image_0), read_sha256(folder / pair.image_1)
    return Pair(pair_id(pair.prompt, *uids), pair.prompt, pair.image_0, pair.image_1, *uids)


def test_only_images_of_pairs_that_can_be_read_to_their_end_are_served(tmp_path, pairs):
    whole, cut = draw(tmp_path, pairs[0]), pairs[1]
    (tmp_path / cut.image_0).write_bytes((tmp_path / whole.image_0).read_bytes()[:-500])
    for desk in opened(tmp_path, [whole, cut]):
        assert desk.image(token(whole.image_0, whole.image_0_uid)) == ((tmp_path / whole.image_0).resolve(), True)
        with pytest.raises(UserError, match="cannot be read to its end"):
            desk.image(token(cut.image_0, cut.image_0_uid))
        for secret in (whole.image_0, "pairs.jsonl", "../pairs.jsonl", token("pairs.jsonl", "")):
            assert desk.image(secret) is None


def test_an_image_of_other_bytes_has_another_address_in_any_folder(tmp_path, pairs):
    one, other = (draw(tmp_path / name, pairs[0], seed) for seed, name in enumerate(("one", "other")))
    assert one.image_0 == other.image_0  # as in folders that were drawn from the same prompts
    assert token(one.image_0, one.image_0_uid) != token(other.image_0, other.image_0_uid)


def test_an_image_that_has_changed_since_it_was_listed_is_not_served(tmp_path, pairs):
    pair = draw(tmp_path, pairs[0])
    for desk in opened(tmp_path, [pair]):
        draw(tmp_path, pairs[0], seed=1)
        with pytest.raises(UserError, match=r"has changed since pairs\.jsonl listed it"):
            desk.image(token(pair.image_0, pair.image_0_uid))


def test_an_image_that_may_not_be_read_is_one_line_and_not_served(tmp_path, pairs, monkeypatch):
    def denied(file: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    pair = draw(tmp_path, pairs[0])
    for desk in opened(tmp_path, [pair]):
        monkeypatch.setattr("dpo_sd.annotation.desk.sha256", denied)
        with pytest.raises(UserError, match="cannot be read: Permission denied"):
            desk.image(token(pair.image_0, pair.image_0_uid))


def test_an_image_without_a_checksum_is_served_but_not_to_be_kept(tmp_path, pairs):
    draw(tmp_path, pairs[0])
    for desk in opened(tmp_path, pairs[:1]):
        image = desk.image(token(pairs[0].image_0, pairs[0].image_0_uid))
        assert image is not None and not image.checked


def test_pictures_that_changed_since_they_were_voted_on_are_named(tmp_path, pairs):
    drawn = [draw(tmp_path, pair) for pair in pairs[:3]]
    for desk in opened(tmp_path, drawn):
        for item in desk.window("anna", "pairs", "all")["items"][:2]:
            desk.receive([record(item)])
        assert desk.note_changes() == "" and desk.log.notes == []
        (voted, _) = {event.pair_id: event for event in desk.log.events}.values()
        (tmp_path / voted.image_1).write_bytes((tmp_path / voted.image_0).read_bytes())
        note = f"pictures of 1 pair have changed since they were voted on: {voted.image_1}"
        assert desk.note_changes() == note and desk.log.notes == [note]


def test_pairs_of_former_pictures_are_not_asked_about(tmp_path, pairs):
    former = [draw(tmp_path, pair) for pair in pairs[:2]]
    anew = draw(tmp_path, pairs[0], seed=1)
    for desk in opened(tmp_path, [*former, anew]):
        keys = {item["key"] for item in desk.window("anna", "pairs", "all")["items"]}
        assert keys == {former[1].pair_id, anew.pair_id}
        seen = record(
            {"key": former[0].pair_id, "shown": [token(former[0].image_0, former[0].image_0_uid)] * 2, "repeat": False}
        )
        assert desk.receive([seen]).refused == ("it is about other pictures than those that are here",)


# what the votes say


def test_the_summary_of_a_few_votes(pairs):
    a, b, c, d = pairs[:4]
    first = [
        vote(a, "image_1", "image_1", "anna", duration_ms=1000),
        vote(b, "image_1", "image_0", "anna", duration_ms=100),
        vote(c, "tie", "image_0", "anna", duration_ms=3000),
        vote(d, "skip", "image_0", "anna"),
        vote(a, "image_0", "image_0", "ben"),
        vote(b, "image_1", "image_1", "ben"),
    ]
    again = [
        vote(a, "image_1", "image_0", "anna", repeat_of=first[0].event_id),
        vote(b, "image_0", "image_1", "anna", repeat_of=first[1].event_id),
    ]
    summary = summarise(pairs, [*first, *again])
    anna, ben = summary.annotators
    assert (anna.name, anna.votes, anna.skips, anna.too_fast, anna.seconds) == ("anna", 3, 1, 1, 1.0)
    assert anna.left is not None and (anna.left.rate, anna.left.n) == (0.25, 4)
    assert anna.steady is not None and (anna.steady.rate, anna.steady.n) == (0.5, 2)
    assert (ben.votes, ben.seconds, ben.steady, ben.flip_rate) == (2, None, None, None)
    assert summary.statuses == {"disputed": 1, "image_1": 1, "tie": 1, "skipped": 1, "undecided": 196}
    assert [(model, rate.rate, rate.n) for model, rate in summary.models] == [
        ("tiny + style:0.8", pytest.approx(2 / 3), 3),  # of a: half, of b: all, of c: half
        ("tiny", pytest.approx(1 / 3), 3),
    ]
    assert summary.shared == 2
    assert summary.agreement == pytest.approx(0.0)  # one of two agrees, and half would by chance


def test_pairs_drawn_by_one_model_have_no_win_rates():
    pair = Pair(pair_id("p", "a", "b"), "p", "a.png", "b.png", "a", "b", None, "tiny", "tiny")
    assert summarise([pair], [vote(pair, "image_0", "image_0", "anna")]).models == []


def test_a_pair_reported_as_unfit_is_in_no_win_rate(pairs):
    events = [vote(pairs[0], "image_0", "image_0", "anna"), vote(pairs[1], "image_0", "image_0", "anna")]
    ((_, rate), _) = summarise(pairs, [*events, flag(pairs[0], "image_0", "ben")]).models
    assert rate.n == 1


@pytest.mark.parametrize(("alike", "smoothing"), [(20, "0.000"), (18, "0.053"), (16, "0.113"), (15, "0.146")])
def test_steadiness_becomes_the_setting_of_the_loss(pairs, alike, smoothing):
    events = []
    for k, pair in enumerate(pairs[:20]):
        events.append(vote(pair, "image_0", "image_0", "anna"))
        choice = "image_0" if k < alike else "image_1"
        events.append(vote(pair, choice, "image_1", "anna", repeat_of=events[-1].event_id))
    together = summarise(pairs, events).together
    assert smoothing_override(together) == f"loss.label_smoothing={smoothing}"
    assert f"so {smoothing} [" in smoothing_words(together)


def test_repeats_answered_by_chance_give_no_setting(pairs):
    first = vote(pairs[0], "image_0", "image_0", "anna")
    again = vote(pairs[0], "image_1", "image_1", "anna", repeat_of=first.event_id)
    assert smoothing_override(summarise(pairs, [first, again]).together) is None
    assert "as good as chance" in smoothing_words(summarise(pairs, [first, again]).together)
    assert smoothing_override(summarise(pairs, [first]).together) is None
    assert "not known yet" in smoothing_words(summarise(pairs, [first]).together)


@pytest.mark.parametrize(
    ("left", "right", "words"),
    [
        (0, 0, "No votes yet; to see a 60/40 habit takes 194"),
        (6, 4, "a 60/40 habit would take 194 votes to see"),
        (100, 100, "no habit to be seen"),
        (130, 70, "one side is favoured"),
    ],
)
def test_a_habit_of_sides_is_only_claimed_when_there_are_votes_enough(pairs, left, right, words):
    sides = ["image_0"] * left + ["image_1"] * right
    events = [vote(pair, "image_0", side, "anna") for pair, side in zip(pairs, sides, strict=False)]
    assert words in position_words(summarise(pairs, events).together)


def test_the_train_command_starts_from_what_drew_the_images(tmp_path):
    drawn_by = {"model": "tiny", "loras": [{"path": "outputs/style/2031-05-17", "weight": 0.8, "sha256": "ab"}]}
    write_record(tmp_path, drawn_by)
    assert train_command(tmp_path).endswith(" lora.init_from=outputs/style/2031-05-17")
    write_record(tmp_path, drawn_by | {"model": "sdxl"})
    assert " model=sdxl lora.init_from=" in train_command(tmp_path)
    write_record(tmp_path, drawn_by | {"loras": drawn_by["loras"] * 2})
    assert "lora.init_from" not in train_command(tmp_path)
    (tmp_path / RECORD).write_text("of another program")
    assert train_command(tmp_path).endswith(f" data.pairs={tmp_path}")


@pytest.mark.parametrize("name", ["pairs/style", "my pairs", "it's", "back\\'s", "end\\", "ü", "${seed}"])
def test_the_train_command_survives_the_shell_and_hydra(name):
    words = shlex.split(train_command(Path(name)))
    assert words[:4] == ["python", "-m", "dpo_sd.train", "experiment=style_dpo"]
    setting = OverridesParser.create().parse_override(words[4])
    composed = OmegaConf.create({setting.key_or_group: setting.value()})
    assert composed["data.pairs"] == name


# pages


@pytest.fixture
def page(desk) -> Callable[[Callable[[], None]], AppTest]:
    def open_page(content: Callable[[], None]) -> AppTest:
        views.setting = views.Setting(desk, "anna", "pairs")
        name = content.__name__
        app = AppTest.from_string(
            f"""
            import streamlit as st
            from dpo_sd.annotation import views
            st.session_state.setdefault("name", "anna")
            st.session_state.setdefault("show", "all")
            views.{name}()
            """,
            default_timeout=60,
        ).run()
        assert not app.exception
        return app

    return open_page


def test_a_queue_from_the_browser_is_on_the_disk_after_one_run_of_the_page(desk, page):
    app = page(views.annotate)
    queue = [record(item) for item in desk.window("anna", "pairs", "all")["items"][:3]]
    app.session_state[views.QUEUE] = {"queue": {"votes": queue, "sent": "1"}}
    app.run()
    assert not app.exception
    assert [event.event_id for event in desk.log.events] == [each["id"] for each in queue]
    assert app.session_state.receipt.acknowledged == [each["id"] for each in queue]
    app.session_state[views.QUEUE] = {"queue": {"votes": queue, "sent": "2"}}
    app.run()
    assert len(desk.log.events) == 3


def test_when_all_is_judged_the_page_says_what_is_next(desk, page):
    desk.repeats = 0.0
    while items := desk.window("anna", "pairs", "all")["items"]:
        desk.receive([record(item) for item in items])
    app = page(views.annotate)
    assert [each.value for each in app.subheader] == ["What next"]
    assert f"data.pairs={desk.log.folder}" in app.code[0].value


def test_the_statistics_page_without_votes_and_with_some(desk, page):
    assert page(views.statistics).info[0].value == "No votes yet."
    desk.receive([record(item) for item in desk.window("anna", "pairs", "all")["items"][:4]])
    app = page(views.statistics)
    assert {each.label: each.value for each in app.metric} == {
        "Decided pairs": "4",
        "Votes": "4",
        "Disputed pairs": "0",
        "Steady": "–",
        "Agreement α": "–",
    }
    assert "experiment=style_dpo" in app.code[-1].value


def test_the_gallery_shows_a_bounded_number_of_decided_pairs(desk, page):
    assert page(views.gallery).info[0].value == "Nothing is decided yet."
    while items := desk.window("anna", "pairs", "all")["items"]:
        desk.receive([record(item) for item in items])
    app = page(views.gallery)
    assert app.number_input[0].max == math.ceil(30 / views.PER_PAGE) == 2
    app.number_input[0].set_value(2).run()
    assert not app.exception


# the server


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node, to run the page's own function")
def test_a_key_stands_for_its_place_only_where_the_layout_does_not_write_its_letter():
    keys = {  # what is written, the key's place, and whether shift is held: what it stands for
        ("ч", "KeyX", False): "x",
        ("Χ", "KeyX", True): "x",
        ("а", "KeyF", False): "f",
        ("&", "Digit1", False): "1",
        ("+", "Digit1", False): "1",
        ("1", "Digit1", True): "1",
        ("!", "Digit1", True): "!",
        ("۲", "Digit2", False): "2",
        ("١", "Numpad1", False): "1",
        ("x", "KeyB", False): "x",
        ("X", "KeyX", True): "x",
        ("w", "KeyZ", False): "w",
        (";", "KeyZ", False): ";",
        ("ö", "KeyX", False): "ö",
        ("Process", "Digit1", False): "Process",
        ("Dead", "Digit2", False): "Dead",
        ("End", "Numpad1", False): "End",
        (" ", "Space", False): " ",
    }
    source = (views.CLIENT / "annotator.js").read_text(encoding="utf-8")
    events = [{"key": key, "code": code, "shiftKey": shift} for key, code, shift in keys]
    program = f"{source}\nconsole.log(JSON.stringify({json.dumps(events)}.map(keyOf)));"
    command = ["node", "--input-type=module", "-"]
    ended = subprocess.run(command, input=program, capture_output=True, text=True, check=True)
    assert json.loads(ended.stdout) == list(keys.values())


@pytest.mark.parametrize("address", ["0.0.0.0", "192.168.1.2", "::", "example.org"])
def test_an_address_that_others_reach_must_be_allowed(address):
    with pytest.raises(UserError, match="can be reached from other computers"):
        Person(address=address)
    Person(address=address, allow_remote=True)


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_the_addresses_of_this_computer_are_fine(address):
    Person(address=address)


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"repeats": 1.5}, "repeats must be in"), ({"port": 0}, "port must be in"), ({"name": " "}, "name must not be")],
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(UserError, match=message):
        Person(**setting)


def test_best_worst_needs_sets_of_four(tmp_path, pairs):
    write_pairs(tmp_path, pairs[:3])
    with pytest.raises(UserError, match="no complete sets of four"):
        Person(mode="best_worst").annotate(tmp_path, None)
