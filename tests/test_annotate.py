"""The command: a simulated annotator, merging, exporting, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
from PIL import Image, ImageStat

from dpo_sd.annotation.annotator import Annotator
from dpo_sd.annotation.app import Person
from dpo_sd.annotation.simulated import SimulatedAnnotator
from dpo_sd.errors import UserError
from dpo_sd.judges.judge import Judge
from dpo_sd.judges.oracle import Oracle
from dpo_sd.preferences.events import Event, vote
from dpo_sd.preferences.log import EventLog, read_events
from dpo_sd.preferences.pair_folder import Pair, pair_id, read_pairs, write_pairs
from dpo_sd.preferences.reading import read_preferences
from dpo_sd.shapes.render import render
from dpo_sd.shapes.scenes import Scene

PROMPT = "a small red circle on a blue background"
CENTRED = Oracle("centred")


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
    SimulatedAnnotator().annotate(folder, CENTRED)
    assert statuses(folder) == ["image_0"] * 20 + ["image_1"] * 20
    assert "40 new votes by oracle (oracle: centred): 20 image_0, 20 image_1, 0 tie" in capsys.readouterr().out
    assert len((folder / "metadata.jsonl").read_text().splitlines()) == 40


def test_voting_again_adds_nothing(folder, capsys):
    for _ in range(2):
        SimulatedAnnotator(temperature=2.0, repeats=0.5, seed=3).annotate(folder, CENTRED)
    assert "0 new votes" in capsys.readouterr().out
    (folder / "annotations.jsonl").rename(folder / "first.jsonl")
    (folder / "metadata.jsonl").unlink()
    SimulatedAnnotator(temperature=2.0, repeats=0.5, seed=3).annotate(folder, CENTRED)
    first = [json.loads(line)["event_id"] for line in (folder / "first.jsonl").read_text().splitlines()]
    assert [event.event_id for event in events(folder)] == first


def test_repeats_come_with_the_sides_swapped(folder):
    SimulatedAnnotator(repeats=1.0).annotate(folder, CENTRED)
    votes = {event.event_id: event for event in events(folder)}
    repeats = [event for event in votes.values() if event.repeat_of is not None]
    assert len(repeats) >= 15
    for event in repeats:
        original = votes[str(event.repeat_of)]
        assert (event.pair_id, event.choice) == (original.pair_id, original.choice)
        assert event.left_image != original.left_image


def test_faults_are_what_they_are_told_to_be(folder):
    SimulatedAnnotator(flip_rate=1.0, name="contrary").annotate(folder, CENTRED)
    assert statuses(folder) == ["image_1"] * 20 + ["image_0"] * 20
    SimulatedAnnotator(tie_band=100.0, name="indifferent").annotate(folder, CENTRED)
    assert {event.choice for event in events(folder) if event.annotator_id == "indifferent"} == {"tie"}


def test_several_annotators_vote_beside_each_other(folder):
    for name in ("ada", "bob", "cyd"):
        SimulatedAnnotator(name=name).annotate(folder, CENTRED)
    assert [each.n_votes for each in read_preferences(folder)] == [3] * 40


def test_an_image_that_cannot_be_judged_is_named_before_anything_is_voted_on(folder):
    (folder / "images" / "39-0.png").unlink()
    with pytest.raises(UserError, match=r"pair [0-9a-f]{16} cannot be judged: image 'images/39-0.png'"):
        SimulatedAnnotator().annotate(folder, CENTRED)
    assert not (folder / "annotations.jsonl").exists()


@pytest.mark.parametrize(
    ("size", "prompt", "message"),
    [(128, PROMPT, "64x64 pixels, got 128x128: use judge=none"), (64, "a red fox", "'a red fox' names no shape")],
)
def test_images_and_prompts_that_the_judge_does_not_know_are_refused_before_the_first_vote(
    tmp_path, size, prompt, message
):
    Image.new("RGB", (size, size)).save(tmp_path / "0.png")
    write_pairs(tmp_path, [Pair(pair_id(prompt, "a", "b"), prompt, "0.png", "0.png", "a", "b")])
    with pytest.raises(UserError, match=f"pair [0-9a-f]{{16}} cannot be judged: .*{message}"):
        SimulatedAnnotator().annotate(tmp_path, CENTRED)
    assert not (tmp_path / "annotations.jsonl").exists()


def test_people_take_no_judge_and_a_simulated_annotator_needs_one(folder):
    with pytest.raises(UserError, match="people vote without a judge, but 'oracle: centred' is given"):
        Person().annotate(folder, CENTRED)
    with pytest.raises(UserError, match="add judge=oracle"):
        SimulatedAnnotator().annotate(folder, None)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"repeats": 2.0}, "repeats must be in"),
        ({"name": ""}, "name must not be empty"),
        ({"temperature": -1.0}, "temperature must be"),
    ],
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(UserError, match=message):
        SimulatedAnnotator(**setting)


# classes of the user's own


class Bluest(Judge):
    """Likes blue, and tells a thing or two by default."""

    name = "the bluest"

    def scores(self, images, prompts):
        return [float(ImageStat.Stat(image).mean[2]) for image in images]


class Impatient(Annotator):
    """Takes the left image of every pair."""

    def annotate(self, folder, judge):
        with closing(EventLog(folder)) as log:
            log.append([vote(pair, "image_0", "image_0", "impatient") for pair in log.pairs.values()])


def test_a_judge_of_ones_own_says_its_name_and_its_scores_and_the_rest_is_declared(folder, capsys):
    judge = Bluest()
    judge.check((8, 8), ["anything"])
    assert judge.properties([Image.new("RGB", (8, 8))], ["anything"]) == {}
    Image.new("RGB", (64, 64), "blue").save(folder / "images" / "00-1.png")
    SimulatedAnnotator().annotate(folder, judge)
    assert statuses(folder)[0] == "image_1"
    assert "by oracle (the bluest)" in capsys.readouterr().out


def test_an_annotator_of_ones_own_votes_as_events(folder):
    Impatient().annotate(folder, None)
    assert statuses(folder) == ["image_0"] * 40
    assert len((folder / "metadata.jsonl").read_text().splitlines()) == 40


# the command


def test_the_oracle_is_an_option_of_the_command_and_its_judge_another(command: Callable, folder):
    arguments = (f"pairs={folder}", "annotator=oracle", "annotator.seed=7")
    for more in (("annotator.name=ada",), ("annotator.name=bob", "judge.preference=style", "judge.style=pastel")):
        ended = command(*arguments, *more, program="annotate")
        assert (ended.code, ended.err) == (0, "")
        assert f"40 new votes by {more[0].removeprefix('annotator.name=')} (oracle: " in ended.out
    assert "(oracle: style, in the pastel style)" in ended.out


def test_votes_of_other_machines_are_merged_and_exported(command: Callable, folder, tmp_path):
    SimulatedAnnotator(name="ada").annotate(folder, CENTRED)
    other = (folder / "annotations.jsonl").rename(tmp_path / "other.jsonl")
    (folder / "metadata.jsonl").unlink()
    SimulatedAnnotator(name="bob").annotate(folder, CENTRED)
    table = tmp_path / "style.parquet"
    ended = command(f"pairs={folder}", f"merge=[{other}]", f"export={table}", program="annotate")
    assert ended.code == 0, ended.err
    assert "40 new events" in ended.out
    assert [each.n_votes for each in read_preferences(folder)] == [2] * 40
    assert parquet.read_table(table).num_rows == 40


def test_an_export_takes_the_place_of_no_file_and_names_one_that_cannot_be_written(command: Callable, folder, tmp_path):
    SimulatedAnnotator(name="ada").annotate(folder, CENTRED)
    (tmp_path / "former.parquet").write_text("former")
    for place, message in (
        (tmp_path / "former.parquet", "exists: choose another name"),
        (Path("/proc/new.parquet"), "cannot be written"),
    ):
        ended = command(f"pairs={folder}", f"export={place}", program="annotate")
        assert ended.code == 1 and message in ended.err and "Traceback" not in ended.err
    assert (tmp_path / "former.parquet").read_text() == "former"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "pairs has no value: give pairs=<value>"),
        (("pairs=nowhere",), "no folder nowhere: draw pairs into it with python -m dpo_sd.generate out=nowhere"),
        (("pairs=''",), "pairs is empty: name a pair folder"),
        (("pairs=x", "export=''"), "must be a parquet file"),
        (("pairs=x", "export=x/pairs.jsonl"), "must be a parquet file, so its name must end in .parquet"),
        (("pairs=x", "export=/dev/null"), "must be a parquet file"),
        (("pairs=x", "export=x/images/../new.parquet"), "lies in the pair folder x: choose a place outside"),
        (("pairs=x", "annotator=oracel"), "annotator=oracel: no such option; did you mean oracle"),
        (("pairs=x", "annotator.prot=1"), "annotator.prot: no such setting; did you mean annotator.port"),
        (("pairs=x", "annotator.mode=best"), "annotator.mode must be one of pairs, best_worst"),
        (("pairs=x", "annotator.temperature=1"), "it belongs to annotator=oracle"),
        (("pairs=x", "annotator=oracle", "judge=none"), "votes by a judge, and there is none: add judge=oracle"),
        (("pairs=x", "annotator=oracle", "judge.preference=central"), "unknown preference 'central'"),
        (("pairs=x", "annotator=oracle", "judge.style=cubist"), "unknown style 'cubist'"),
        (("pairs=x", "annotator=oracle", "annotator.style=pastel"), "did you mean judge.style?"),
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
