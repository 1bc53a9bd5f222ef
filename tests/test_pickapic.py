"""The parquet file for others: Pick-a-Pic's columns, whole or not at all."""

from __future__ import annotations

import hashlib
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dpo_sd.errors import UserError
from dpo_sd.files.hashes import read_sha256
from dpo_sd.preferences.events import Choice, vote
from dpo_sd.preferences.log import ANNOTATIONS, EventLog
from dpo_sd.preferences.metadata import METADATA
from dpo_sd.preferences.pair_folder import Pair, pair_id, write_pairs
from dpo_sd.preferences.parquet import export_pickapic


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    """A folder of 70 pairs with images, two pairs a prompt: by index image_0, image_1, tie, both bad and so on."""
    pairs = []
    for i in range(70):
        names = f"images/{i}-0.png", f"images/{i}-1.jpg"
        for k, name in enumerate(names):
            (tmp_path / "images").mkdir(exist_ok=True)
            Image.new("RGB", (8, 8), (i, k, 0)).save(tmp_path / name)
        prompt = f"prompt {i // 2}"
        uids = read_sha256(tmp_path / names[0]), read_sha256(tmp_path / names[1])
        ranking = f"set {i // 2}" if i < 4 else None
        pairs.append(Pair(pair_id(prompt, *uids), prompt, *names, *uids, ranking, "tiny", "tiny + style:0.8"))
    write_pairs(tmp_path, pairs)
    choices: list[Choice] = ["image_0", "image_1", "tie", "both_bad"]
    with closing(EventLog(tmp_path)) as log:
        for i, pair in enumerate(pairs):
            decided_at = f"2031-05-17T09:{i // 60:02}:{i % 60:02}.125Z"
            log.append([vote(pair, choices[i % 4], "image_0", "ann", decided_at=decided_at)])
    return tmp_path


COLUMNS = {  # of yuvalkirstain/pickapic_v2
    "are_different": "bool",
    "best_image_uid": "string",
    "caption": "string",
    "created_at": "timestamp[ns]",
    "has_label": "bool",
    "image_0_uid": "string",
    "image_0_url": "string",
    "image_1_uid": "string",
    "image_1_url": "string",
    "jpg_0": "binary",
    "jpg_1": "binary",
    "label_0": "double",
    "label_1": "double",
    "model_0": "string",
    "model_1": "string",
    "ranking_id": "int64",
    "user_id": "int64",
    "num_example_per_prompt": "int64",
    "__index_level_0__": "int64",
}


def test_the_export_has_the_columns_of_pick_a_pic_and_the_files_own_bytes(drawn: Path):
    assert export_pickapic(drawn, drawn / "out/pairs.parquet") == 36
    table = pq.read_table(drawn / "out/pairs.parquet")
    assert {field.name: str(field.type) for field in table.schema} == COLUMNS
    assert sum(column.null_count for column in table.columns) == 0
    row = table.to_pylist()[1]
    jpg_1 = (drawn / "images/1-1.jpg").read_bytes()
    assert (row["jpg_0"], row["jpg_1"]) == ((drawn / "images/1-0.png").read_bytes(), jpg_1)
    assert (row["label_0"], row["label_1"], row["has_label"], row["are_different"]) == (0.0, 1.0, True, True)
    assert row["best_image_uid"] == row["image_1_uid"] == hashlib.sha256(jpg_1).hexdigest()
    assert (row["caption"], row["model_1"], row["num_example_per_prompt"]) == ("prompt 0", "tiny + style:0.8", 2)
    assert row["created_at"].isoformat() == "2031-05-17T09:00:01.125000"
    assert table["ranking_id"].to_pylist()[:4] == [0, 0, 1, 2]
    assert table["__index_level_0__"].to_pylist() == list(range(36))


def test_ties_are_exported_on_request_with_half_labels(drawn: Path):
    assert export_pickapic(drawn, drawn / "pairs.parquet", ties=True) == 53
    rows = pq.read_table(drawn / "pairs.parquet").to_pylist()
    ties = [row for row in rows if row["label_0"] == 0.5]
    assert len(ties) == 17
    assert {(row["label_1"], row["best_image_uid"]) for row in ties} == {(0.5, "")}


