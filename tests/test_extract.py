"""Streaming a dataset into files: the same folder however often it was interrupted, and no more than is wanted."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import run_forked
from huggingface_hub import constants
from huggingface_hub.errors import HTTPError, Response
from huggingface_hub.utils import hf_raise_for_status

from dpo_sd.data.extract import Extract, Pick
from dpo_sd.data.rows import Tally, image_bytes
from dpo_sd.data.tables import TabularDataset
from dpo_sd.errors import UserError


@pytest.fixture(autouse=True)
def memory(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DPO_SD_CACHE", str(tmp_path / "memory"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # whatever the environment says


def make(folder: Path, files: int = 4, rows: int = 10) -> Path:
    """A set of files in the layout of the Hub; every seventh row is of no use."""
    for file in range(files):
        numbers = range(file * rows, (file + 1) * rows)
        columns = {"n": list(numbers), "picture": [f"picture {n}".encode() for n in numbers], "more": [""] * rows}
        path = folder / f"data/train-{file:05}-of-{files:05}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path, row_group_size=3)
    return folder


def pick(row: dict[str, Any], where: str) -> dict[str, Any] | str:
    assert set(row) <= {"n", "picture"}
    return "seventh" if row["n"] % 7 == 0 else {"n": row["n"], "picture": row["picture"]}


def extract(path: Path | str, folder: Path, seed: int = 0, picking: Pick = pick, **where: Any) -> Extract:
    needed = {"data.n": ["n", "number"], "data.picture": ["picture"]}
    return Extract(TabularDataset(str(path), **where), folder, needed, ["gone"], picking, "settings", seed)


def numbers(extract: Extract, wanted: int | None = None) -> list[int]:
    kept = list(Tally(named=()).kept(extract.rows(wanted, "pictures")))
    for entry in kept:
        assert (extract.images / entry["picture"]).read_bytes() == f"picture {entry['n']}".encode()
    return [entry["n"] for entry in kept]


def tree(folder: Path) -> dict[str, str]:
    """Hash of each file by its path."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_all_rows_are_read_once_in_an_order_of_files_that_the_seed_decides(tmp_path):
    path = make(tmp_path / "set")
    orders = [numbers(extract(path, tmp_path / f"cache {n}", seed)) for n, seed in enumerate((0, 0, 1))]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == sorted(orders[2])
    assert sorted(orders[0]) == [n for n in range(40) if n % 7]
    files = [n // 10 for n in orders[0]]
    assert sum(a != b for a, b in itertools.pairwise(files)) == 3  # each file stays together
    assert [n % 10 for n in orders[0] if n // 10 == 1] == [0, 1, 2, 3, 5, 6, 7, 8, 9]  # in its own order


def test_no_more_is_kept_than_wanted_and_more_can_be_wanted_later(tmp_path):
    path = make(tmp_path / "set")
    few, all_of_them = numbers(extract(path, tmp_path / "cache"), 5), numbers(extract(path, tmp_path / "other"))
    assert few == all_of_them[:5]
    assert len(list((tmp_path / "cache").rglob("images/*/*"))) == 5
    assert numbers(extract(path, tmp_path / "cache"), 12) == all_of_them[:12]
    assert numbers(extract(path, tmp_path / "cache"), 5) == few
    assert numbers(extract(path, tmp_path / "cache")) == all_of_them
    assert tree(tmp_path / "cache") == tree(tmp_path / "other")


@pytest.mark.parametrize("kill_after", [0, 1, 5, 11, 38])
def test_a_killed_extraction_goes_on_and_ends_in_the_same_folder(kill_after, tmp_path):
    path = make(tmp_path / "set")
    numbers(extract(path, tmp_path / "whole"))

    def work() -> None:
        taken = itertools.count()

        def picking(row: dict[str, Any], where: str) -> dict[str, Any] | str:
            if next(taken) == kill_after:
                os.kill(os.getpid(), signal.SIGKILL)
            return pick(row, where)

        numbers(extract(path, tmp_path / "killed", picking=picking))

    assert run_forked(work, tmp_path).code == -signal.SIGKILL
    (log,) = (tmp_path / "killed").rglob("rows.jsonl")
    assert len(log.read_bytes().splitlines()) == kill_after
    with open(log, "ab") as torn:
        torn.write(b'{"file": 0, "ro')  # as if it had been killed in the middle of the next line
    assert tree(tmp_path / "killed") != tree(tmp_path / "whole")
    numbers(extract(path, tmp_path / "killed"))
    left = [file for file in tree(tmp_path / "killed") if file.endswith(".partial")]
    assert left == [] and tree(tmp_path / "killed") == tree(tmp_path / "whole")


def test_a_second_start_reads_the_folder_alone(tmp_path, monkeypatch):
    path = make(tmp_path / "set")
    first = numbers(extract(path, tmp_path / "cache"), 9)
    every = numbers(extract(path, tmp_path / "all"))
    monkeypatch.setattr(TabularDataset, "stream", lambda *_: pytest.fail("asked again"))
    assert numbers(extract(path, tmp_path / "cache"), 9) == first
    assert numbers(extract(path, tmp_path / "all")) == every


def there(extract: Extract, wanted: int | None = None) -> list[int] | None:
    rows = extract.there(wanted)
    return None if rows is None else [entry["n"] for entry in rows if "left_out" not in entry]


def test_rows_that_were_read_are_there_as_long_as_no_more_are_wanted_and_nothing_is_written(tmp_path):
    path, cache = make(tmp_path / "set"), tmp_path / "cache"
    assert there(extract(path, cache), 5) is None and not cache.exists()
    first = numbers(extract(path, cache), 5)
    (log,) = cache.rglob("rows.jsonl")
    with open(log, "a") as torn:
        torn.write('{"file": 0, "ro')
    before = tree(cache)
    assert there(extract(path, cache), 5) == first and there(extract(path, cache), 3) == first[:3]
    assert there(extract(path, cache), 6) is None is there(extract(path, cache))
    assert there(extract(path, cache, seed=1), 5) is None
    assert tree(cache) == before
    everything = numbers(extract(path, cache))
    assert there(extract(path, cache)) == everything == there(extract(path, cache), 1000)


def test_files_need_not_all_have_a_column_that_is_optional(tmp_path):
    rows = {"n": [1, 2], "picture": [b"picture 1", b"picture 2"]}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    assert numbers(extract(tmp_path, tmp_path / "cache")) == [1, 2]  # "gone" is nowhere


def test_the_rows_of_local_files_are_counted_by_their_metadata_and_those_of_the_hub_are_not(tmp_path):
    needed = {"data.n": ["n"]}
    folder = make(tmp_path / "set", files=3, rows=11)
    for file in folder.rglob("*.parquet"):
        data = bytearray(file.read_bytes())
        start = pq.ParquetFile(file).metadata.row_group(0).column(0).data_page_offset
        data[start : start + 20] = bytes(20)  # what is not read need not be whole
        file.write_bytes(data)
    assert TabularDataset(str(folder)).length(needed) == 33
    assert TabularDataset("owner/set").length(needed) is None
    with pytest.raises(UserError, match=r"has no column m: name it with data.m=<column>; it has n, picture, more"):
        TabularDataset(str(folder)).length({"data.m": ["m"]})


def test_what_is_kept_is_told_by_content_and_not_by_place(tmp_path):
    path = make(tmp_path / "set")
    numbers(extract(path, tmp_path / "cache"))
    shutil.move(path, tmp_path / "elsewhere")
    assert (
        numbers(extract(tmp_path / "elsewhere", tmp_path / "cache")) and len(list((tmp_path / "cache").iterdir())) == 1
    )
    make(tmp_path / "elsewhere", rows=11)
    assert 43 in numbers(extract(tmp_path / "elsewhere", tmp_path / "cache"))


def test_rows_that_are_left_out_are_counted_and_named(tmp_path):
    path = make(tmp_path / "set", files=1, rows=50)
    tally = Tally(named=("seventh",))
    list(tally.kept(extract(path, tmp_path / "cache").rows(None, "pictures")))
    places = "; ".join(f"row {n} of train-00000-of-00001.parquet" for n in (0, 7, 14, 21, 28))
    assert str(tally) == f"50 rows read; left out: 8 seventh ({places} …)"


def test_when_nothing_can_be_used_that_is_said_before_all_is_read(tmp_path):
    path = make(tmp_path / "set", rows=300)
    with pytest.raises(UserError, match=r"the first 1000 rows, up to row .* of .*parquet, are all of no use"):
        numbers(extract(path, tmp_path / "cache", picking=lambda row, where: "of no use"))


def test_the_room_is_said_once_it_is_known_and_refused_where_it_is_not_there(tmp_path, monkeypatch, capsys):
    path = make(tmp_path / "set", rows=20)
    numbers(extract(path, tmp_path / "cache"), 50)
    assert "50 pictures take about" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10))
        with pytest.raises(UserError, match=r"50 pictures need about .* cache_dir=<folder>"):
            numbers(extract(path, tmp_path / "full"), 50)
        assert len(numbers(extract(path, tmp_path / "few"), 20)) == 20  # which are not measured
    assert len(numbers(extract(path, tmp_path / "full"), 50)) == 50


