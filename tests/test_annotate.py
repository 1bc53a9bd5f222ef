"""The command: a simulated annotator, merging, exporting, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as parquet
import pytest

from dpo_sd.annotation.oracle import OracleAnnotator
from dpo_sd.errors import UserError
from dpo_sd.preferences.events import Event
from dpo_sd.preferences.log import read_events
from dpo_sd.preferences.pair_folder import Pair, pair_id, read_pairs, write_pairs
from dpo_sd.preferences.reading import read_preferences
from dpo_sd.shapes.render import render
from dpo_sd.shapes.scenes import Scene

PROMPT = "a small red circle on a blue background"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty pairs, of which image_0 has the object nearer to the middle in the first twenty, image_1 in the others."""
    folder = tmp_path / "pairs"
    (folder / "images").mkdir(parents=True)
    pairs = []
    for number in range(40):
        files, uids = [], []
        for k in range(2):
            off = 2 if k == (number >= 20) else 14
            scene = Scene("small", "red", "circle", "blue", 32 + off, 32 + number / 20, 9.0, "flat")
            files.append(f"images/{number:02}-{k}.png")
            render(scene).save(folder / files[-1])
            uids.append(hashlib.sha256((folder / files[-1]).read_bytes()).hexdigest())
        pairs.append(Pair(pair_id(PROMPT, *uids), PROMPT, *files, *uids))
    write_pairs(folder, pairs)
    return folder


def events(folder: Path) -> list[Event]:
    return read_events(folder / "annotations.jsonl", {pair.pair_id for pair in read_pairs(folder)})


def statuses(folder: Path) -> list[str]:
    return [each.status for each in read_preferences(folder)]


# the simulated annotator


def test_without_faults_every_pair_gets_its_true_preference(folder, capsys):
    OracleAnnotator("centred").annotate(folder)
    assert statuses(folder) == ["image_0"] * 20 + ["image_1"] * 20
    assert "40 new votes by oracle (oracle: centred): 20 image_0, 20 image_1, 0 tie" in capsys.readouterr().out
    assert len((folder / "metadata.jsonl").read_text().splitlines()) == 40


def test_voting_again_adds_nothing(folder, capsys):
    for _ in range(2):
        OracleAnnotator("centred", temperature=2.0, repeats=0.5, seed=3).annotate(folder)
    assert "0 new votes" in capsys.readouterr().out
    (folder / "annotations.jsonl").rename(folder / "first.jsonl")
    (folder / "metadata.jsonl").unlink()
    OracleAnnotator("centred", temperature=2.0, repeats=0.5, seed=3).annotate(folder)
    first = [json.loads(line)["event_id"] for line in (folder / "first.jsonl").read_text().splitlines()]
    assert [event.event_id for event in events(folder)] == first


def test_repeats_come_with_the_sides_swapped(folder):
    OracleAnnotator("centred", repeats=1.0).annotate(folder)
    votes = {event.event_id: event for event in events(folder)}
    repeats = [event for event in votes.values() if event.repeat_of is not None]
    assert len(repeats) >= 15
    for event in repeats:
        original = votes[str(event.repeat_of)]
        assert (event.pair_id, event.choice) == (original.pair_id, original.choice)
        assert event.left_image != original.left_image


def test_faults_are_what_they_are_told_to_be(folder):
    OracleAnnotator("centred", flip_rate=1.0, name="contrary").annotate(folder)
    assert statuses(folder) == ["image_1"] * 20 + ["image_0"] * 20
    OracleAnnotator("centred", tie_band=100.0, name="indifferent").annotate(folder)
    assert {event.choice for event in events(folder) if event.annotator_id == "indifferent"} == {"tie"}


def test_several_oracles_vote_beside_each_other(folder):
    for name in ("ada", "bob", "cyd"):
        OracleAnnotator("centred", name=name).annotate(folder)
    assert [each.n_votes for each in read_preferences(folder)] == [3] * 40


def test_a_picture_that_is_not_of_the_shapes_world_is_named(folder):
    (folder / "images" / "00-0.png").unlink()
    with pytest.raises(UserError, match=r"pair [0-9a-f]{16} cannot be judged: image 'images/00-0.png'"):
        OracleAnnotator().annotate(folder)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"preference": "central"}, "preference"),
        ({"style": "cubist"}, "style"),
        ({"repeats": 2.0}, "repeats must be in"),
        ({"name": ""}, "name must not be empty"),
        ({"temperature": -1.0}, "temperature must be"),
    ],
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(UserError, match=message):
        OracleAnnotator(**setting)


# the command


def test_the_oracle_is_an_option_of_the_command(command: Callable, folder):
    ended = command(f"pairs={folder}", "annotator=oracle", "annotator.name=ada", "annotator.seed=7", program="annotate")
    assert (ended.code, ended.err) == (0, "")
    assert "40 new votes by ada" in ended.out


def test_votes_of_other_machines_are_merged_and_exported(command: Callable, folder, tmp_path):
    OracleAnnotator("centred", name="ada").annotate(folder)
    other = (folder / "annotations.jsonl").rename(tmp_path / "other.jsonl")
    (folder / "metadata.jsonl").unlink()
    OracleAnnotator("centred", name="bob").annotate(folder)
    table = tmp_path / "style.parquet"
    ended = command(f"pairs={folder}", f"merge=[{other}]", f"export={table}", program="annotate")
    assert ended.code == 0, ended.err
    assert "40 new events" in ended.out
    assert [each.n_votes for each in read_preferences(folder)] == [2] * 40
    assert parquet.read_table(table).num_rows == 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "pairs has no value: give pairs=<value>"),
        (("pairs=nowhere",), "no folder nowhere: draw pairs into it with python -m dpo_sd.generate out=nowhere"),
        (("pairs=x", "annotator=oracel"), "annotator=oracel: no such option; did you mean oracle"),
        (("pairs=x", "annotator.prot=1"), "annotator.prot: no such setting; did you mean annotator.port"),
        (("pairs=x", "annotator.mode=best"), "annotator.mode must be one of pairs, best_worst"),
        (("pairs=x", "annotator.temperature=1"), "it belongs to annotator=oracle"),
        (("pairs=x", "annotator.address=0.0.0.0"), "can be reached from other computers"),
    ],
)
def test_mistakes_cost_one_message(command: Callable, arguments, message):
    ended = command(*arguments, program="annotate")
    assert ended.code == 1
    assert message in ended.err
    assert len(ended.err.splitlines()) == 1


def test_a_port_in_use_is_one_message(command: Callable, folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = command(f"pairs={folder}", f"annotator.port={port}", program="annotate")
    assert ended.code == 1
    assert f"cannot listen on 127.0.0.1, port {port}" in ended.err
    assert f"annotator.port={port + 1}" in ended.err


def test_the_server_loads_neither_torch_nor_what_statistics_need(folder):
    code = "import sys, dpo_sd.annotate, dpo_sd.annotation.views, dpo_sd.annotation.app; print(*sys.modules)"
    loaded = set(re.findall(r"^\w+|(?<= )\w+", subprocess.check_output([sys.executable, "-c", code], text=True)))
    assert not loaded & {"torch", "diffusers", "transformers", "lightning", "scipy"}
