"""The store of tensors: what is kept comes back to the bit, and what goes wrong costs no more than its shard."""

from __future__ import annotations

import errno
import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dpo_sd.errors import UserError
from dpo_sd.files.tensors import Header, HeaderError, TensorStore, content_key, read_header


def key(number: int) -> str:
    return content_key(number=number)


def fill(store: TensorStore, numbers: range) -> None:
    for number in numbers:
        store.put(key(number), torch.full((2, number % 3 + 1), float(number)))


def by_fours(folder: Path) -> TensorStore:
    """A store of float32 whose shards hold four tensors."""
    return TensorStore(folder, torch.float32, shard_size=4)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def test_what_is_kept_comes_back_in_any_order_and_in_another_process(tmp_path):
    store = by_fours(tmp_path / "new" / "folder")
    fill(store, range(10))
    store.flush()
    for each in (store, by_fours(store.folder)):
        rows = each.rows([key(number) for number in (7, 0, 9, 7)])
        assert len(rows) == 4
        assert [rows[row].flatten().tolist() for row in range(4)] == [[7.0] * 4, [0.0] * 2, [9.0] * 2, [7.0] * 4]
        assert [tuple(rows[row].shape) for row in range(4)] == [(2, 2), (2, 1), (2, 1), (2, 2)]
        assert torch.equal(pickle.loads(pickle.dumps(rows))[2], rows[2])
    assert len(shards(store.folder)) == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.uint8])
def test_tensors_are_kept_in_the_precision_of_the_store(tmp_path, dtype):
    store = TensorStore(tmp_path, dtype)
    store.put(key(0), torch.arange(6.0).view(2, 3).T)
    store.flush()
    (tensor,) = store.rows([key(0)])
    assert tensor.dtype == dtype and tensor.tolist() == [[0, 3], [1, 4], [2, 5]]


def test_what_is_lacking_is_known_before_and_after_the_flush(tmp_path):
    store = TensorStore(tmp_path, torch.float32)
    asked = [key(number) for number in range(4)]
    assert store.lacks(asked).tolist() == [True] * 4
    fill(store, range(1, 3))
    for _ in range(2):
        assert store.lacks(asked).tolist() == store.lacks(np.array(asked, "S24")).tolist() == [True, False, False, True]
        store.flush()
    assert store.lacks([]).tolist() == []
    with pytest.raises(KeyError, match=key(3)):
        store.rows([key(1), key(3)])


def test_a_kill_costs_what_was_waiting_and_leaves_complete_shards(tmp_path):
    fill(by_fours(tmp_path), range(10))  # and no flush
    after = by_fours(tmp_path)
    assert after.lacks([key(number) for number in range(10)]).tolist() == [False] * 8 + [True] * 2
    assert after.notes == []


def test_a_kill_in_the_middle_of_a_shard_leaves_no_shard(tmp_path, monkeypatch):
    def killed(*names: Any) -> None:
        raise KeyboardInterrupt

    store = by_fours(tmp_path)
    fill(store, range(4))
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        fill(store, range(4, 8))
    assert len(shards(tmp_path)) == 1
    assert by_fours(tmp_path).notes == []


def test_a_full_disk_is_said_and_what_is_complete_stays(tmp_path, monkeypatch):
    store = by_fours(tmp_path)
    fill(store, range(4))

    def full(tensors: Any, file: Path, metadata: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(UserError, match=r"No space left on device.*cache_dir=<folder>; what is complete is kept"):
        fill(store, range(4, 8))
    assert [file.name for file in tmp_path.iterdir()] == [shards(tmp_path)[0].name]
    assert not by_fours(tmp_path).lacks([key(number) for number in range(4)]).any()


def test_a_header_says_names_shapes_kinds_places_and_metadata(tmp_path):
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(4, dtype=torch.float16), "none": torch.zeros(0, 5)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"rank": "4"})
    header = read_header(tmp_path / "x.safetensors")
    assert sorted(header.names) == ["a", "b", "none"] and header.metadata == {"rank": "4"}
    assert header.shapes == {"a": (4,), "b": (2, 3), "none": (0, 5)}
    assert header.dtypes == {"a": "F16", "b": "F32", "none": "F32"}
    whole = (tmp_path / "x.safetensors").read_bytes()
    assert np.frombuffer(whole, np.float32, 6, header.offsets["b"]).tolist() == [0, 1, 2, 3, 4, 5]
    save_file({}, tmp_path / "empty.safetensors")
    assert read_header(tmp_path / "empty.safetensors") == Header({}, {}, {}, {})