def test_a_full_disk_keeps_what_is_complete(tmp_path, monkeypatch):
    path = make(tmp_path / "set")
    write_bytes, left = Path.write_bytes, iter(range(7))

    def full(self: Path, data: bytes) -> int:
        if next(left, None) is None:
            raise OSError(28, "No space left on device")
        return write_bytes(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(UserError, match=r"No space left on device.*what is complete is kept"):
            numbers(extract(path, tmp_path / "cache"))
    assert len(list((tmp_path / "cache").rglob("images/*/*"))) == 7
    numbers(extract(path, tmp_path / "cache"))
    numbers(extract(path, tmp_path / "whole"))
    assert tree(tmp_path / "cache") == tree(tmp_path / "whole")


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"cannot be written .* cache_dir=<folder>"):
        numbers(extract(make(tmp_path / "set"), tmp_path / "cache"))


def test_a_file_that_is_damaged_inside_is_named_and_the_rows_before_are_kept(tmp_path):
    path = make(tmp_path / "set", files=1, rows=30)
    (file,) = path.rglob("*.parquet")
    data = bytearray(file.read_bytes())
    data[len(data) // 3 : len(data) // 3 + 40] = bytes(40)
    file.write_bytes(data)
    with pytest.raises(UserError, match=f"{path} cannot be read"):
        numbers(extract(path, tmp_path / "cache"))


@pytest.mark.parametrize(
    "line", [b"nonsense", b"\xff", b"[" * 100_000, b"[]", b'{"a": 1}', b'"end"', b'{"file": 0, "row": 0}', b"null"]
)
@pytest.mark.parametrize("number", [0, 4])
def test_a_log_is_read_anew_from_a_damaged_line_on(line, number, tmp_path, capsys):
    path = make(tmp_path / "set")
    first = numbers(extract(path, tmp_path / "cache"), 8)
    whole = tree(tmp_path / "cache")
    (log,) = (tmp_path / "cache").rglob("rows.jsonl")
    lines = log.read_bytes().split(b"\n")
    log.write_bytes(b"\n".join([*lines[:number], line, *lines[number + 1 :]]))
    assert there(extract(path, tmp_path / "cache"), 8) is None
    capsys.readouterr()
    assert numbers(extract(path, tmp_path / "cache"), 8) == first and tree(tmp_path / "cache") == whole
    assert f"{log} is damaged behind byte {sum(map(len, lines[:number])) + number}" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b'{"commit": 5}', None])
