"""The log of events loses, doubles and tears nothing; what the events come to is a function of them alone."""

from __future__ import annotations

import errno
import fcntl
import gc
import json
import os
import random
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import dpo_sd
from dpo_sd.errors import UserError
from dpo_sd.files.json_lines import json_line
from dpo_sd.preferences.events import Choice, Event, flag, now, retract, vote
from dpo_sd.preferences.log import ANNOTATIONS, TORN, EventLog, merge
from dpo_sd.preferences.metadata import METADATA, metadata_rows
from dpo_sd.preferences.outcome import Preference, counting, fold, merged, standing
from dpo_sd.preferences.pair_folder import Pair, pair_id, write_pairs
from dpo_sd.preferences.reading import read_preferences

PROMPTS = ["a red circle", "a red circle", "first\nsecond\u2028third", "<b>🦊</b> قطة \udcff", "word " * 1000]
KEYS = [  # of the record of an event, in their order
    *("schema_version", "event_id", "event_type", "retracts", "presentation_id", "pair_id", "ranking_id", "prompt"),
    *("image_0", "image_1", "image_0_uid", "image_1_uid", "choice", "label_0", "label_1", "left_image", "repeat_of"),
    *("annotator_id", "session_id", "presented_at", "decided_at", "duration_ms", "input", "zoomed", "app_version"),
]
REPOSITORY = Path(dpo_sd.__file__).parent.parent


def make_pairs(prompts: Sequence[str]) -> list[Pair]:
    pairs = []
    for i, prompt in enumerate(prompts):
        uids = f"{i}a", f"{i}b"
        pairs.append(Pair(pair_id(prompt, *uids), prompt, f"images/{i}-0.png", f"images/{i}-1.png", *uids, seed_0=i))
    return pairs


PAIRS = make_pairs(PROMPTS)


def at(second: int, **details: Any) -> dict[str, Any]:
    """Arguments of a vote at that second."""
    return {"decided_at": f"2031-05-17T09:{second // 60:02}:{second % 60:02}.000Z", **details}


def cast(choice: Choice, annotator: str = "ann", pair: Pair = PAIRS[0], second: int = 0, **details: Any) -> Event:
    return vote(pair, choice, "image_1", annotator, **at(second, **details))


