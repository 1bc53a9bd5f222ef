"""Two starts are two starts: folders made anew, folders that are held, and files that killed writers left."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import pytest

from dpo_sd.errors import UserError
from dpo_sd.files.atomic import replacing, write_text
from dpo_sd.files.claims import LOCK, held, in_turn, made_anew, take_turn

HOLDER = """
import sys, time
from pathlib import Path
from dpo_sd.files.claims import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds a folder until it is killed."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_of_many_that_make_the_same_folder_each_gets_its_own(tmp_path):
    with ThreadPoolExecutor(20) as pool:
        made = list(pool.map(made_anew, [tmp_path / "runs" / "12-00-00"] * 20))
    assert {folder.name for folder in made} == {"12-00-00", *(f"12-00-00-{n}" for n in range(2, 21))}


def test_a_held_folder_names_who_has_it_and_since_when(tmp_path, holder):
    said = rf"{tmp_path} is in use by process {holder.pid} on {socket.gethostname()}, since 2\d\d\d-.*wait for its end"
    with pytest.raises(UserError, match=said), held(tmp_path):
        pass
    assert (tmp_path / LOCK).exists()


def test_a_killed_process_lets_go_at_once(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with held(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def lockless(*arguments: object) -> None:
    raise OSError(errno.ENOSYS, "Function not implemented")


def test_of_many_that_take_turns_each_finds_what_the_one_before_has_left(tmp_path):
    file = tmp_path / "folder" / ".preparing"

    def add_one(_: int) -> int:
        with in_turn(file):
            n = int(file.read_text() or 0)
            time.sleep(0.01)
            file.write_text(str(n + 1))
            return n

    with ThreadPoolExecutor(8) as many:
        assert sorted(many.map(add_one, range(8))) == list(range(8))


def test_on_a_disk_without_locks_a_living_process_still_keeps_its_folder(tmp_path, monkeypatch, holder, caplog):
    monkeypatch.setattr(fcntl, "lockf", lockless)
    with pytest.raises(UserError, match=f"in use by process {holder.pid}"), held(tmp_path):
        pass
    holder.kill()
    holder.wait()
    with held(tmp_path):
        pass
    assert not caplog.text
    (tmp_path / LOCK).write_text('{"host": "another", "pid": 1, "since": "2026-01-01"}')
    with held(tmp_path):
        assert "was in use by process 1 on another, and this disk has no locks" in caplog.text


def test_on_a_disk_without_locks_turns_are_not_taken_and_that_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(fcntl, "flock", lockless)
    with (tmp_path / "log").open("w") as log:
        take_turn(log.fileno(), fcntl.LOCK_EX)
    assert "let no two programs write the same folder" in caplog.text


def partial(host: str, pid: int) -> str:
    return f".{host}-{pid}-0.partial"


def test_the_next_writer_removes_what_killed_ones_left_and_nothing_of_the_living(tmp_path, holder):
    with replacing(tmp_path / "probe") as own:
        host = own.name[1:9]
        own.write_text("")
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    folder = tmp_path / "folder"
    folder.mkdir()
    left = [partial(host, int(dead.stdout)), partial(host, holder.pid), partial("0" * 8, 1), partial("1" * 8, 1), ".x"]
    for name in left:
        (folder / name).write_text("")
    os.utime(folder / left[3], (0, 0))  # long ago, on another machine
    write_text(folder / "new.txt", "whole")
    assert {file.name for file in folder.iterdir()} == {"new.txt", left[1], left[2], ".x"}


def test_where_modes_cannot_be_changed_files_are_written_as_they_are(tmp_path, monkeypatch):
    def refused(*arguments: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", refused)
    write_text(tmp_path / "a.txt", "whole")
    assert (tmp_path / "a.txt").read_text() == "whole"


# ---- runs and sweeps


def seeds(folder: Path) -> dict[str, int]:
    """The seed of each run below a folder, by its place there."""
    return {
        str(file.parent.relative_to(folder)): json.loads(file.read_text())["seed"]
        for file in folder.rglob("run.json")
    }  # fmt: skip


def test_runs_of_one_job_have_folders_of_their_own_and_a_restart_finds_its_own(train, tmp_path, monkeypatch):
    def started(seed: int, restarts: int = 0) -> object:
        def job() -> None:
            os.chdir(tmp_path)
            os.environ |= {"SLURM_JOB_ID": "777", "SLURM_RESTART_COUNT": str(restarts), "SLURM_NTASKS": "1"}

        ended = train(tmp_path, f"seed={seed}", "name=a", without=("hydra.run.dir",), patch=job)
        assert ended.code == 0, ended.err
        return ended.out

    for seed in (1, 2, 3):
        started(seed)
    assert seeds(tmp_path / "outputs/a") == {"777": 1, "777-2": 2, "777-3": 3}
    assert "resume  " in str(started(2, restarts=1))
    started(4, restarts=1)
    assert seeds(tmp_path / "outputs/a") == {"777": 1, "777-2": 2, "777-3": 3, "777-4": 4}


def test_a_run_that_another_process_works_on_is_not_touched(train, tmp_path, holder):
    ended = train(tmp_path)
    assert ended.code == 1 and f"in use by process {holder.pid}" in ended.err
    assert {file.name for file in tmp_path.iterdir()} == {LOCK, "train.log"}


def test_a_pair_folder_that_is_being_drawn_is_not_drawn_by_another(command, tmp_path, holder):
    ended = command("prompts=[a fox]", f"out={tmp_path}", program="generate")
    assert ended.code == 1 and f"in use by process {holder.pid}" in ended.err


def test_a_sweep_in_the_folder_of_another_is_refused(train, tmp_path):
    (tmp_path / "sweep/3").mkdir(parents=True)
    (tmp_path / "sweep/3/job.json").write_text("{}")
    ended = train(tmp_path, "-m", "seed=1,2", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert ended.code == 1 and "holds a sweep already: choose another hydra.sweep.dir" in ended.err


def test_two_sweeps_of_the_same_second_have_two_tables(train, tmp_path):
    def at_noon() -> None:
        import hydra.core.utils

        class Noon:
            now = staticmethod(lambda: datetime(2026, 1, 2, 12))

        hydra.core.utils.datetime = Noon  # type: ignore[attr-defined]
        os.chdir(tmp_path)

    for seed in (1, 3):
        settings = (f"seed={seed},{seed + 1}", "name=a", "trainer.max_steps=1", "~callbacks.verdict")
        ended = train(tmp_path, "-m", *settings, without=("hydra.run.dir", "callbacks.verdict"), patch=at_noon)
        assert ended.code == 0, ended.err
    noon = "2026-01-02_12-00-00"
    assert seeds(tmp_path / "outputs/a") == {f"{noon}/0": 1, f"{noon}/1": 2, f"{noon}-2/0": 3, f"{noon}-2/1": 4}
    assert "seed=3" in (tmp_path / "outputs/a" / f"{noon}-2/sweep.md").read_text()