def test_without_the_commit_that_it_is_of_an_extract_begins_anew(content, tmp_path, capsys):
    path = make(tmp_path / "set")
    numbers(extract(path, tmp_path / "cache"), 5)
    (about,) = (tmp_path / "cache").rglob("of.json")
    about.unlink() if content is None else about.write_bytes(content)
    capsys.readouterr()
    assert len(numbers(extract(path, tmp_path / "cache"), 9)) == 9
    assert f"{about} is damaged or gone" in capsys.readouterr().out
    numbers(extract(path, tmp_path / "other"), 9)
    assert tree(tmp_path / "cache") == tree(tmp_path / "other")


def test_a_damaged_picture_is_no_picture_where_the_log_is_damaged_too(tmp_path):
    path, cache = make(tmp_path / "set"), tmp_path / "cache"
    numbers(extract(path, cache), 20)
    whole = tree(cache)
    next(cache.rglob("images/*/*")).write_bytes(b"?")
    next(cache.rglob("rows.jsonl")).write_bytes(b"?\n")
    numbers(extract(path, cache), 20)
    assert tree(cache) == whole


def test_pictures_that_are_damaged_or_gone_are_read_again_and_no_others(tmp_path, capsys):
    path, cache = make(tmp_path / "set"), tmp_path / "cache"
    first = numbers(extract(path, cache), 20)
    whole = tree(cache)
    pictures = sorted(cache.rglob("images/*/*"))
    pictures[3].write_bytes(pictures[3].read_bytes()[:-1] + b"?")
    pictures[7].unlink()
    assert there(extract(path, cache), 20) is None
    capsys.readouterr()
    kept = list(Tally(named=()).kept(extract(path, cache).rows(20, "pictures")))
    assert [entry["n"] for entry in kept] == first and tree(cache) == whole
    said = capsys.readouterr().out
    assert "2 pictures in" in said and "are damaged or gone, and are read anew" in said
    again = extract(path, cache, picking=lambda *_: pytest.fail("read again"))
    assert numbers(again, 20) == first


