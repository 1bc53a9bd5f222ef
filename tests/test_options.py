"""Options of a user's own: one file with a class, one with its settings, and --config-dir."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dpo_sd.composition.options import flags_first, own_flags
from dpo_sd.composition.replay import resume_arguments
from dpo_sd.errors import UserError

MODULE = """
raise RuntimeError("composing imports nothing of the user's")
from typing import Any
from dpo_sd.data.source import Source
from dpo_sd.judges.judge import Judge
from dpo_sd.losses import Loss

class Hinge(Loss):
    def __init__(self, margin: float = 1e-3, **common: Any): ...

class Alone(Loss):
    needs_pairs = False
    def __init__(self, scale: float): ...

class Texts(Source):
    has_pairs = False
    def __init__(self, path: str, seed: int = 0): ...

class Bright(Judge):
    def __init__(self, channel: int = 1): ...
"""
OPTIONS = {
    "loss/hinge": "_target_: own_classes.Hinge\nmargin: 0.01",
    "loss/alone": "_target_: own_classes.Alone",
    "loss/nowhere": "_target_: own_nowhere.Loss",
    "loss/misspelt": "_target_: own_classes.Hinj",
    "loss/foreign": "_target_: dpo_sd.data.shapes.Shapes",
    "loss/bare": "margin: 3",
    "data/texts": "_target_: own_classes.Texts",
    "judge/bright": "_target_: own_classes.Bright",
}


@pytest.fixture
def own(tmp_path: Path) -> Path:
    folder = tmp_path / "own"
    for name, text in OPTIONS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.yaml").write_text(text + "\n")
    (folder / "own_classes.py").write_text(MODULE)
    return folder


@pytest.fixture
def run(own, command):
    """The outcome of a training with these arguments, with the user's folder as --config-dir."""
    return lambda *arguments: command("--config-dir", str(own), *arguments)


def test_a_class_of_the_users_own_has_its_settings_and_those_of_its_base_class(run):
    shown = run("loss=hinge", "loss.min_snr_gamma=5", "--cfg", "job").out
    assert "_target_: own_classes.Hinge\n  margin: 0.01\n  min_snr_gamma: 5.0\n  reference: live" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["loss=hinge", "loss.margin=high"], "loss.margin must be a number, got 'high'"),
        (["loss=hinge", "loss.marge=1"], "loss.marge: no such setting; did you mean loss.margin? (loss=hinge has: "),
        (["loss=hinge", "loss.reference=cashed"], "loss.reference must be one of live, cached, got 'cashed'"),
        (["loss=hinge", "+loss.more=1"], "loss.more: no such setting"),
        (["loss=alone"], "loss.scale has no value: give loss.scale=<value>"),
        (["loss=hing"], "loss=hing: no such option; did you mean hinge?"),
        (["loss=hinge", "data=captions", "data.path=x"], "loss=hinge needs pairs, but data=captions has single images"),
        (["loss=hinge", "data=texts", "data.path=x"], "loss=hinge needs pairs, but data=texts has single images"),
        (["data=texts", "loss=sft"], "data.path has no value: give data.path=<value>"),
        (["judge=bright", "judge.channel=red"], "judge.channel must be a whole number, got 'red'"),
        (["loss=nowhere"], "loss/nowhere.yaml: there is no module own_nowhere"),
        (["loss=misspelt"], "loss/misspelt.yaml: _target_=own_classes.Hinj: own_classes has no class Hinj"),
        (["loss=foreign"], "its class must have the base class Loss of dpo_sd.losses"),
        (["loss=bare"], "loss/bare.yaml has no _target_"),
    ],
)
def test_a_mistake_about_it_is_one_message(run, arguments, message):
    ended = run(*arguments)
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.startswith("error: ") and message in ended.err and ended.err.count("\n") == 1


def test_a_recipe_that_sets_what_the_class_lacks_is_named(run):
    ended = run("experiment=quickstart", "loss=alone", "loss.scale=1")
    assert ended.code == 1
    assert ended.err.startswith(
        "error: in experiment/quickstart.yaml: loss.beta: no such setting; it belongs to loss=dpo"
    )
    assert "leave out experiment=quickstart" in ended.err


def test_plan_composes_it_too(own, command):
    ended = command("--config-dir", str(own), "loss=hinge", "--cfg", "job", program="plan")
    assert ended.code == 0 and "own_classes.Hinge" in ended.out


@pytest.mark.parametrize("flags", [["--config-dir", "a b"], ["--config-dir=a b"], ["-cd", "a b"]])
def test_the_folder_is_found_however_it_is_said(flags):
    assert own_flags(["x=1", *flags, "y=2"]) == {"--config-dir": "a b"}


def test_settings_may_stand_on_both_sides_of_a_flag():
    arguments = ["a=1", "--config-dir", "mine", "b=2", "-m", "c=3", "--config-name=x", "~d"]
    assert flags_first(arguments) == ["--config-dir", "mine", "-m", "--config-name=x", "a=1", "b=2", "c=3", "~d"]


def test_a_run_with_options_of_the_users_own_is_not_resumed_without_them(tmp_path):
    record = {
        "command": ["python", "-m", "dpo_sd.train", "--config-dir", "mine", "loss=hinge"],
        "overrides": ["loss=hinge"],
    }
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="that run has options of the user's own: add --config-dir mine"):
        resume_arguments([f"resume={tmp_path}"])
    assert "loss=hinge" in resume_arguments(["--config-dir", "elsewhere", f"resume={tmp_path}"])


RECORDS = [
    *sorted(Path(__file__).parent.parent.glob("experiments/*-quickstart/*/config.yaml")),
    *sorted(Path(__file__).parent.parent.glob("experiments/*-style-loop/*.yaml")),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_record_composes_with_what_has_come_to_be_a_setting_since(record, command):
    ended = command("--config-dir", str(record.parent), "--config-name", record.stem, "pairs_per_update=0")
    # which is the last thing that is checked
    assert (ended.code, ended.err) == (1, "error: pairs_per_update must be at least 1, got 0\n")


def test_a_record_reruns_in_a_folder_of_its_name_by_the_command_of_the_readme(command, small, tmp_path):
    record = RECORDS[0].parent
    ended = command("--config-dir", str(record), "--config-name", "config", *small(tmp_path / "again"))
    assert ended.code == 0, ended.err
    assert ended.out.count("run     ") == 1  # nothing is said twice
    summary = json.loads((tmp_path / "again" / "summary.json").read_text())
    assert summary["verdict"]["judge"] == "oracle: centred"
    assert (record.parent.name, len(RECORDS)) == ("2026-11-23-quickstart", 5)
