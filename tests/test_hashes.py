"""Results of files are computed once, and again as soon as a file has changed."""

from __future__ import annotations

import hashlib
import logging
import os
import sqlite3
import time
from pathlib import Path

import pytest

from dpo_sd.files.hashes import remembered, sha256

NOW = time.time


@pytest.fixture(autouse=True)
def memory(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DPO_SD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(time, "time", lambda: NOW() + 60)  # files of these tests were written a minute ago
    return tmp_path / "cache" / "files.sqlite"


class Reader:
    """Reads files, and counts how often."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def __call__(self, file: str) -> list[str]:
        self.read.append(Path(file).name)
        return [Path(file).read_text()]

    def of(self, *files: Path, what: str = "text 1") -> list[str]:
        return [value for (value,) in remembered(files, what, self)]


def make(folder: Path, *texts: str) -> list[Path]:
    files = [folder / f"{number}.txt" for number in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text)
    return files


def test_a_file_is_read_once_until_it_changes(tmp_path):
    files, reader = make(tmp_path, "a", "b"), Reader()
    assert reader.of(*files) == reader.of(*files) == ["a", "b"]
    assert reader.read == ["0.txt", "1.txt"]
    files[1].write_text("changed")
    assert reader.of(*files) == ["a", "changed"]
    assert reader.read == ["0.txt", "1.txt", "1.txt"]


def test_an_edit_of_the_same_length_with_its_time_set_back_is_noticed(tmp_path):
    """The change time of an inode cannot be set by a user."""
    (file,), reader = make(tmp_path, "aaaa"), Reader()
    reader.of(file)
    before = file.stat()
    time.sleep(0.02)  # more than a tick of the kernel's clock
    file.write_text("bbbb")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert reader.of(file) == ["bbbb"]


def test_another_file_moved_into_the_place_is_noticed(tmp_path):
    (file, other), reader = make(tmp_path, "aaaa", "bbbb"), Reader()
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    reader.of(file)
    os.replace(other, file)
    assert reader.of(file) == ["bbbb"]


def test_a_file_that_has_just_changed_is_not_remembered(tmp_path, monkeypatch):
    """It could change again within one tick of the clock, and nothing would tell."""
    (file,), reader = make(tmp_path, "a"), Reader()
    monkeypatch.setattr(time, "time", NOW)
    reader.of(file)
    reader.of(file)
    assert reader.read == ["0.txt"] * 2
    monkeypatch.setattr(time, "time", lambda: NOW() + 5)
    reader.of(file)
    reader.of(file)
    assert reader.read == ["0.txt"] * 3


def test_how_long_the_reading_took_does_not_make_a_fresh_file_an_old_one(tmp_path, monkeypatch):
    (file,), clock = make(tmp_path, "a"), [NOW()]
    monkeypatch.setattr(time, "time", lambda: clock[0])

    def slow(path: str) -> list[str]:
        clock[0] += 60
        return [Path(path).read_text()]

    list(remembered([file], "slow 1", slow))
    clock[0] -= 60
    reader = Reader()
    assert reader.of(file, what="slow 1") == ["a"] and reader.read == ["0.txt"]


def test_links_are_known_by_what_they_lead_to(tmp_path):
    (file, other), reader = make(tmp_path, "a", "b"), Reader()
    link = tmp_path / "link"
    link.symlink_to(file)
    assert reader.of(file, link) == ["a", "a"] and reader.read == ["0.txt"]
    link.unlink()
    link.symlink_to(other)
    assert reader.of(link) == ["b"]


def test_computations_do_not_read_each_others_memory(tmp_path):
    (file,), reader = make(tmp_path, "a"), Reader()
    reader.of(file, what="text 1")
    reader.of(file, what="text 2")
    assert len(reader.read) == 2


@pytest.mark.parametrize("content", [b"no database at all" * 100, b""])
def test_a_damaged_memory_costs_time_and_nothing_else(tmp_path, memory, content):
    (file,), reader = make(tmp_path, "a"), Reader()
    memory.parent.mkdir()
    memory.write_bytes(content)
    assert reader.of(file) == ["a"]


@pytest.mark.parametrize("garbage", ["garbage", "[]", "null", '"x"', None, 7, b"\xff"])
def test_a_result_that_is_not_of_our_writing_is_computed_again(tmp_path, memory, garbage):
    (file,), reader = make(tmp_path, "a"), Reader()
    reader.of(file)
    with sqlite3.connect(memory) as connection:
        connection.execute("UPDATE files SET value = ?", (garbage,))
    assert reader.of(file) == reader.of(file) == ["a"] and len(reader.read) == 2


def test_an_empty_name_of_the_cache_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DPO_SD_CACHE", "")
    Reader().of(*make(tmp_path, "a"))
    assert not (tmp_path / "files.sqlite").exists() and (tmp_path / "home/.cache/dpo_sd/files.sqlite").exists()


def test_a_memory_that_is_damaged_inside_costs_time_and_nothing_else(tmp_path, memory, caplog):
    files, reader = make(tmp_path, *map(str, range(200))), Reader()
    reader.of(*files)
    with sqlite3.connect(memory) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    whole = memory.read_bytes()
    memory.write_bytes(whole[:8192] + b"\xff" * (len(whole) - 8192))
    with caplog.at_level(logging.WARNING):
        assert Reader().of(*files) == [str(number) for number in range(200)]


@pytest.mark.parametrize("place", ["a file", "n" * 300])
def test_a_folder_that_cannot_be_used_is_said(tmp_path, monkeypatch, caplog, place):
    (tmp_path / "a file").touch()
    monkeypatch.setenv("DPO_SD_CACHE", str(tmp_path / place))
    (file,), reader = make(tmp_path, "a"), Reader()
    with caplog.at_level(logging.WARNING):
        assert reader.of(file) == reader.of(file) == ["a"]
    assert "cannot be used" in caplog.text and len(reader.read) == 2


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        Reader().of(tmp_path / "nowhere")


def test_the_digest_is_that_of_the_bytes(tmp_path):
    (file,) = make(tmp_path, "a")
    assert sha256(file) == hashlib.sha256(b"a").hexdigest()
    file.write_text("b")
    assert sha256(file) == hashlib.sha256(b"b").hexdigest()


def test_large_files_in_the_cache_of_the_hub_are_named_by_their_digest(tmp_path):
    digest = hashlib.sha256(b"something").hexdigest()
    blob = tmp_path / "blobs" / digest
    blob.parent.mkdir()
    blob.write_text("not read")
    link = tmp_path / "model.safetensors"
    link.symlink_to(blob)
    assert sha256(link) == digest


def test_a_name_that_is_not_utf_8_is_remembered_like_others(tmp_path):
    file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt"))
    file.write_text("a")
    reader = Reader()
    assert reader.of(file) == reader.of(file) == ["a"] and len(reader.read) == 1


def test_a_file_that_cannot_be_read_has_a_result_that_is_not_remembered(tmp_path):
    (file,) = make(tmp_path, "a")
    missing = tmp_path / "missing"

    def read(name: str) -> str:
        raise PermissionError(13, "Permission denied")

    def said(name: str, error: OSError) -> str:
        return f"{Path(name).name}: {error.strerror}"

    found = list(remembered([missing, file], "text 1", read, said))
    assert found == ["missing: No such file or directory", f"{file.name}: Permission denied"]
    assert list(remembered([file], "text 1", lambda name: "a", said)) == ["a"]