def test_processes_that_want_the_same_wait_for_each_other(tmp_path):
    path = make(tmp_path / "set")
    numbers(extract(path, tmp_path / "whole"))
    children = []
    for _ in range(3):
        if not (child := os.fork()):
            code = 1
            try:
                code = 0 if len(numbers(extract(path, tmp_path / "cache"))) == 34 else 2
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    assert tree(tmp_path / "cache") == tree(tmp_path / "whole")


def test_pictures_of_a_dataset_are_bytes_in_one_form_or_another(tmp_path):
    (tmp_path / "a.png").write_bytes(b"there")
    assert image_bytes(b"bytes", "jpg", "row 0") == b"bytes" == image_bytes({"bytes": b"bytes", "path": "x"}, "", "")
    assert image_bytes({"bytes": None, "path": f"file://{tmp_path}/a.png"}, "jpg", "row 0") == b"there"
    assert image_bytes({"bytes": None, "path": None}, "", "") is None is image_bytes(b"", "", "")
    with pytest.raises(UserError, match="row 3 of a: column url holds str, not pictures"):
        image_bytes("https://example.com/a.png", "url", "row 3 of a")


# ------------------------------------------------------------------------------------------------------------- the Hub


@pytest.fixture
def hub(tmp_path, monkeypatch) -> list[str]:
    """A repository `owner/set`, served from a folder; what is asked of it."""
    folder, asked = make(tmp_path / "on the hub"), []
    load = datasets.load_dataset_builder

    def builder(path: str, revision: str | None = None, **settings: Any) -> Any:
        assert (path, revision) == ("owner/set", "c0ffee")
        asked.append("rows")
        return load(str(folder))

    def info(self: Any, path: str, revision: str | None, timeout: float) -> Any:
        asked.append(f"commit of {revision}")
        return SimpleNamespace(sha="c0ffee")

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    return asked


def test_a_repository_is_asked_only_for_what_is_not_there_and_stays_at_its_first_commit(hub, tmp_path):
    cache = tmp_path / "cache"
    first = numbers(extract("owner/set", cache, revision="main"), 5)
    assert hub == ["commit of main", "rows"]
    assert numbers(extract("owner/set", cache, revision="main"), 5) == first
    assert hub == ["commit of main", "rows"]
    assert numbers(extract("owner/set", cache, revision="main"), 9)[:5] == first
    assert hub == ["commit of main", "rows", "rows"]
    (about,) = cache.rglob("of.json")
    assert json.loads(about.read_text()) == {"path": "owner/set", "split": "train", "commit": "c0ffee"}


