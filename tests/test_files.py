"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from dpo_sd.files.atomic import replacing, write_json, write_text


def test_a_file_takes_the_place_of_the_former_one_in_folders_that_are_made(tmp_path: Path):
    file = tmp_path / "a" / "b.txt"
    write_text(file, "former")
    write_text(file, "newer, ü")
    assert file.read_text(encoding="utf-8") == "newer, ü"
    assert os.listdir(file.parent) == ["b.txt"]


def test_what_goes_wrong_leaves_the_former_file_and_nothing_beside_it(tmp_path: Path):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a.json") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "a.json").read_text() == '{\n  "a": 1\n}\n'
    assert os.listdir(tmp_path) == ["a.json"]


def test_the_path_to_write_is_free_so_that_a_link_can_be_put_there(tmp_path: Path):
    (tmp_path / "one").write_text("1")
    with replacing(tmp_path / "other") as temporary:
        os.link(tmp_path / "one", temporary)
    assert (tmp_path / "other").stat().st_ino == (tmp_path / "one").stat().st_ino


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_file_may_be_read_by_those_whom_the_umask_lets_whoever_wrote_it(tmp_path: Path, umask: int):
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "a") as temporary:
            os.close(os.open(temporary, os.O_CREAT, 0o600))  # as safetensors does
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~umask


def test_the_umask_of_the_process_is_never_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "umask", lambda _: pytest.fail("other threads make files meanwhile"))
    threads = [threading.Thread(target=write_text, args=(tmp_path / f"{k}", "x")) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(os.listdir(tmp_path)) == ["0", "1", "2", "3"]