def entry(dtype: str, shape: list[int], *offsets: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("entries", "data", "why"),
    [
        ({"a": entry("F32", [3], 0, 8)}, 8, "the place of a is not that of its numbers"),
        ({"a": entry("F32", [2], 4, 12)}, 12, "the place of a"),
        ({"a": entry("F32", [2], 0, 8), "b": entry("F16", [2], 4, 8)}, 8, "the place of b"),
        ({"a": entry("F32", [2], 0, 8)}, 7, "it is cut short"),
        ({"a": entry("F32", [2], 0, 8)}, 9, "it goes on behind its last tensor"),
        ({"a": entry("F32", [2], 0, 8), "__metadata__": {"rank": 4}}, 8, "its metadata holds more than texts"),
    ],
)
def test_a_header_that_contradicts_its_file_is_refused(tmp_path, entries, data, why):
    file = tmp_path / "x.safetensors"
    file.write_bytes(header(json.dumps(entries).encode()) + bytes(data))
    with pytest.raises(HeaderError, match=why):
        read_header(file)


def header(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: b"<!DOCTYPE html>" * 20,
        lambda whole: whole[:-1],
        lambda whole: whole[:20],
        lambda whole: header(b"[1, 2]"),
        lambda whole: header(b'{"key": {"shape": [1]}}'),
        lambda whole: header(b'{"key": 3}'),
        lambda whole: header(b"\xff\xfe"),
        lambda whole: header(json.dumps({"key": {"shape": ["x"], "data_offsets": [0, 0]}}).encode()),
    ],
)
def test_a_damaged_shard_is_said_and_taken_away_and_the_others_are_read(tmp_path, damage):
    fill(by_fours(tmp_path), range(8))
    broken, whole = shards(tmp_path)
    held = [number for number in range(8) if key(number).encode() in broken.read_bytes()]
    broken.write_bytes(damage(broken.read_bytes()))
    store = by_fours(tmp_path)
    (note,) = store.notes
    assert str(broken) in note and "computed anew" in note
    assert store.lacks([key(number) for number in range(8)]).tolist() == [number in held for number in range(8)]
    assert shards(tmp_path) == [whole]
    fill(store, range(8))
    store.flush()
    assert by_fours(tmp_path).notes == []
    assert store.rows([key(5)])[0].unique().tolist() == [5.0]


def test_two_runs_that_write_the_same_at_once_read_the_same(tmp_path):
    one, other = by_fours(tmp_path), by_fours(tmp_path)
    fill(one, range(6))
    fill(other, range(2, 8))
    one.flush()
    other.flush()
    rows = by_fours(tmp_path).rows([key(number) for number in range(8)])
    assert [float(rows[number].mean()) for number in range(8)] == list(range(8))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux")
def test_only_so_many_shards_are_open_at_once(tmp_path):
    store = TensorStore(tmp_path, torch.float32, shard_size=1)
    fill(store, range(80))
    store.flush()
    rows = store.rows([key(number) for number in range(80)])
    for _ in range(2):
        assert [int(rows[number].mean()) for number in range(80)] == list(range(80))
    descriptors = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    opened = [each for each in descriptors if each.is_symlink() and each.readlink().is_relative_to(tmp_path)]
    assert len(opened) == rows.most_open < 80


def test_a_shard_that_vanishes_or_shrinks_during_a_run_is_named(tmp_path):
    store = TensorStore(tmp_path, torch.float32)
    fill(store, range(2))
    store.flush()
    rows, (file,) = store.rows([key(0), key(1)]), shards(tmp_path)
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(UserError, match=f"{file} is damaged and is deleted"):
        [rows[row] for row in range(2)]
    assert not file.exists()
    with pytest.raises(UserError, match=f"{file} was deleted while it was in use"):
        store.rows([key(0)])[0]


def test_the_key_depends_on_every_ingredient_and_not_on_their_order():
    made_from: dict[str, Any] = {"model": "a", "steps": 12, "guidance": 4.0, "prompts": ["x", "y"], "seeds": [1, 2]}
    changes: list[dict[str, Any]] = [
        {"model": "b"}, {"steps": 13}, {"guidance": 4.5}, {"prompts": ["y", "x"]}, {"seeds": [1, 3]}, {"more": None},
    ]  # fmt: skip
    keys = {content_key(**made_from), *(content_key(**made_from | change) for change in changes)}
    assert len(keys) == 1 + len(changes)
    assert content_key(**dict(reversed(made_from.items()))) == content_key(**made_from)