def test_the_export_is_written_group_by_group_so_that_few_images_are_in_memory(drawn: Path):
    export_pickapic(drawn, drawn / "pairs.parquet", ties=True)
    metadata = pq.ParquetFile(drawn / "pairs.parquet").metadata
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [32, 21]


def test_the_datasets_library_reads_the_export(drawn: Path, tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    export_pickapic(drawn, drawn / "pairs.parquet")
    cache = str(tmp_path / "cache")
    data = datasets.load_dataset("parquet", data_files=str(drawn / "pairs.parquet"), split="train", cache_dir=cache)
    assert data.column_names == list(COLUMNS)
    assert data[0]["caption"] == "prompt 0"


def test_nothing_is_exported_when_an_image_is_missing_or_nothing_is_decided(drawn: Path):
    (drawn / "images/69-1.jpg").unlink()
    with pytest.raises(UserError, match=r"images/69-1\.jpg"):
        export_pickapic(drawn, drawn / "pairs.parquet")
    (drawn / ANNOTATIONS).write_text("")
    with pytest.raises(UserError, match="has no decided pair"):
        export_pickapic(drawn, drawn / "pairs.parquet")
    assert not list(drawn.glob("*.parquet"))


def test_pairs_with_a_picture_that_changed_since_it_was_judged_are_left_out_and_named(
    drawn: Path, caplog: pytest.LogCaptureFixture
):
    (drawn / "images/0-0.png").write_bytes((drawn / "images/1-0.png").read_bytes())
    assert export_pickapic(drawn, drawn / "pairs.parquet") == 35
    said = "left out 1 pairs with a picture that has changed since it was judged: images/0-0.png"
    assert caplog.messages == [said]


def test_an_export_that_fails_halfway_leaves_the_former_file(drawn: Path, monkeypatch: pytest.MonkeyPatch):
    (drawn / "pairs.parquet").write_text("former")
    write_table = pq.ParquetWriter.write_table

    def interrupted(writer: pq.ParquetWriter, table: pa.Table) -> None:
        write_table(writer, table)
        (drawn / "images/69-1.jpg").unlink(missing_ok=True)

    monkeypatch.setattr(pq.ParquetWriter, "write_table", interrupted)
    with pytest.raises(UserError, match=r"images/69-1\.jpg"):
        export_pickapic(drawn, drawn / "pairs.parquet")
    assert (drawn / "pairs.parquet").read_text() == "former"
    assert not list(drawn.glob(".*"))


def test_what_utf8_cannot_hold_is_escaped(tmp_path: Path):
    prompt, model = "first\nsecond 🦊 قطة \udcff", "lora \udcff"
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    pair = Pair(pair_id(prompt, "a", "b"), prompt, "0.png", "0.png", "a", "b", model_0=model)
    write_pairs(tmp_path, [pair])
    with closing(EventLog(tmp_path)) as log:
        log.append([vote(pair, "image_0", "image_0", "ann")])
    export_pickapic(tmp_path, tmp_path / "pairs.parquet")
    (row,) = pq.read_table(tmp_path / "pairs.parquet").to_pylist()
    assert (row["caption"], row["model_0"]) == ("first\nsecond 🦊 قطة \\udcff", "lora \\udcff")
    assert not row["are_different"]  # by the bytes of the files


def test_a_folder_with_the_five_keys_alone_is_exported_without_times(drawn: Path):
    (drawn / ANNOTATIONS).unlink()
    line = (
        '{"prompt": "p", "image_0": "images/0-0.png", "image_1": "images/0-1.jpg", "prefer_0": true, "prefer_1": false}'
    )
    (drawn / METADATA).write_text(line + "\n")
    assert export_pickapic(drawn, drawn / "pairs.parquet") == 1
    (row,) = pq.read_table(drawn / "pairs.parquet").to_pylist()
    assert (row["label_0"], row["created_at"], row["model_0"]) == (1.0, None, "")
