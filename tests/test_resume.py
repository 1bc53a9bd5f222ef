from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from dpo_sd.composition.replay import check_replayed, resume_arguments
from dpo_sd.composition.schema import CONF_DIR
from dpo_sd.errors import UserError
from dpo_sd.training import resume


@pytest.fixture
def finished_run(tmp_path):
    """Folder of a run that was started with three overrides."""
    folder = tmp_path / "it's a=run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "step=000004.ckpt").write_text("")
    overrides = ["experiment=quickstart", "loss.beta=500", "~callbacks.samples"]
    (folder / "run.json").write_text(json.dumps({"overrides": overrides}))
    return folder


def quoted(path: Path) -> str:
    return "'" + str(path).replace("'", "\\'") + "'"


def test_resume_replays_the_overrides_in_the_runs_own_folder(finished_run):
    assert resume_arguments([f"resume={finished_run}"]) == [
        "experiment=quickstart",
        "loss.beta=500",
        "~callbacks.samples",
        f"hydra.run.dir={quoted(finished_run)}",
        f"resume={quoted(finished_run)}",
    ]


def test_what_a_preset_of_another_machine_changes_is_free_to_change(monkeypatch):
    settings = {
        "hardware": {"micro_batch": 4},
        "sampler": {"batch_size": 8, "steps": 12},
        "optimizer": {"schedule": "cosine"},
        "trainer": {"max_steps": 9},
    }
    kept = {"identity": {"settings": settings}, "global_step": 3}
    monkeypatch.setattr(resume, "read_checkpoint", lambda path: kept)
    here = copy.deepcopy(settings)
    here["hardware"]["micro_batch"], here["sampler"]["batch_size"] = 2, 1
    resume.check_same_run(Path("last.ckpt"), here)
    here["sampler"]["steps"] = 20
    with pytest.raises(UserError, match=r"other settings: sampler\.steps \(there 12, here 20\)"):
        resume.check_same_run(Path("last.ckpt"), here)


def test_resume_takes_a_checkpoint_of_the_run(finished_run):
    checkpoint = finished_run / "checkpoints" / "step=000004.ckpt"
    resumed = resume_arguments([f"resume={checkpoint}"])
    assert resumed[-2:] == [f"hydra.run.dir={quoted(finished_run)}", f"resume={quoted(checkpoint)}"]


def test_what_the_command_line_sets_anew_is_not_replayed(finished_run):
    resumed = resume_arguments(["loss.beta=9", f"resume={finished_run}", "seed=1", "hydra.run.dir=elsewhere"])
    assert [argument for argument in resumed if argument.startswith("loss.beta")] == ["loss.beta=9"]
    assert [argument for argument in resumed if argument.startswith("hydra")] == ["hydra.run.dir=elsewhere"]


@pytest.mark.parametrize("name", ["plain", "it's a=run", "end\\", "back\\'s", "${seed}", "null"])
def test_resuming_a_resumed_command_line_changes_nothing(finished_run, monkeypatch, name):
    # the processes of DDP are started with the rewritten command line
    monkeypatch.chdir(finished_run.parent)
    resumed = resume_arguments([f"resume={finished_run.rename(finished_run.parent / name)}"])
    assert resume_arguments(resumed) == resumed


@pytest.mark.parametrize("arguments", [[], ["loss.beta=3"], ["resume=null"]])
def test_without_resume_the_command_line_stays(arguments):
    assert resume_arguments(arguments) == arguments


def test_a_job_of_a_sweep_file_resumes_alone(finished_run):
    (finished_run / "run.json").write_text(json.dumps({"overrides": ["sweep=beta", "loss.beta=500"]}))
    assert "sweep=beta" not in resume_arguments([f"resume={finished_run}"])


@pytest.mark.parametrize("sweep", ["-m", "--multirun", "sweep=beta"])
def test_a_sweep_cannot_resume(finished_run, sweep):
    with pytest.raises(UserError, match="cannot be part of a sweep"):
        resume_arguments([sweep, f"resume={finished_run}"])


def test_resume_refuses_what_is_no_run(tmp_path):
    with pytest.raises(UserError, match="nowhere: there is no such run folder or checkpoint"):
        resume_arguments([f"resume={tmp_path / 'nowhere'}"])
    with pytest.raises(UserError, match=r"no run\.json there"):
        resume_arguments([f"resume={tmp_path}"])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"overrides": 3}'])
def test_resume_refuses_a_damaged_record(finished_run, text):
    (finished_run / "run.json").write_text(text)
    with pytest.raises(UserError, match="damaged"):
        resume_arguments([f"resume={finished_run}"])


@pytest.mark.parametrize("override", [
    "loss._target_=os.system",
    "+hydra.callbacks.x=1",
    "hydra/launcher=joblib",
    "logger@hydra.callbacks=wandb",
    "loss=${oc.decode:${x}}",
    "+x=${oc.create:${y}}",
])  # fmt: skip
def test_a_record_cannot_choose_what_is_executed(finished_run, override):
    (finished_run / "run.json").write_text(json.dumps({"overrides": [override]}))
    with pytest.raises(UserError, match="say that on the command line yourself"):
        resume_arguments([f"resume={finished_run}"])


@pytest.mark.parametrize(("overrides", "message"), [
    # neither the resolver nor the class stands in the text
    (["+a=oc", "+b=decode", "+k=_tar", "+callbacks.evil='${${a}.${b}:\"{${k}get_: os.getcwd}\"}'"], "not a supported"),
    (["logger=<stranger's>"], "an option lies in conf/ or in the folder of --config-dir, not above it"),
    (["logger=[csv,<stranger's>]"], "an option lies in conf/ or in the folder of --config-dir, not above it"),
    (["model.pickle=true"], "reads a pickle, which can run code: add model.pickle=true if you trust it"),
])  # fmt: skip
def test_the_run_folder_of_a_stranger_runs_nothing(train, tmp_path, overrides, message):
    run = tmp_path / "run"
    run.mkdir()
    (run / "evil.yaml").write_text("evil: {_target_: os.getcwd}")
    option = os.path.relpath(run / "evil", CONF_DIR / "logger")
    overrides = [setting.replace("<stranger's>", option) for setting in overrides]
    (run / "run.json").write_text(json.dumps({"overrides": overrides}))
    ended = train(run, f"resume={run}")
    assert ended.code == 1 and message in ended.err and "Traceback" not in ended.err


def composition(text: str) -> Any:
    return OmegaConf.create(yaml.safe_load(text))


@pytest.mark.parametrize("text", [
    "callbacks: {evil: {_target_: os.system}}",
    "callbacks: {evil: {deep: [{_target_: os.system}]}}",
    "callbacks: {evil: '${oc.create:${text}}'}\ntext: '{_target_: os.system}'",
    "loss: {_target_: '${which}'}\nwhich: os.system",
])  # fmt: skip
def test_a_replayed_class_is_one_of_ours_or_named_on_the_command_line(text):
    with pytest.raises(UserError, match=r"choose os\.system"):
        check_replayed(composition(text), ["resume=/runs/_target_=os.system"])
    check_replayed(composition(text), ["resume=/runs/1", "callbacks.evil._target_=os.system"])
    check_replayed(composition("loss: {_target_: dpo_sd.losses.SFTLoss}"), ["resume=/runs/1"])