def only(events: Sequence[Event]) -> Preference:
    return fold(PAIRS[:1], events)[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_pairs(tmp_path / "pairs", PAIRS)
    return tmp_path / "pairs"


@pytest.fixture
def opened(folder: Path) -> Iterator[Callable[[], EventLog]]:
    """`opened()`: a log of the folder, closed after the test."""
    logs: list[EventLog] = []

    def opened() -> EventLog:
        logs.append(EventLog(folder))
        return logs[-1]

    yield opened
    for log in logs:
        with suppress(OSError, UserError):  # of those whose file the test spoils
            log.close()


def lines(folder: Path) -> list[Event]:
    """The log as it stands on the disk: whole lines only."""
    content = (folder / ANNOTATIONS).read_bytes()
    assert content == b"" or content.endswith(b"\n")
    return [Event.from_json(line) for line in content.split(b"\n")[:-1]]


# ---- events


@pytest.mark.parametrize("pair", PAIRS, ids=range(len(PAIRS)))
@pytest.mark.parametrize("choice", ["image_0", "image_1", "tie", "both_bad", "skip"])
def test_an_event_is_one_line_and_comes_back(pair: Pair, choice: Choice):
    given = vote(pair, choice, "image_0", "Zoë\n", session_id="s", duration_ms=2011, input="touch", zoomed=True)
    for event in (given, retract(given), flag(pair, "image_1", "ann")):
        line = event.to_json()
        assert line.encode().count(b"\n") == 1
        assert Event.from_json(line) == event


def test_a_line_has_the_documented_keys_in_their_order():
    assert list(json.loads(cast("tie").to_json())) == KEYS


@pytest.mark.parametrize(
    ("choice", "labels"),
    [
        ("image_0", (1.0, 0.0)),
        ("image_1", (0.0, 1.0)),
        ("tie", (0.5, 0.5)),
        ("both_bad", (None, None)),
        ("skip", (None, None)),
    ],
)
@pytest.mark.parametrize("left", ["image_0", "image_1"])
def test_labels_follow_the_images_and_not_the_sides(choice: Choice, labels: Any, left: Any):
    event = vote(PAIRS[0], choice, left, "ann")
    assert (event.label_0, event.label_1) == labels


def test_ids_and_times_are_made_when_none_are_given():
    one, other = vote(PAIRS[0], "tie", "image_0", "ann"), vote(PAIRS[0], "tie", "image_0", "ann")
    assert one.event_id != other.event_id and one.presentation_id != other.presentation_id
    assert one.decided_at <= other.decided_at <= now()


def test_a_retract_names_what_it_undoes_and_cannot_be_undone():
    given = cast("image_0")
    undoing = retract(given, event_id="x", decided_at=now())
    assert (undoing.retracts, undoing.choice, undoing.label_0) == (given.event_id, None, None)
    assert undoing.annotator_id == given.annotator_id
    with pytest.raises(ValueError, match="vote again"):
        retract(undoing)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema_version is 2, not 1: update dpo_sd"),
        ({"schema_version": None}, "schema_version is None"),
        ({"colour": "red"}, "missing or unknown keys: colour"),
        ({"label_0": 0.0}, "contradict the choice"),
        ({"label_1": None}, "contradict the choice"),
        ({"choice": "left"}, "choice 'left' does not go with a vote"),
        ({"choice": None, "label_0": None, "label_1": None}, "choice None does not go with a vote"),
        ({"event_type": "flag"}, "choice 'image_0' does not go with a flag"),
        ({"event_type": "poll"}, "event_type must be one of vote, retract, flag"),
        ({"event_type": "retract", "choice": None, "label_0": None, "label_1": None}, "retracts None does not go"),
        ({"retracts": "x"}, "retracts 'x' does not go with a vote"),
        ({"left_image": "left"}, "left_image must be one of image_0, image_1"),
        ({"input": "pedal"}, "input must be one of key, mouse, touch"),
        ({"annotator_id": ""}, "must not be empty"),
        ({"annotator_id": None}, "annotator_id must be str"),
        ({"event_id": ""}, "must not be empty"),
        ({"duration_ms": -1}, "must not be negative"),
        ({"duration_ms": 1.5}, "duration_ms must be int"),
        ({"duration_ms": True}, "duration_ms must be int"),
        ({"zoomed": 1}, "zoomed must be bool"),
        ({"prompt": ["x"]}, "prompt must be str"),
        ({"decided_at": "2031-05-17T09:30:00Z"}, "times must be like"),
        ({"decided_at": "2031-05-17 09:30:00.000Z"}, "times must be like"),
        ({"presented_at": "2031-13-17T09:30:00.000Z"}, "times must be like"),
    ],
)
def test_an_event_that_cannot_be_is_refused(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Event.from_json(json.dumps(json.loads(cast("image_0").to_json()) | change))


@pytest.mark.parametrize("key", KEYS)
def test_an_event_without_one_of_its_keys_is_refused(key: str):
    record = json.loads(cast("image_0").to_json())
    del record[key]
    with pytest.raises(ValueError, match=r"missing|schema_version|labels"):
        Event.from_json(json.dumps(record))


@pytest.mark.parametrize("line", ["", "null", "[]", "{", '"x"', "[" * 100_000, b"\xff", b"\x00" * 9])
def test_what_is_no_record_is_refused(line: str | bytes):
    with pytest.raises(ValueError, match="not "):
        Event.from_json(line)


# ---- the fold


def test_a_pair_without_events_is_undecided():
    preferences = fold(PAIRS, [])
    assert [each.pair for each in preferences] == PAIRS
    assert {(each.status, each.n_votes, each.label_0, each.agreement) for each in preferences} == {
        ("undecided", 0, 0.5, 0.0)
    }


@pytest.mark.parametrize(
    ("choices", "status", "label_0", "agreement"),
    [
        ("0", "image_0", 1.0, 1.0),
        ("1", "image_1", 0.0, 1.0),
        ("t", "tie", 0.5, 1.0),
        ("b", "both_bad", 0.5, 1.0),
        ("s", "skipped", 0.5, 0.0),
        ("ss0", "image_0", 1.0, 1.0),
        ("001", "image_0", 2 / 3, 2 / 3),
        ("01", "disputed", 0.5, 0.5),
        ("0t", "disputed", 0.75, 0.5),
        ("01t", "disputed", 0.5, 1 / 3),
        ("01tt", "tie", 0.5, 0.5),
        ("0t1001", "image_0", 3.5 / 6, 0.5),
        ("bb0", "both_bad", 1.0, 2 / 3),
        ("b00", "image_0", 1.0, 2 / 3),
    ],
)
def test_the_status_is_the_choice_of_most_annotators(choices: str, status: str, label_0: float, agreement: float):
    meant: dict[str, Choice] = {"0": "image_0", "1": "image_1", "t": "tie", "b": "both_bad", "s": "skip"}
    result = only([cast(meant[choice], f"annotator {i}") for i, choice in enumerate(choices)])
    assert (result.status, result.n_votes) == (status, len(choices.replace("s", "")))
    assert (result.label_0, result.agreement) == pytest.approx((label_0, agreement))


def test_an_annotator_has_one_vote_a_pair_and_the_last_one_counts():
    events = [cast("image_0", second=1), cast("image_1", second=3), cast("tie", second=2)]
    for order in (events, events[::-1]):
        result = only(order)
        assert (result.status, result.n_votes) == ("image_1", 1)
        assert result.decided_at == events[1].decided_at


def test_votes_of_one_moment_are_told_apart_by_their_ids():
    events = [cast("image_0", event_id="a"), cast("image_1", event_id="b")]
    assert only(events).status == only(events[::-1]).status == "image_1"


def test_a_repeat_is_not_counted_beside_the_first_vote():
    first = cast("image_0", second=1)
    again = cast("image_1", second=2, repeat_of=first.event_id)
    assert (only([first, again]).status, only([first, again]).n_votes) == ("image_0", 1)


def test_the_last_repeat_counts_where_the_first_vote_is_undone():
    first = cast("image_0", second=1)
    again = [cast("tie", second=2, repeat_of=first.event_id), cast("image_1", second=3, repeat_of=first.event_id)]
    assert only([first, *again, retract(first)]).status == "image_1"


def test_a_skip_counts_only_where_the_annotator_says_nothing_else():
    assert only([cast("image_0", second=1), cast("skip", second=2)]).status == "image_0"
    assert only([cast("image_0", second=1, repeat_of="x"), cast("skip", second=2)]).status == "image_0"
    result = only([cast("skip", second=1), cast("skip", second=2)])
    assert (result.status, result.skips, result.n_votes, result.decided_at) == ("skipped", 1, 0, None)


def test_an_undone_vote_counts_nowhere_and_the_one_before_it_counts_again():
    first, second = cast("image_0", second=1), cast("image_1", second=2)
    assert only([first, retract(first)]).status == "undecided"
    assert only([retract(first), first]).status == "undecided"  # logs are merged in any order
    assert only([first, second, retract(second)]).status == "image_0"


def test_a_flagged_pair_is_kept_apart_until_the_flag_is_undone():
    raised = flag(PAIRS[0], "image_0", "bob")
    events = [cast("image_0"), raised]
    assert (only(events).status, only(events).votes_0) == ("flagged", 1)
    assert only([*events, retract(raised)]).status == "image_0"


def test_an_event_that_stands_in_the_log_twice_counts_once():
    event = cast("image_0")
    assert only([event] * 3).votes_0 == 1
    assert standing([event] * 3) == [event]


def test_the_counting_votes_are_named_by_pair_and_annotator():
    events = [cast("image_0"), cast("tie", "bob"), cast("skip", pair=PAIRS[1])]
    assert counting(events) == {(event.pair_id, event.annotator_id): event for event in events}


def random_events(rng: random.Random, n: int) -> list[Event]:
    """Votes, repeats, skips, flags and undone ones, of three annotators on all pairs."""
    events: list[Event] = []
    for i in range(n):
        kind, annotator, pair = rng.random(), rng.choice("abc"), rng.choice(PAIRS)
        if kind < 0.25 and (undoable := [each for each in events if each.event_type != "retract"]):
            events.append(retract(rng.choice(undoable), event_id=f"{i}", **at(i)))
        elif kind < 0.3:
            events.append(flag(pair, "image_0", annotator, **at(i, event_id=f"{i}")))
        else:
            choice: Choice = rng.choice(["image_0", "image_0", "image_1", "tie", "both_bad", "skip"])
            details = {"event_id": f"{i}", "repeat_of": rng.choice([None, None, "x"])}
            events.append(cast(choice, annotator, pair, second=rng.randrange(n), **details))
    return events


def test_logs_merged_in_any_order_come_to_the_same_bytes():
    rng = random.Random(0)
    seen = set()
    for _ in range(20):
        events = random_events(rng, 40)
        outcomes = set()
        for _ in range(6):
            shuffled = [*events, *rng.sample(events, 10)]  # some of them in two of the logs
            rng.shuffle(shuffled)
            outcomes.add("".join(map(json_line, metadata_rows(fold(PAIRS, shuffled)))))
        assert len(outcomes) == 1
        seen |= outcomes
    assert len(seen) > 10


# ---- metadata.jsonl


def test_only_decided_pairs_become_rows():
    events = [
        cast("image_0", pair=PAIRS[0]),
        cast("tie", pair=PAIRS[1]),
        cast("both_bad", pair=PAIRS[2]),
        cast("skip", pair=PAIRS[3]),
        cast("image_1", pair=PAIRS[4]),
        flag(PAIRS[4], "image_0", "bob"),
    ]
    assert [row["pair_id"] for row in metadata_rows(fold(PAIRS, events))] == [PAIRS[0].pair_id]


def test_a_row_has_the_five_keys_first_and_nothing_that_is_null():
    events = [cast("image_1", pair=PAIRS[0]), cast("image_1", "bob", PAIRS[0]), cast("image_0", pair=PAIRS[1])]
    row, other = metadata_rows(fold(PAIRS, events))
    assert list(row)[:5] == ["prompt", "image_0", "image_1", "prefer_0", "prefer_1"]
    assert row == {
        "prompt": "a red circle",
        "image_0": "images/0-0.png",
        "image_1": "images/0-1.png",
        "prefer_0": False,
        "prefer_1": True,
        "caption": "a red circle",
        "label_0": 0.0,
        "label_1": 1.0,
        "has_label": True,
        "are_different": True,
        "best_image_uid": "0b",
        "image_0_uid": "0a",
        "image_1_uid": "0b",
        "model_0": "",
        "model_1": "",
        "ranking_id": "",
        "created_at": "2031-05-17T09:00:00.000Z",
        "num_example_per_prompt": 2,
        "pair_id": PAIRS[0].pair_id,
        "n_votes": 2,
        "votes_0": 0,
        "votes_1": 2,
        "votes_tie": 0,
        "agreement": 1.0,
        "seed_0": 0,
    }
    assert (other["prefer_0"], other["best_image_uid"]) == (True, "1a")


def test_two_images_of_the_same_bytes_are_not_different():
    pair = Pair(pair_id("p", "a", "a"), "p", "0.png", "1.png", "a", "a")
    (row,) = metadata_rows(fold([pair], [cast("image_0", pair=pair)]))
    assert row["are_different"] is False


def test_metadata_is_rebuilt_to_the_same_bytes(folder: Path):
    with closing(EventLog(folder)) as log:
        log.append(random_events(random.Random(1), 60))
    written = (folder / METADATA).read_bytes()
    assert written
    (folder / METADATA).write_text("spoilt")
    EventLog(folder).close()
    assert (folder / METADATA).read_bytes() == written


@pytest.mark.parametrize("pair", PAIRS[2:], ids=["separators", "marks, right to left, surrogates", "5000 characters"])
def test_any_prompt_comes_back_through_the_log_and_through_metadata(folder: Path, pair: Pair):
    with closing(EventLog(folder)) as log:
        log.append([cast("image_0", pair=pair)])
    from_events = [each for each in read_preferences(folder) if each.status == "image_0"]
    (folder / ANNOTATIONS).unlink()
    from_metadata = read_preferences(folder)
    assert [each.pair.prompt for each in from_events] == [each.pair.prompt for each in from_metadata] == [pair.prompt]


def until(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def metadata_choices(folder: Path) -> list[bool]:
    file = folder / METADATA
    return [json.loads(line)["prefer_0"] for line in file.read_text().splitlines()] if file.exists() else []


def test_metadata_follows_the_last_vote_within_a_second_and_without_a_call(folder: Path, opened):
    log = opened()
    first = cast("image_1")
    log.append([first])
    assert until(lambda: metadata_choices(folder) == [False], 1.0)
    log.append([retract(first), cast("image_0")])
    assert until(lambda: metadata_choices(folder) == [True], 1.0)


def test_metadata_is_current_after_closing_and_again_after_opening(folder: Path):
    log = EventLog(folder)
    log.append([cast("image_0")])
    log.close()
    assert metadata_choices(folder) == [True]
    log.close()  # once more does no harm
    (folder / METADATA).unlink()
    log = EventLog(folder)
    assert until(lambda: metadata_choices(folder) == [True], 1.0)
    log.close()


def test_a_closed_log_is_let_go(folder: Path):
    """The end of the program has nothing left to do for it."""
    log = EventLog(folder)
    log.append([cast("image_0")])
    log.close()
    alive = weakref.ref(log)
    del log
    gc.collect()
    assert alive() is None


def test_metadata_is_current_when_a_program_ends_without_closing(folder: Path):
    writer(folder, "log.append([vote(pair, 'image_0', 'image_0', 'ann')])").communicate()
    assert metadata_choices(folder) == [True]


def test_metadata_has_what_another_process_added(folder: Path, opened):
    one, other = opened(), opened()
    one.append([cast("image_0")])
    other.append([cast("image_1", pair=PAIRS[1])])
    one.close()
    assert metadata_choices(folder) == [True, False]


def test_metadata_that_was_overtaken_while_it_was_written_is_written_again(
    folder: Path, opened, monkeypatch: pytest.MonkeyPatch
):
    one, other = opened(), opened()
    monkeypatch.setattr(threading.Timer, "start", lambda timer: None)  # nobody else writes it meanwhile
    one.append([first := cast("image_0")])
    replace_file = os.replace

    def overtaken(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "replace", replace_file)
        other.append([cast("image_1", pair=PAIRS[1])])
        one.append([first])  # sent again: takes in what the other added
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", overtaken)
    one.flush_metadata()
    assert metadata_choices(folder) == [True, False]


def test_metadata_of_unknown_origin_is_not_overwritten(folder: Path):
    (folder / METADATA).write_text("precious")
    with pytest.raises(UserError, match="move it away first"):
        EventLog(folder)
    assert (folder / METADATA).read_text() == "precious"


def test_metadata_that_cannot_be_written_is_said_and_costs_no_vote(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    log = EventLog(folder)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        log.append([cast("image_0")])
        assert until(lambda: bool(log.notes), 1.0)
        assert "could not be brought up to date" in log.notes[0] and "No space left" in log.notes[0]
        with pytest.raises(OSError, match="No space left"):
            log.close()
    log.close()
    assert metadata_choices(folder) == [True]


# ---- the log: exactly once


def test_what_is_appended_is_there_for_others_and_after_opening(folder: Path, opened):
    log, other = opened(), opened()
    events = [cast("image_0"), cast("tie", pair=PAIRS[1])]
    assert log.append(events) == 2
    assert not log.refresh()
    assert other.refresh() and not other.refresh()
    assert log.events == other.events == opened().events == lines(folder) == events


def test_an_event_that_is_sent_again_and_again_is_written_once(folder: Path, opened):
    log, other = opened(), opened()
    event = cast("image_0")
    assert log.append([event, event]) == 1
    assert log.append([event]) == 0
    assert other.append([event, later := cast("tie")]) == 1
    assert opened().append([event, later]) == 0
    assert log.append([replace(event, choice="image_1")]) == 0  # the first of an id counts
    assert lines(folder) == [event, later]


def test_appending_nothing_changes_nothing(folder: Path, opened):
    assert opened().append([]) == 0
    assert not lines(folder)


def test_threads_lose_and_double_nothing(folder: Path, opened):
    logs = [opened(), opened()]
    shared = [cast("tie", f"annotator {i}") for i in range(20)]

    def work(number: int) -> None:
        for i in range(20):
            logs[number % 2].append([cast("image_0", event_id=f"{number}-{i}"), shared[i]])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    written = [event.event_id for event in lines(folder)]
    assert len(written) == len(set(written)) == 4 * 20 + 20
    for log in logs:
        log.refresh()
        assert [event.event_id for event in log.events] == written


def writer(folder: Path, work: str) -> subprocess.Popen[str]:
    """A process with an open `log` of the folder, its first `pair`, and work to do."""
    start = (
        "import sys\n"
        "from dpo_sd.preferences.events import vote\n"
        "from dpo_sd.preferences.log import EventLog\n"
        f"log = EventLog({str(folder)!r})\n"
        "pair = next(iter(log.pairs.values()))\n"
    )
    return subprocess.Popen([sys.executable, "-c", start + work], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_two_processes_at_once_lose_double_and_tear_nothing(folder: Path):
    work = (
        "for i in range(150):\n"
        "    own, shared = f'NAME-{i}', f'shared-{i}'\n"
        "    log.append([vote(pair, 'image_0', 'image_0', 'ann', event_id=each) for each in (own, shared)])\n"
        "    print(own)\n"
    )
    processes = [writer(folder, work.replace("NAME", name)) for name in "ab"]
    acknowledged = [word for process in processes for word in process.communicate()[0].split()]
    assert len(acknowledged) == 300
    written = [event.event_id for event in lines(folder)]
    assert sorted(written) == sorted([*acknowledged, *(f"shared-{i}" for i in range(150))])


# ---- the log: crashes


def test_killing_the_writer_at_any_moment_loses_no_acknowledged_event(folder: Path):
    """Twenty writers on the same log, each killed within 60 ms of its first event."""
    work = (
        "import itertools, os\n"
        "for i in itertools.count():\n"
        "    event = vote(pair, 'image_0', 'image_0', 'ann')\n"
        "    log.append([event, vote(pair, 'tie', 'image_0', 'bob')])\n"
        "    os.write(1, (event.event_id + '\\n').encode())\n"
    )
    rng = random.Random(0)
    acknowledged: set[str] = set()
    following = writer(folder, work)
    for _ in range(20):
        process, following = following, writer(folder, work)  # starting takes longest: two are always at it
        acknowledged.add(first_line(process))
        time.sleep(rng.uniform(0, 0.06))
        process.kill()
        acknowledged |= set(process.communicate()[0].split("\n")[:-1])
        with closing(EventLog(folder)) as log:
            written = [event.event_id for event in log.events]
        assert acknowledged <= set(written)
        assert len(written) == len(set(written))
    following.kill()
    following.communicate()
    assert len(acknowledged) > 20


@pytest.mark.parametrize("tail", ['{"schema_version": 1, "eve', "{", "\x00\x00"])
def test_a_torn_last_line_is_set_aside_and_said(folder: Path, opened, tail: str):
    opened().append([event := cast("image_0")])
    with open(folder / ANNOTATIONS, "a") as file:
        file.write(tail)
    log = opened()
    assert log.events == [event]
    assert "cut short by a crash" in log.notes[0]
    log.append([later := cast("tie")])
    assert lines(folder) == [event, later] == log.events
    assert (folder / TORN).read_text() == tail + "\n"
    assert TORN in log.notes[-1]


def test_a_line_torn_by_another_process_is_set_aside_by_the_next_writer(folder: Path, opened):
    log = opened()
    log.append([event := cast("image_0")])
    with open(folder / ANNOTATIONS, "a") as file:
        file.write(cast("tie").to_json()[:-20])
    assert not log.refresh()
    log.append([later := cast("image_1")])
    assert lines(folder) == [event, later]
    assert (folder / TORN).exists()


def test_a_log_with_nothing_but_a_torn_line_opens(folder: Path, opened):
    (folder / ANNOTATIONS).write_text("{")
    log = opened()
    log.append([event := cast("image_0")])
    assert lines(folder) == log.events == [event]


def test_reading_preferences_leaves_a_torn_line_alone_and_says_so(folder: Path, caplog: pytest.LogCaptureFixture):
    content = cast("image_0").to_json() + "{"
    (folder / ANNOTATIONS).write_text(content)
    assert read_preferences(folder)[0].status == "image_0"
    assert "cut short by a crash" in caplog.text
    assert (folder / ANNOTATIONS).read_text() == content


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "line 2: not JSON"),
        ('{"schema_version": 2}', "line 2: schema_version is 2.*update dpo_sd"),
        ("{}", "line 2: schema_version is None"),
        (cast("tie", pair=make_pairs(["elsewhere"])[0]).to_json().strip(), "line 2: .*another pair folder"),
    ],
    ids=["no JSON", "later version", "no event", "another folder"],
)
@pytest.mark.parametrize("use", [EventLog, read_preferences])
def test_a_broken_line_in_the_middle_is_refused_by_number(folder: Path, line: str, message: str, use: Callable):
    content = cast("image_0").to_json() + line + "\n" + cast("tie").to_json()
    (folder / ANNOTATIONS).write_text(content)
    with pytest.raises(UserError, match=message):
        use(folder)
    assert (folder / ANNOTATIONS).read_text() == content


def test_a_line_broken_by_another_program_meanwhile_is_refused_by_its_number_in_the_file(folder: Path, opened):
    log = opened()
    log.append([cast("image_0"), cast("tie")])
    with open(folder / ANNOTATIONS, "a") as file:
        file.write("nonsense\n")
    with pytest.raises(UserError, match="line 3"):
        log.append([cast("image_1")])
    assert len(log.events) == 2


def test_an_event_of_another_folder_is_not_written(folder: Path, opened):
    log = opened()
    with pytest.raises(UserError, match="is not in"):
        log.append([cast("image_0"), cast("tie", pair=make_pairs(["elsewhere"])[0])])
    assert not (folder / ANNOTATIONS).exists()


@pytest.mark.parametrize("how", ["removed", "replaced", "shortened"])
def test_a_log_that_changes_under_the_open_one_is_refused_and_not_begun_anew(folder: Path, opened, how: str):
    log = opened()
    log.append([cast("image_0"), event := cast("tie")])
    file = folder / ANNOTATIONS
    if how == "shortened":
        os.truncate(file, 10)
    else:
        file.rename(folder / "backup")
        if how == "replaced":
            file.write_text(event.to_json() * 3)  # longer than it was
    with pytest.raises(OSError, match=r"annotations\.jsonl"):
        log.append([cast("image_1")])
    assert file.exists() == (how != "removed")


# ---- the log: disks


class FullDisk:
    """In place of os.write: takes so many bytes in all, then no more."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.write = os.write

    def __call__(self, descriptor: int, data: bytes) -> int:
        if self.room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self.write(descriptor, data[: self.room])
        self.room -= written
        return written


@pytest.mark.parametrize("room", [0, 1, 100, 1000])
def test_a_full_disk_leaves_nothing_half_written_and_the_vote_can_be_sent_again(
    folder: Path, opened, monkeypatch: pytest.MonkeyPatch, room: int
):
    log, other = opened(), opened()
    log.append([first := cast("image_0")])
    events = [cast("tie"), cast("image_1")]
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", FullDisk(room))
        with pytest.raises(OSError, match="No space left") as caught:
            log.append(events)
    assert caught.value.errno == errno.ENOSPC
    assert lines(folder) == log.events == [first]
    other.refresh()
    assert other.events == [first]
    assert log.append(events) == 2
    assert lines(folder) == log.events == [first, *events]


def test_a_write_that_does_not_reach_the_disk_is_taken_back(folder: Path, opened, monkeypatch: pytest.MonkeyPatch):
    log = opened()
    log.append([first := cast("image_0")])

    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        with pytest.raises(OSError, match="Input/output error"):
            log.append([cast("tie")])
    assert lines(folder) == log.events == [first]


def test_a_disk_that_is_full_and_cannot_even_take_back_leaves_a_log_that_the_next_vote_mends(
    folder: Path, opened, monkeypatch: pytest.MonkeyPatch
):
    log = opened()
    log.append([first := cast("image_0")])

    def broken(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    event = cast("tie")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", FullDisk(100))
        patch.setattr(os, "ftruncate", broken)
        with pytest.raises(OSError, match="No space left"):
            log.append([event])
    assert log.append([event]) == 1
    assert lines(folder) == [first, event]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A pair folder on a file system of 64 KiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("file systems cannot be mounted here")
    try:
        write_pairs(folder, PAIRS[:1])
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_file_system_without_room_loses_nothing(disk: Path):
    log = EventLog(disk)
    events = [cast("image_0", f"annotator {i}") for i in range(200)]
    saved = 0
    with pytest.raises(OSError, match="No space left"):
        for event in events:
            saved += log.append([event])
    assert 0 < saved < 200
    assert lines(disk) == log.events == events[:saved]
    subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
    log.append(events)
    log.close()
    assert lines(disk) == events
    assert metadata_choices(disk) == [True]


def test_a_file_system_that_becomes_read_only_loses_nothing(disk: Path):
    log = EventLog(disk)
    log.append([event := cast("image_0")])
    log.close()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(OSError, match="Read-only file system"):
        log.append([cast("tie")])
    with pytest.raises(UserError, match="is read-only"):
        EventLog(disk)
    assert lines(disk) == log.events == [event]
    assert read_preferences(disk)[0].status == "image_0"


def test_a_read_only_folder_is_refused_when_it_is_opened(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # what root is told of a read-only file system
    with pytest.raises(UserError, match="is read-only"):
        EventLog(folder)


def test_a_folder_that_becomes_read_only_refuses_votes_and_reads_on(
    folder: Path, opened, monkeypatch: pytest.MonkeyPatch
):
    log = opened()
    log.append([event := cast("image_0")])
    real = os.open

    def read_only(file: Any, flags: int, *arguments: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, "Read-only file system", str(file))
        return real(file, flags, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", read_only)
        with pytest.raises(OSError, match=r"Read-only file system: .*annotations\.jsonl"):
            log.append([cast("tie")])
        assert not log.refresh()
        assert read_preferences(folder)[0].status == "image_0"
    assert lines(folder) == log.events == [event]


def test_a_reader_waits_for_a_writer_in_the_middle_of_its_lines(folder: Path, opened):
    log = opened()
    log.append([cast("image_0")])
    with open(folder / ANNOTATIONS, "ab", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(b"{")  # a line that will never be finished, and is taken back
        reader = threading.Thread(target=log.refresh)
        reader.start()
        reader.join(0.05)
        assert reader.is_alive()
        file.truncate(file.tell() - 1)
    reader.join()
    assert len(log.events) == 1


# ---- size


def test_ten_thousand_pairs_and_a_hundred_thousand_events_open_in_seconds(tmp_path: Path):
    pairs = make_pairs([f"prompt {i // 4}" for i in range(10_000)])
    write_pairs(tmp_path, pairs)
    template = cast("image_0", pair=pairs[0]).to_json()
    with open(tmp_path / ANNOTATIONS, "w") as file:
        for i in range(100_000):
            line = template.replace(pairs[0].pair_id, pairs[i % 10_000].pair_id)
            file.write(
                line.replace('"event_id": "', f'"event_id": "{i}-').replace('"ann"', f'"annotator {i // 10_000}"')
            )
    start = time.process_time()
    log = EventLog(tmp_path)
    opening = time.process_time() - start
    preferences = fold(log.pairs.values(), log.events)
    assert len(log.events) == 100_000
    assert {(each.status, each.n_votes) for each in preferences} == {("image_0", 10)}
    log.close()
    assert len((tmp_path / METADATA).read_bytes().splitlines()) == 10_000
    assert opening < 10  # about 1 on an idle machine


# ---- merging


def test_merging_adds_what_is_new_and_only_once(folder: Path, tmp_path: Path):
    events = random_events(random.Random(2), 30)
    for name, part in (("a", events[:20]), ("b", events[10:])):
        (tmp_path / name).write_text("".join(event.to_json() for event in part))
    logs = [tmp_path / "a", tmp_path / "b"]
    assert merge(folder, logs[:1]) == 20
    assert merge(folder, logs) == 10
    assert merge(folder, logs[::-1]) == 0
    assert merge(folder, [folder / ANNOTATIONS]) == 0
    assert lines(folder) == events
    rows = "".join(map(json_line, metadata_rows(fold(PAIRS, events))))
    assert (folder / METADATA).read_text() == rows


def test_nothing_is_merged_when_one_log_is_bad(folder: Path, tmp_path: Path):
    (tmp_path / "good").write_text(cast("image_0").to_json())
    (tmp_path / "bad").write_text(cast("image_0").to_json() + cast("tie", pair=make_pairs(["x"])[0]).to_json())
    with pytest.raises(UserError, match=r"bad, line 2: .*another pair folder"):
        merge(folder, [tmp_path / "good", tmp_path / "bad"])
    with pytest.raises(UserError, match="no file"):
        merge(folder, [tmp_path / "good", tmp_path / "missing"])
    assert not (folder / ANNOTATIONS).exists()


# ---- reading preferences


FIVE: dict[str, Any] = {"prompt": "p", "image_0": "0.png", "image_1": "1.png", "prefer_0": True, "prefer_1": False}


def test_the_five_keys_of_invoke_training_suffice(tmp_path: Path):
    other = FIVE | {"prompt": "q", "prefer_0": False, "prefer_1": True}
    (tmp_path / METADATA).write_text(json.dumps(FIVE) + "\n" + json.dumps(other) + "\n")
    first, second = read_preferences(tmp_path)
    assert (first.status, first.label_0, first.n_votes) == ("image_0", 1.0, 1)
    assert (second.status, second.label_0, second.n_votes) == ("image_1", 0.0, 1)
    assert (first.pair.prompt, first.pair.image_0, first.pair.image_1) == ("p", "0.png", "1.png")
    assert first.pair.pair_id != second.pair.pair_id


def test_a_row_in_which_neither_picture_is_preferred_is_undecided_or_what_its_votes_say(tmp_path: Path):
    rows = [FIVE | {"prefer_0": False} | votes for votes in ({}, {"votes_tie": 2}, {"n_votes": 1})]
    rows.append(FIVE | {"prefer_0": None, "prefer_1": None})
    (tmp_path / METADATA).write_text("".join(json.dumps(row) + "\r\n" for row in rows), encoding="utf-8-sig")
    assert [each.status for each in read_preferences(tmp_path)] == ["undecided", "tie", "both_bad", "undecided"]


def test_a_pair_that_is_listed_several_times_has_the_votes_of_all_places():
    def listed(image_0: str, image_1: str, *votes: int, prompt: str = "p") -> Preference:
        pair = Pair(pair_id(prompt, image_0, image_1), prompt, image_0, image_1, "", "")
        return Preference(pair, *votes, votes_tie=0, votes_bad=0, skips=0, flagged=False, decided_at=None)

    once = [listed("a", "b", 1, 0), listed("a", "b", 0, 1, prompt="q"), listed("a", "c", 1, 0)]
    assert merged(once) == (once, [])
    preferences, (line,) = merged(
        [
            *[listed("a", "b", 1, 0), listed("b", "a", 0, 1), listed("a", "b", 1, 0)],
            *[listed("c", "d", 1, 0), listed("d", "c", 2, 0)],
            *[listed("e", "f", 1, 0), listed("f", "e", 1, 0)],
            *[listed("g", "h", 0, 0), listed("g", "h", 0, 1)],
        ]
    )
    assert [(each.pair.image_0, each.votes_0, each.votes_1) for each in preferences] == [
        ("a", 3, 0),
        ("c", 1, 2),
        ("e", 1, 1),
        ("g", 0, 1),
    ]
    assert preferences[2].status == "disputed"
    assert "4 pairs are listed more than once, 3 of them in both orders" in line
    assert "2 of them have opposite verdicts: c and d; e and f" in line


def test_metadata_of_our_own_comes_back_with_its_votes(folder: Path):
    choices: list[Choice] = ["image_0", "image_0", "image_0", "image_1", "tie", "both_bad"]
    with closing(EventLog(folder)) as log:
        log.append([cast(choice, f"annotator {i}", PAIRS[0]) for i, choice in enumerate(choices)])
    from_events = read_preferences(folder)[0]
    (folder / ANNOTATIONS).unlink()
    (from_metadata,) = read_preferences(folder)
    assert from_metadata == from_events


def test_events_are_read_rather_than_metadata_that_may_be_older(folder: Path):
    (folder / ANNOTATIONS).write_text(cast("image_0").to_json())
    (folder / METADATA).write_text(json.dumps(FIVE) + "\n")
    assert [each.status for each in read_preferences(folder)] == ["image_0", *["undecided"] * (len(PAIRS) - 1)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "line 2: not JSON"),
        (json.dumps({"prompt": "p"}), "line 2: the key 'image_0' is missing"),
        (json.dumps(FIVE | {"prefer_1": True}), "line 2: exactly one of prefer_0 and prefer_1"),
        (json.dumps(FIVE | {"prefer_0": False, "votes_0": 1}), "line 2: the numbers of votes contradict"),
        (
            json.dumps(FIVE | {"prefer_0": "true"}),
            "line 2: exactly one of prefer_0 and prefer_1 .* got 'true' and False",
        ),
        (json.dumps(FIVE | {"prefer_0": 2}), "line 2: exactly one of prefer_0 and prefer_1"),
        (json.dumps(FIVE | {"seed_0": 1.5}), "line 2: seed_0 must be int"),
        (json.dumps(FIVE | {"prompt": None}), "line 2: prompt must be str"),
        (json.dumps(FIVE | {"image_1": 5}), "line 2: image_1 must be str"),
        (json.dumps(FIVE | {"votes_1": 2}), "line 2: the numbers of votes contradict"),
        (json.dumps(FIVE | {"n_votes": 0}), "line 2: the numbers of votes contradict"),
        (json.dumps(FIVE | {"votes_0": None}), "line 2: votes_0 must be a whole number"),
        (json.dumps(FIVE | {"votes_tie": -1}), "line 2: votes_tie must be a whole number"),
    ],
)
def test_a_broken_line_of_metadata_is_refused_by_number(tmp_path: Path, line: str, message: str):
    (tmp_path / METADATA).write_text(f"{json.dumps(FIVE)}\n{line}\n")
    with pytest.raises(UserError, match=message):
        read_preferences(tmp_path)


def test_rows_of_metadata_are_read_as_other_programs_write_them(tmp_path: Path):
    nan = float("nan")
    bare = {key: value for key, value in FIVE.items() if not key.startswith("prefer")}
    rows = [
        FIVE | {"ranking_id": 7, "pair_id": 3.0, "seed_0": 1.0, "seed_1": nan, "n_votes": 1.0},
        FIVE | {"prefer_0": 0, "prefer_1": 1.0},
        bare,
        bare | {"prefer_0": nan, "prefer_1": nan},
        bare | {"prefer_1": True},
    ]
    (tmp_path / METADATA.upper()).write_text("\n".join(map(json.dumps, rows)))
    found = read_preferences(tmp_path)
    assert [each.status for each in found] == ["image_0", "image_1", "undecided", "undecided", "image_1"]
    assert (found[0].pair.ranking_id, found[0].pair.seed_0, found[0].pair.seed_1) == ("7", 1, None)


def test_a_folder_without_votes_says_how_to_get_them(folder: Path):
    with pytest.raises(UserError, match=rf"holds no votes yet: .*python -m dpo_sd\.annotate pairs={folder}"):
        read_preferences(folder)
    with pytest.raises(UserError, match="no folder"):
        read_preferences(folder / "missing")