def test_what_was_fetched_of_a_repository_is_known_without_asking(hub, tmp_path):
    cache = tmp_path / "cache"
    assert there(extract("owner/set", cache), 5) is None and not cache.exists()
    first, asked = numbers(extract("owner/set", cache), 5), list(hub)
    assert there(extract("owner/set", cache), 5) == first and there(extract("owner/set", cache), 6) is None
    assert hub == asked


def test_columns_and_splits_that_a_repository_lacks_are_named(hub, tmp_path):
    source = Extract(TabularDataset("owner/set"), tmp_path / "cache", {"data.image": ["image"]}, [], pick, None, 0)
    with pytest.raises(
        UserError, match=r"owner/set has no column image: name it with data.image=<column>; it has n, pict"
    ):
        list(source.rows(3, "pictures"))
    with pytest.raises(UserError, match=r"owner/set has no split test: it has train; write data.split=<one of them>"):
        numbers(extract("owner/set", tmp_path / "cache", split="test"), 3)


def test_a_connection_that_breaks_keeps_what_came(hub, tmp_path):
    def breaking(row: dict[str, Any], where: str) -> dict[str, Any] | str:
        if len(list((tmp_path / "cache").rglob("images/*/*"))) == 3:
            raise ConnectionError("reset by peer")
        return pick(row, where)

    with pytest.raises(UserError, match=r"reset by peer.*start again with a network, which goes on where this ended"):
        numbers(extract("owner/set", tmp_path / "cache", picking=breaking), 8)
    numbers(extract("owner/set", tmp_path / "cache"), 8)
    numbers(extract("owner/set", tmp_path / "whole"), 8)
    assert tree(tmp_path / "cache") == tree(tmp_path / "whole")


def test_without_a_network_it_ends_in_seconds_with_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        numbers(extract("liuhuohuo2/pick-a-pic-v2", tmp_path / "cache"), 3)
    assert time.monotonic() - start < 5
    assert "liuhuohuo2/pick-a-pic-v2: HF_HUB_OFFLINE is set" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [HTTPError("Name or service not known"), TimeoutError("timed out")])
def test_a_network_that_leads_nowhere_is_one_line(error, tmp_path, monkeypatch):
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    with pytest.raises(UserError, match=r"owner/set: the Hub cannot be read \(.*\); start again with a network"):
        numbers(extract("owner/set", tmp_path / "cache"), 3)


@pytest.mark.parametrize(
    ("status", "code", "what"),
    [
        (401, "RepoNotFound", "the Hub has no public dataset owner/set"),
        (403, "GatedRepo", "owner/set asks for consent: accept its terms on its page, then hf auth login"),
        (404, "RevisionNotFound", "owner/set has no revision v9"),
        (500, "", "the Hub cannot be read"),
    ],
)
def test_what_the_hub_refuses_is_one_line(status, code, what, tmp_path, monkeypatch):
    http = sys.modules[Response.__module__.partition(".")[0]]  # whichever the Hub's library uses

    def refuse(*_: Any, **__: Any) -> None:
        request = http.Request("GET", "https://huggingface.co/api/datasets/owner/set")
        hf_raise_for_status(http.Response(status, headers={"x-error-code": code}, request=request))

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    with pytest.raises(UserError) as caught:
        numbers(extract("owner/set", tmp_path / "cache", revision="v9"), 3)
    assert what in str(caught.value) and "\n" not in str(caught.value)


def test_a_gated_repository_is_told_from_one_that_is_not_there(hub, tmp_path, monkeypatch):
    from datasets.exceptions import DatasetNotFoundError

    def gated(*_: Any, **__: Any) -> None:
        raise DatasetNotFoundError("TabularDataset 'owner/set' is a gated dataset on the Hub.")

    monkeypatch.setattr(datasets, "load_dataset_builder", gated)
    with pytest.raises(UserError, match="asks for consent"):
        numbers(extract("owner/set", tmp_path / "cache"), 3)
