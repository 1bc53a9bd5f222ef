"""The pages of docs/, run as they stand."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from dpo_sd.preferences.log import read_events
from dpo_sd.preferences.pair_folder import read_pairs

PAGE = Path(__file__).parent.parent / "docs" / "your_own.md"


@pytest.fixture(scope="module")
def mine(tmp_path_factory) -> Path:
    """The folder that the page describes."""
    folder = tmp_path_factory.mktemp("docs") / "mine"
    for name, text in re.findall(r"```\w+ file=(\S+)\n(.*?)```", PAGE.read_text(), re.DOTALL):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with open(folder / name, "a") as file:
            file.write(text)
    return folder


def arguments(mine: Path, containing: str) -> list[str]:
    """The arguments of the page's command that has these words, with the folder where it lies here."""
    (line,) = re.findall(rf"^python -m dpo_sd\.\w+ (.*{re.escape(containing)}.*)$", PAGE.read_text(), re.MULTILINE)
    return line.replace("--config-dir mine", f"--config-dir {mine}").split()


@pytest.fixture(scope="module")
def hinge(mine, train, tmp_path_factory) -> Path:
    """A run of the page's loss."""
    folder = tmp_path_factory.mktemp("hinge") / "run"
    ended = train(folder, *arguments(mine, "loss=hinge"))
    assert ended.code == 0, ended.err
    return folder


def test_the_loss_trains_and_its_own_values_are_logged(hinge):
    rows = list(csv.DictReader((hinge / "metrics.csv").open()))
    assert len(rows) == 7
    assert {float(row["train/satisfied"]) for row in rows[1:]} <= {0, 0.25, 0.5, 0.75, 1}
    assert float(rows[0]["val/satisfied"]) == 0  # at the start policy and reference are equal
    assert float(rows[0]["val/loss"]) == pytest.approx(0.75)  # margin 0: one each, half of the grid at half


def test_the_run_resumes_with_the_folder_of_its_options_and_says_so_without(hinge, mine, command):
    ended = command(f"resume={hinge}")
    assert ended.code == 1 and f"add --config-dir {mine}" in ended.err
    ended = command("--config-dir", str(mine), f"resume={hinge}", "trainer.max_steps=8")
    assert ended.code == 0, ended.err
    assert [row["step"] for row in csv.DictReader((hinge / "metrics.csv").open())][-1] == "8"


def test_the_reference_of_such_a_loss_is_kept_and_read(mine, train, tmp_path):
    cached = ["loss.reference=cached", "loss.draws_per_pair=1", "callbacks.verdict.n_prompts=2"]
    ended = train(tmp_path / "run", *arguments(mine, "loss=hinge"), *cached)
    assert ended.code == 0, ended.err
    assert re.search(r"loss    [1-9]\d* of 24 errors of the reference were read", ended.out)


def test_such_a_loss_is_planned(mine, small, command, tmp_path):
    plan = [argument for argument in small(tmp_path / "run") if not argument.startswith("hydra")]
    ended = command(*arguments(mine, "loss=hinge"), *plan, program="plan")
    assert ended.code == 0, ended.err
    assert "update: backward" in ended.out


def test_the_judge_gives_the_verdict(mine, train, tmp_path):
    ended = train(tmp_path / "run", *arguments(mine, "judge=bright judge"))
    assert ended.code == 0, ended.err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["verdict"]["judge"] == "bright 0"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(6):
        Image.new("RGB", (80, 64 + 8 * number), (40 * number, 0, 200)).save(folder / f"a_blue_field_{number}.png")
    return folder


def test_the_source_is_trained_on(mine, train, photos, tmp_path):
    words = [a.replace("photos/", str(photos)) for a in arguments(mine, "data=named")]
    shapes = ("data.n_", "callbacks.verdict")
    ended = train(tmp_path / "run", *words, without=shapes)
    assert ended.code == 0, ended.err
    assert "data    training: 5 pictures; validation: 1 others" in ended.out
    assert len(list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))) == 7


def test_a_folder_that_the_source_refuses_is_one_line(mine, train, tmp_path):
    words = [a.replace("photos/", str(tmp_path)) for a in arguments(mine, "data=named")]
    ended = train(tmp_path / "run", *words, without=("data.n_",))
    assert (ended.code, ended.err) == (1, f"error: {tmp_path} holds no .png: name another folder with data.path=\n")


def test_the_annotator_votes_by_the_judge_and_goes_on_where_it_was(mine, command, tmp_path):
    pairs = tmp_path / "pairs"
    drawing = ("prompts=[a small red circle,a large blue star]", "num_sets=2", "sampler.steps=1", f"out={pairs}")
    assert command(*drawing, program="generate").code == 0
    words = [a.replace("pairs/style", str(pairs)) for a in arguments(mine, "annotator=decided")]
    for _ in range(2):
        ended = command(*words, program="annotate")
        assert ended.code == 0, ended.err
        events = read_events(pairs / "annotations.jsonl", {pair.pair_id for pair in read_pairs(pairs)})
        assert len(events) == 4 and {event.annotator_id for event in events} == {"decided"}
    ended = command(*[a for a in words if not a.startswith("judge")], program="annotate")
    assert ended.code == 1 and "annotator=decided needs a judge" in ended.err
