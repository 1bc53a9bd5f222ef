"""Jobs of a scheduler: one folder for all their starts, the way back into the queue, and machines that wait in vain."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from dpo_sd.training import cluster

NUMBERS = (
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
    "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
    "TORCHELASTIC_RUN_ID",
    "MASTER_ADDR",
)


@pytest.fixture(autouse=True)
def outside_of_any_job(monkeypatch):
    for name in (*NUMBERS, "SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT", "RANK", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def scontrol(tmp_path, monkeypatch) -> Path:
    """A program of that name that writes down what it was asked."""
    log = tmp_path / "scontrol.log"
    program = tmp_path / "bin/scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> "{log}"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    return log


def at_the_third_update(number: signal.Signals) -> None:
    """The process sends itself a signal when its third update is done."""
    from dpo_sd.callbacks.checkpoint import Checkpoint

    ends = Checkpoint.on_update

    def at_the_third(self, run):
        if run.step == 3:
            os.kill(os.getpid(), number)
        ends(self, run)

    Checkpoint.on_update = at_the_third  # type: ignore[method-assign]


def test_outside_of_a_job_nothing_is_shared_and_nothing_restarts():
    assert cluster.run_id() is None
    assert not cluster.restarted() and not cluster.launched() and not cluster.in_slurm()
    assert cluster.first_process()


@pytest.mark.parametrize(("numbers", "expected"), [
    ({"SLURM_JOB_ID": "4711"}, "4711"),
    ({"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "2"}, "4711.2"),
    ({"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "4294967290"}, "4711"),  # a shell: many commands run in it
    ({"TORCHELASTIC_RUN_ID": "abc"}, "abc"),
    ({"SLURM_JOB_ID": "4711", "TORCHELASTIC_RUN_ID": "none"}, f"4711.torchrun-{os.getppid()}"),
    ({"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "TORCHELASTIC_RUN_ID": "none"}, "4711.0"),
])  # fmt: skip
def test_all_processes_of_a_launch_name_it_alike_and_those_of_another_do_not(monkeypatch, numbers, expected):
    for name, value in numbers.items():
        monkeypatch.setenv(name, value)
    assert cluster.run_id() == expected


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_one_process_speaks_for_all(monkeypatch, name):
    monkeypatch.setenv(name, "0")
    assert cluster.first_process()
    monkeypatch.setenv(name, "1")
    assert not cluster.first_process()


def test_a_task_of_an_array_is_put_back_as_itself(monkeypatch, scontrol):
    for name, value in (("SLURM_JOB_ID", "12"), ("SLURM_ARRAY_JOB_ID", "10"), ("SLURM_ARRAY_TASK_ID", "2")):
        monkeypatch.setenv(name, value)
    assert "10_2 is in the queue again" in cluster.requeue()
    assert scontrol.read_text() == "requeue 10_2\n"


def test_a_queue_that_cannot_be_reached_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "job 12 could not be put back into the queue" in cluster.requeue()


def test_other_machines_that_nobody_starts_are_refused_at_once(train, tmp_path):
    ended = train(tmp_path / "run", "trainer.num_nodes=2", "trainer.strategy=ddp")
    assert ended.code == 1
    assert "trainer.num_nodes=2 needs a launcher" in ended.err and "torchrun" in ended.err


def test_a_preempted_job_goes_back_into_the_queue_and_its_next_start_ends_as_if_nothing_had_happened(
    train, tmp_path, scontrol, monkeypatch
):
    """The command line of both starts is the same; only Slurm's count of restarts differs."""
    whole, job = tmp_path / "whole", tmp_path / "job"
    assert train(whole).code == 0

    def slurm(restarts: int) -> None:
        os.environ |= {"SLURM_JOB_ID": "4711", "SLURM_RESTART_COUNT": str(restarts)}

    def preempted() -> None:
        slurm(0)
        at_the_third_update(signal.SIGUSR1)

    first = train(job, patch=preempted)
    assert first.code == 130 and "4711 is in the queue again" in first.out
    assert scontrol.read_text() == "requeue 4711\n"
    second = train(job, patch=lambda: slurm(1))
    assert second.code == 0 and "resume" in second.out
    assert (job / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    assert json.loads((job / "summary.json").read_text())["steps"] == 6


def test_a_closed_terminal_saves_and_stops_but_not_a_run_that_nohup_started(train, tmp_path):
    def closed(ignored: bool) -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        at_the_third_update(signal.SIGHUP)

    stopped = train(tmp_path / "run", patch=lambda: closed(ignored=False))
    assert stopped.code == 130 and "stopped; continue with" in stopped.out
    assert (tmp_path / "run/checkpoints/step=000003.ckpt").exists()
    assert train(tmp_path / "kept", patch=lambda: closed(ignored=True)).code == 0


def test_a_second_start_that_is_no_restart_does_not_touch_the_run(train, tmp_path):
    run = tmp_path / "run"
    assert train(run, "trainer.max_steps=2").code == 0
    again = train(run, "trainer.max_steps=2")
    assert again.code == 1 and "holds a run already" in again.err
