"""Pictures with captions: what is used, what is left out and said, and what is refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import unicodedata
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from dpo_sd.data.batches import Visits, stack
from dpo_sd.data.cache import Cache
from dpo_sd.data.captions import Captions, ShuffledTags
from dpo_sd.data.frames import Framing
from dpo_sd.data.source import Found
from dpo_sd.data.splitting import Split
from dpo_sd.errors import UserError
from dpo_sd.files import hashes, images
from dpo_sd.models.base import Base
from dpo_sd.models.sampling import Sampler
from dpo_sd.noise import generator


@pytest.fixture(autouse=True)
def memory(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DPO_SD_CACHE", str(tmp_path / "memory"))


def picture(number: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, (number * 20 % 256, number, 100))


def as_bytes(number: int) -> bytes:
    buffer = io.BytesIO()
    picture(number).save(buffer, "PNG")
    return buffer.getvalue()


def make(folder: Path, captions: Mapping[str, str | None], first: int = 0) -> Path:
    """A picture of its own by each name, with its caption in a .txt file unless that is None."""
    for number, (name, caption) in enumerate(captions.items(), start=first):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(file, "PNG")
        if caption is not None:
            file.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return folder


def ten(folder: Path) -> Path:
    return make(folder, {f"{i}.png": f"caption {i}" for i in range(10)})


def fetched(path: Path, cache: Path, **settings: Any) -> Split:
    """The samples, as a training would have them."""
    split = Captions(str(path), **settings).look(Cache(cache), fetch=True)
    assert isinstance(split, Split)
    return split


def found(folder: Path, **settings: Any) -> Split:
    """The same of a folder of pictures, for which there is nothing to fetch."""
    return fetched(folder, Path("nowhere"), **settings)


def captions(found: Split) -> dict[str, str]:
    """Caption by picture, of all samples."""
    parts = (found.train, found.validation)
    return {path: prompt for part in parts for path, prompt in zip(part.chosen.paths, part.prompts, strict=True)}


def refused(folder: Path, **settings: Any) -> str:
    """The message, which comes before anything is fetched."""
    with pytest.raises(UserError) as caught:
        Captions(str(folder), **settings).find(Cache(Path("nowhere")), fetch=False)
    return str(caught.value)


def said(found: Split | Found) -> str:
    return "\n".join(found.report)


def test_each_picture_has_the_text_file_of_its_name(tmp_path):
    folder = make(
        tmp_path / "photos", {"a.png": "a fox\n", "b/c.jpeg": "a cat,\n asleep", "b/d.e.webp": "\ufeffein Bär"}
    )
    assert captions(found(folder)) == {"a.png": "a fox", "b/c.jpeg": "a cat, asleep", "b/d.e.webp": "ein Bär"}


def test_endings_may_be_in_capitals(tmp_path):
    folder = make(tmp_path / "photos", {"A.PNG": None, "b.JpG": "b"})
    (folder / "A.TXT").write_text("a")
    assert captions(found(folder)) == {"A.PNG": "a", "b.JpG": "b"}


def test_what_begins_with_a_dot_is_not_seen(tmp_path):
    folder = make(tmp_path / ".photos", {"a.png": "a", "b.png": "b", "._a.png": None, ".cache/c.png": None})
    assert sorted(captions(found(folder))) == ["a.png", "b.png"]


def test_pictures_without_caption_and_captions_without_picture_are_counted_and_named(tmp_path):
    folder = make(ten(tmp_path / "photos"), {f"bare {i}.png": None for i in range(7)}, first=10)
    (folder / "lonely.txt").write_text("x")
    (folder / "scan.heic").write_text("x")
    report = found(folder).report
    assert report[0] == f"{folder}: 17 pictures, 11 captions in .txt files"
    first = "; ".join(f"bare {i}.png" for i in range(5))
    assert report[1] == f"left out 7 of 17 without a caption: {first} …"
    assert report[2] == "left out 1 of 11 captions without a picture: lonely.txt"
    assert report[3] == "not read: 1 .heic"
    assert len(captions(found(folder))) == 10


def test_most_captions_missing_is_refused_and_half_of_them_is_not(tmp_path):
    folder = make(tmp_path / "photos", {"a.png": "a", "b.png": "b", "c.png": None, "d.png": None})
    assert len(captions(found(folder))) == 2
    make(folder, {"e.png": None}, first=9)
    (folder / "lonely.txt").write_text("x")
    for settings in ({}, {"trigger": "sks"}):
        message = refused(folder, **settings)
        assert "3 of 5 pictures" in message and "c.png, d.png, e.png" in message and "lonely.txt" in message


def test_a_trigger_stands_in_front_of_every_caption(tmp_path):
    folder = make(tmp_path / "photos", {"a.png": "a fox", "b.png": ""})
    both = found(folder, trigger="sks style,")
    assert captions(both) == {"a.png": "sks style, a fox", "b.png": "sks style"}
    assert "1 pictures have an empty caption and are trained on the trigger alone: b.png" in said(both)
    assert "trained on the empty prompt: b.png" in said(found(folder))


def test_a_trigger_alone_serves_pictures_without_any_captions(tmp_path):
    folder = make(tmp_path / "photos", {"a.png": None, "b.png": None, "c.png": None})
    assert "data.trigger=<phrase>" in refused(folder)
    assert set(captions(found(folder, trigger="sks dog")).values()) == {"sks dog"}


def test_two_pictures_of_one_name_are_refused_and_so_are_two_captions(tmp_path):
    folder = make(tmp_path / "photos", {"a.jpg": "a", "a.png": None, "b.png": "b"})
    assert "a.jpg and a.png" in refused(folder) and "a.txt" in refused(folder)
    (folder / "a.png").unlink()
    (folder / "b.TXT").write_text("b")
    assert "b.TXT and b.txt" in refused(folder)


@pytest.mark.parametrize("image", ["file_name", "image"])
@pytest.mark.parametrize("text", ["text", "caption"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_metadata_file_has_the_captions(kind, image, text, tmp_path):
    folder = make(tmp_path / "photos", {"a.png": None, "b/c.png": None, "d.png": "of no use"})
    rows = [("a.png", "a fox, red"), ("./b/c.png", 'a "cat"'), ("gone.png", "x")]
    if kind == "jsonl":
        lines = [json.dumps({image: name, text: caption, "more": 1}) for name, caption in rows]
    else:
        lines = [f"more,{image},{text}", '1,a.png,"a fox, red"', '1,./b/c.png,"a ""cat"""', "1,gone.png,x"]
    (folder / f"metadata.{kind}").write_text("\n".join(lines) + "\n")
    if kind == "parquet":
        pq.write_table(
            pa.Table.from_pylist([{image: name, text: caption} for name, caption in rows]), folder / "metadata.parquet"
        )
    both = found(folder)
    assert captions(both) == {"a.png": "a fox, red", "b/c.png": 'a "cat"'}
    assert "without a caption: d.png" in said(both) and "without a picture: gone.png" in said(both)
    assert "not read: 1 .txt" in said(both)


def test_a_metadata_file_may_have_other_columns_and_rows_without_text(tmp_path):
    folder = make(tmp_path / "photos", {"a.png": None, "b.png": None})
    rows = [{"photo": "a.png", "alt": "a"}, {"photo": "b.png", "alt": None}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert captions(found(folder, image_column="photo", text_column="alt")) == {"a.png": "a"}
    message = refused(folder, text_column="alt")
    assert "line 1 of" in message and "data.image_column=<column>" in message and "it has photo, alt" in message


def test_rows_may_lack_the_text_or_have_it_in_another_column(tmp_path):
    names = ["a.png", "b.png", "c.png", "d.png", "e.png"]
    texts = [{"text": "a"}, {}, {"text": None, "caption": "c"}, {"caption": "d", "text": float("nan")}, {"text": None}]
    rows = [{"file_name": name} | text for name, text in zip(names, texts, strict=True)]
    for kind in ("jsonl", "parquet"):
        folder = make(tmp_path / kind, dict.fromkeys(names))
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        if kind == "parquet":
            (folder / "metadata.jsonl").unlink()
            pq.write_table(
                pa.table({"file_name": names, "text": ["a", *[None] * 4], "caption": [None, None, "c", "d", None]}),
                folder / "metadata.parquet",
            )
        assert captions(found(folder)) == {"a.png": "a", "c.png": "c", "d.png": "d"}
        assert "left out 2 of 5 without a caption: b.png; e.png" in said(found(folder))


def test_a_blank_may_stand_before_the_quotes_of_a_table_and_a_text_may_be_long(tmp_path):
    folder = make(tmp_path / "photos", {"a.png": None, "b.png": None})
    long = "x " * 100_000
    (folder / "metadata.csv").write_text(f'file_name, text\na.png, "a fox, red"\nb.png,"{long}"\n')
    assert captions(found(folder)) == {"a.png": "a fox, red", "b.png": long.strip()}


def test_names_that_lead_back_into_the_folder_are_found_also_from_a_folder_in_it(tmp_path):
    folder = make(tmp_path / "photos", {"a.png": None, "b/c.png": None, "d.png": None})
    for place, rows in (
        (folder, {str(folder / "a.png"): "a"}),
        (folder / "b", {"gone/../C.png": "c", "../d.png": "d", "../../photos.png": "x"}),
    ):
        lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows.items()]
        (place / "metadata.jsonl").write_text("\n".join(lines))
    both = found(folder)
    assert captions(both) == {"a.png": "a", "b/c.png": "c", "d.png": "d"}
    assert "without a picture: b/../../photos.png" in said(both)


def test_a_pipe_is_passed_over_and_named(tmp_path):
    folder = make(tmp_path / "photos", {"a.png": "a", "b.png": None})
    for name in ("b.txt", "c.png", "metadata.csv"):
        os.mkfifo(folder / name)
    both = found(folder)
    assert captions(both) == {"a.png": "a"}
    plain = "which is no plain file"
    assert f"passed over: b.txt, {plain}, c.png, {plain}, metadata.csv, {plain}" in said(both)


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("metadata.jsonl", '{"image": "a.png", "text": "a"}\n{"image": ', "metadata.jsonl, line 2: not JSON"),
        ("metadata.jsonl", "[1]\n", "line 1: not a JSON object: write one whole object a line, without the brackets"),
        (
            "metadata.jsonl",
            '{"image": "a.png", "text": "a"},\n',
            "line 1: not JSON .* one whole object a line, without the",
        ),
        ("metadata.jsonl", '{"image": "a.png", "text": ["a"]}\n', r"line 1 of .* got 'a.png' and \['a'\]"),
        ("metadata.jsonl", '{"image_0": "a.png", "image_1": "b.png", "caption": "a"}\n', "data=pairs data.pairs="),
        ("metadata.csv", "file_name\na.png\n", "no column text or caption"),
        (
            "metadata.csv",
            "file_name,text\na.png,a fox, asleep\n",
            "line 2 of .*csv has 3 values for the 2 columns .* quotes",
        ),
        ("metadata.csv", "file_name,text\na.png,a fox\nasleep\n", "line 3 of .*csv has 1 values for the 2 columns"),
        ("metadata.csv", "file_name;text\na.png;a;b\n", "line 2 of .*csv has 3 values .* that hold ';'"),
        (
            "metadata.csv",
            'file_name,text\na.png,"a fox\nb.png,a cat\n',
            "line 2 of .*csv cannot be read .* close the double",
        ),
        ("metadata.csv", 'file_name,text\na.png,"a "red" fox"\n', "line 2 of .*csv cannot be read .* close the double"),
        (
            "metadata.jsonl",
            '{"text": "a"}\n{"image": "a.png", "text": "a"}\n',
            "line 1 of .* picture and caption must be",
        ),
        ("metadata.csv", "file_name,text,text\na.png,a,b\n", "line 1 of .*csv names the column text twice"),
        ("metadata.parquet", b"none", "metadata.parquet is no parquet file"),
        ("a.txt", b"\xff\xfe\x00", "a.txt is no text in UTF-8"),
        ("a.txt", b"a fox\nin a caf\xe9", "a.txt is no text in UTF-8 .line 2, offset 14: byte 0xe9.: save it as UTF-8"),
        ("a.txt", "a fox".encode("utf-16-le"), "a.txt is no text in UTF-8 .line 1 has a zero byte"),
    ],
)
def test_a_file_of_captions_that_cannot_be_read_is_named(name, content, what, tmp_path):
    folder = ten(tmp_path / "photos")
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (folder / "a.png").write_bytes((folder / "1.png").read_bytes())
    with pytest.raises(UserError, match=what):
        found(folder)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_table_is_read_as_programs_export_it(encoding, delimiter, tmp_path):
    folder = make(tmp_path / "photos", {"a.png": None, "b.png": None, "c.png": None})
    lines = ["file_name|text ", 'a.png|"ein Bär, rot; alt\tund\r\nmüde"', "b.png|a fox", "", "c.png|"]
    (folder / "metadata.csv").write_bytes("\r\n".join(lines).replace("|", delimiter).encode(encoding))
    assert captions(found(folder)) == {"a.png": "ein Bär, rot; alt und müde", "b.png": "a fox", "c.png": ""}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_part_of_a_text(encoding, tmp_path):
    folder = make(tmp_path / "texts", {"a.png": None})
    (folder / "a.txt").write_bytes("ein Bär".encode(encoding))
    assert captions(found(folder)) == {"a.png": "ein Bär"}
    folder = make(tmp_path / "rows", {"a.png": None})
    line = json.dumps({"file_name": "a.png", "text": "ein Bär"}, ensure_ascii=False)
    (folder / "metadata.jsonl").write_bytes(f"{line}\r\n".encode(encoding))
    assert captions(found(folder)) == {"a.png": "ein Bär"}


def test_caption_files_are_read_beside_text_files_which_come_first(tmp_path):
    folder = make(tmp_path / "photos", {"a.png": "a fox", "b.png": None, "c/d.png": None})
    (folder / "a.caption").write_text("of no use")
    (folder / "b.caption").write_text("a bear")
    (folder / "c/d.CAPTION").write_text("a cat")
    both = found(folder)
    assert captions(both) == {"a.png": "a fox", "b.png": "a bear", "c/d.png": "a cat"}
    assert "3 captions in .caption and .txt files" in said(both) or "3 captions in .txt and .caption files" in said(
        both
    )
    assert "not read: 1 .caption" in said(both)


def test_a_metadata_file_rules_its_own_folder_and_text_files_the_others(tmp_path):
    names = ("train/a.png", "train/more/b.png", "test/c.png")
    folder = make(tmp_path / "photos", dict.fromkeys(names) | {"train/more/b.png": "of no use", "mine/d.png": "a dog"})
    for place, rows in {"train": {"a.png": "a fox", "more/b.png": "a bear"}, "test": {"c.png": "a cat"}}.items():
        lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows.items()]
        (folder / place / "metadata.jsonl").write_text("\n".join(lines))
    both = found(folder)
    assert captions(both) == {
        "train/a.png": "a fox",
        "train/more/b.png": "a bear",
        "test/c.png": "a cat",
        "mine/d.png": "a dog",
    }
    assert "4 pictures, 4 captions in test/metadata.jsonl, train/metadata.jsonl, .txt files" in said(both)
    assert "not read: 1 .txt" in said(both)


def test_what_lies_there_unread_is_named_where_captions_are_missing(tmp_path):
    folder = make(tmp_path / "photos", {"a.png": None})
    (folder / "a.wd14").touch()
    assert "not read: 1 .wd14" in refused(folder)


def test_linked_folders_are_read_once_and_circles_end(tmp_path):
    folder = make(tmp_path / "photos", {"a.png": "a fox", "own/b.png": "a bear"})
    make(tmp_path / "elsewhere", {"c.png": "a cat", "d/e.png": "a dog"}, first=5)
    (folder / "a linked one").symlink_to(tmp_path / "elsewhere")
    (folder / "all again").symlink_to(folder)
    (folder / "b again").symlink_to("own")
    (tmp_path / "elsewhere/d/back").symlink_to(folder / "own")
    both = found(folder)
    assert captions(both) == {
        "a.png": "a fox",
        "own/b.png": "a bear",
        "a linked one/c.png": "a cat",
        "a linked one/d/e.png": "a dog",
    }
    (line,) = [line for line in both.report if line.startswith("passed over")]
    assert all(name in line for name in ("all again", "b again", "a linked one/d/back"))


def test_a_folder_that_cannot_be_read_is_refused_by_name(tmp_path, monkeypatch):
    folder = make(tmp_path / "photos", {"a.png": "a", "secret/b.png": "b"})
    scandir = os.scandir

    def closed(path: Any = ".") -> Any:
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    assert "photos/secret cannot be read: Permission denied" in refused(folder)


def test_numbers_for_repeats_in_names_of_folders_are_said_not_to_count(tmp_path):
    folder = make(tmp_path / "photos", {"10_style/a.png": "a fox", "2_other/b.png": "a bear", "c_3/c.png": "a cat"})
    both = found(folder)
    assert len(captions(both)) == 3
    assert (
        "Kohya's repeats in names of folders do not count: 10_style, 2_other; data.path=[<folder>:10] repeats"
        in both.report
    )


@pytest.mark.parametrize(("on_disk", "written"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_an_accent_is_one_character_or_two(on_disk, written, tmp_path):
    names = {f"für/café {i}.png": f"caption {i}" for i in range(3)}
    disk, text = (
        {unicodedata.normalize(form, name): caption for name, caption in names.items()} for form in (on_disk, written)
    )
    folder = make(tmp_path / "rows", dict.fromkeys(disk))
    lines = [json.dumps({"file_name": name, "text": caption}, ensure_ascii=False) for name, caption in text.items()]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert captions(found(folder)) == disk
    folder = make(tmp_path / "texts", dict.fromkeys(disk))
    for name, caption in text.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).with_suffix(".txt").write_text(caption)
    assert captions(found(folder)) == disk


def test_names_from_windows_are_found_and_those_that_lead_elsewhere_are_named(tmp_path):
    folder = make(tmp_path / "photos", {"a/b.png": None, "c.png": None})
    picture(9).save(tmp_path / "outside.png")
    rows = {"a\\b.png": "a fox", " c.png ": "a bear", "../outside.png": "x", str(tmp_path / "outside.png"): "y"}
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows.items()]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    both = found(folder)
    assert captions(both) == {"a/b.png": "a fox", "c.png": "a bear"}
    assert f"2 of 4 captions without a picture: ../outside.png; {tmp_path}/outside.png" in said(both)


def test_a_name_that_is_not_utf_8_is_passed_over_and_printed(tmp_path):
    folder = make(tmp_path / "photos", {"a.png": "a fox"})
    for name in (b"caf\xe9.png", b"caf\xe9.txt", b"m\xfcll/b.png"):
        file = os.path.join(os.fsencode(folder), name)
        os.makedirs(os.path.dirname(file), exist_ok=True)
        with open(file, "wb") as opened:
            opened.write(as_bytes(1))
    both = found(folder)
    assert captions(both) == {"a.png": "a fox"}
    assert (
        said(both).encode() and r"caf\udce9.png, whose name is not UTF-8" in said(both) and r"m\udcfcll" in said(both)
    )


def test_a_caption_that_is_there_twice_counts_once_and_several_of_one_picture_are_said(tmp_path):
    folder = make(tmp_path / "photos", {"a.png": None, "b.png": None})
    rows = [("a.png", "a fox"), ("b.png", "a cat"), ("./a.png", "a fox"), ("b.png", "a tiger")]
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    both = found(folder, validation=0)
    assert sorted(both.train.prompts) == ["a cat", "a fox", "a tiger"]
    assert "1 captions are there a second time and count once" in both.report
    assert "1 pictures have several captions and count once with each: b.png" in both.report


def test_half_of_a_character_is_read_as_a_replacement_and_said(tmp_path):
    folder = make(tmp_path / "photos", {"a.png": None, "b.png": None})
    lines = ['{"file_name": "a.png", "text": "a fox \\ud83e"}', '{"file_name": "b.png", "text": "a \\ud83e\\udd8a"}']
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    both = found(folder)
    assert captions(both) == {"a.png": "a fox �", "b.png": "a 🦊"}
    assert r"1 prompts hold half of a character, which is read as �: 'a fox \ud83e'" in both.report


def test_a_picture_that_may_not_be_read_is_left_out_and_named(tmp_path, monkeypatch):
    folder = make(tmp_path / "photos", {"a.png": "a", "b.png": "b", "c.png": "c"})
    read = hashes.read_sha256

    def denied(file: Any) -> str:
        if str(file).endswith("b.png"):
            raise PermissionError(13, "Permission denied")
        return read(file)

    monkeypatch.setattr(images, "read_sha256", denied)
    both = found(folder)
    assert sorted(captions(both)) == ["a.png", "c.png"]
    assert "left out 1 of 3 that cannot be read" in said(both) and "b.png cannot be read: Permission denied" in said(
        both
    )
    monkeypatch.undo()
    assert len(captions(found(folder))) == 3  # it was not remembered


def test_settings_that_do_not_fit_the_folder_are_refused(tmp_path):
    folder = ten(tmp_path / "photos")
    assert "validation must be a share above 0 and at most 0.5, or how many, from 1 on, got 0.6" in refused(
        folder, validation=0.6
    )
    assert "max_images must be at least 1" in refused(folder, max_images=0)
    assert "caption_dropout must be between 0 and 1" in refused(folder, caption_dropout=2)
    assert "no metadata.jsonl, metadata.csv or metadata.parquet for image_column" in refused(folder, text_column="alt")
    assert "has no revision=main" in refused(folder, revision="main")
    (folder / "metadata.jsonl").touch()
    (folder / "metadata.csv").touch()
    assert "metadata.csv and metadata.jsonl" in refused(folder)


def test_a_folder_without_pictures_says_what_it_has(tmp_path):
    (tmp_path / "photos").mkdir()
    assert "holds no picture" in refused(tmp_path / "photos")
    (tmp_path / "photos" / "a.HEIC").touch()
    assert "it has 1 .heic" in refused(tmp_path / "photos")
    assert "no such folder or file" in refused(tmp_path / "nowhere")


def test_pictures_that_cannot_be_read_are_left_out_and_named(tmp_path):
    folder = ten(tmp_path / "photos")
    (folder / "3.png").write_text("<html>gone")
    (folder / "4.png").write_bytes(b"")
    picture(5, (4000, 2)).save(folder / "5.png")
    both = found(folder)
    assert len(captions(both)) == 7 and "5.png has 4000 × 2 pixels" in said(both)
    assert "3.png is a web page" in said(both) and "4.png is empty" in said(both)
    for file in folder.glob("*.png"):
        file.write_bytes(b"")
    assert "no picture of" in refused(folder)


def test_training_and_validation_have_different_pictures_whatever_the_captions(tmp_path):
    folder = make(tmp_path / "photos", {f"{i}.png": "sks" for i in range(10)})
    (folder / "copy.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "copy.txt").write_text("the same picture")
    for seed in range(5):
        both = found(folder, seed=seed, validation=0.3)
        train, validation = (set(part.chosen.sha256) for part in (both.train, both.validation))
        assert len(validation) == 3 and not train & validation and len(train | validation) == 10
    splits = [set(found(folder, seed=seed, validation=0.3).validation.chosen.paths) for seed in (0, 0, 1)]
    assert splits[0] == splits[1] != splits[2]


@pytest.mark.parametrize(("n", "validation"), [(1, 0.1), (10, 0)])
def test_with_one_picture_or_on_request_all_are_trained_on(n, validation, tmp_path):
    folder = make(tmp_path / "photos", {f"{i}.png": "sks" for i in range(n)})
    both = found(folder, validation=validation)
    assert len(both.train) == n == len(both.validation)
    assert f"training: {n} pictures, none held back" in said(both)


def test_the_seed_chooses_max_images(tmp_path):
    folder = ten(tmp_path / "photos")
    chosen = [set(captions(found(folder, max_images=4, seed=seed))) for seed in (0, 0, 1)]
    assert len(chosen[0]) == 4 and chosen[0] == chosen[1] != chosen[2]


def test_tags_are_shuffled_behind_the_trigger():
    shuffled = ShuffledTags(kept=2)
    texts = {shuffled("sks, style, a, b c,d", generator(0, 1, draw, "text")) for draw in range(50)}
    assert len(texts) == 6 and all(text.startswith("sks, style, ") for text in texts)
    assert {frozenset(text.split(", ")[2:]) for text in texts} == {frozenset({"a", "b c", "d"})}
    assert pickle.loads(pickle.dumps(shuffled)) == shuffled  # for the processes that prepare batches
    assert shuffled("", generator(0, 1, 0, "text")) == ""


def test_tags_that_are_kept_stand_still_behind_the_trigger(tmp_path):
    source = Captions(str(ten(tmp_path / "photos")), trigger="sks, style", shuffle_tags=True, keep_tokens=1)
    data = source.prepare(Base().load(), Sampler(), Framing(), Cache(tmp_path / "cache", "latents"))
    assert data.train.vary == ShuffledTags(kept=3)
    texts = {ShuffledTags(3)("sks, style, a, b, c", generator(0, 1, draw, "text")) for draw in range(20)}
    assert texts == {"sks, style, a, b, c", "sks, style, a, c, b"}


# ------------------------------------------------------------------------------------------------------ several folders


def several(tmp_path: Path) -> tuple[Path, Path]:
    one = make(tmp_path / "one", {f"{i}.png": f"one {i}" for i in range(8)})
    return one, make(tmp_path / "two", {f"{i}.png": f"two {i}" for i in range(4)}, first=8)


def test_folders_stand_side_by_side_and_repeats_are_samples_with_noises_of_their_own(tmp_path):
    one, two = several(tmp_path)
    source = Captions([str(one), f"{two}:3"], trigger="sks", validation=3)
    split = source.look(Cache(tmp_path / "cache"), fetch=True)
    assert isinstance(split, Split)
    counts = Counter(split.train.prompts)
    assert {counts[prompt] for prompt in counts if "two" in prompt} == {3} and f"{two}: 3 times each" in split.report
    assert {counts[prompt] for prompt in counts if "one" in prompt} == {1}
    assert (
        split.found().both == 12
        and len(split.validation) == 3
        and len(counts) == 9
        and all(prompt.startswith("sks, ") for prompt in counts)
    )
    data = source.prepare(Base().load(), Sampler(), Framing(), Cache(tmp_path / "cache"))
    assert len(set(data.train.sample_ids.tolist())) == len(data.train) == len(split.train)
    alone = Captions(str(one), trigger="sks", validation=0).prepare(
        Base().load(), Sampler(), Framing(), Cache(tmp_path / "cache")
    )
    assert set(alone.train.sample_ids.tolist()) >= {
        int(i) for row, i in enumerate(data.train.sample_ids) if "one" in data.train.prompts[row]
    }


def test_regularisation_pictures_have_a_weight_no_trigger_and_are_never_held_back(tmp_path):
    one, two = several(tmp_path)
    both = found(one, trigger="sks", regularisation=f"{two}:2", regularisation_weight=0.5, validation=4)
    weights = {prompt: float(weight) for prompt, weight in zip(both.train.prompts, both.train.weight, strict=True)}
    assert {weight for prompt, weight in weights.items() if prompt.startswith("two ")} == {0.5}
    assert {weight for prompt, weight in weights.items() if prompt.startswith("sks, one")} == {1.0}
    assert len(both.validation) == 4 and all("one" in prompt for prompt in both.validation.prompts)
    assert len(both.train) == 4 + 2 * 4 and "regularisation: 8 pictures, weight 0.5" in both.report


def test_regularisation_pictures_without_captions_have_their_own_phrase(tmp_path):
    bare = make(tmp_path / "bare", {"a.png": None, "b.png": None}, first=20)
    one, _ = several(tmp_path)
    both = found(one, regularisation=str(bare), regularisation_trigger="a drawing")
    assert Counter(both.train.prompts)["a drawing"] == 2
    assert "bare have no caption" in refused(one, regularisation=str(bare))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": ["{one}", "{one}:2"]}, "names {one} twice"),
        ({"path": ["{one}:0"]}, "repeats are between 1 and 10000"),
        ({"path": []}, "path is empty"),
        ({"path": ["{one}", 3]}, "path must be a folder, or a list of folders"),
        ({"path": ["{one}", "some/set"]}, "some/set is no folder: of several sources, each is a folder of pictures"),
        ({"regularisation": "{one}"}, "is both path and regularisation"),
        ({"regularisation_weight": 0.5}, "are of pictures: add data.regularisation"),
        ({"regularisation": "{two}", "regularisation_weight": 0.0}, "regularisation_weight must be positive"),
        ({"keep_tokens": 1}, "keep_tokens=1 keeps tags from being shuffled: add data.shuffle_tags=true"),
        ({"keep_tokens": -1, "shuffle_tags": True}, "keep_tokens must be at least 0"),
    ],
)
def test_what_several_folders_cannot_be_is_refused(settings, message, tmp_path):
    one, two = several(tmp_path)

    def named(value: Any) -> Any:
        return (
            [named(each) for each in value]
            if isinstance(value, list)
            else (value.format(one=one, two=two) if isinstance(value, str) else value)
        )

    given: dict[str, Any] = {"path": str(one)} | {name: named(value) for name, value in settings.items()}
    with pytest.raises(UserError) as caught:
        Captions(**given).find(Cache(Path("nowhere")), fetch=False)
    assert message.format(one=one) in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------- masks


def masked(folder: Path, names: Mapping[str, tuple[int, int]]) -> Path:
    """A mask for each of those pictures, of that size: white on its left half, black on the right one."""
    for name, (width, height) in names.items():
        mask = Image.new("L", (width, height))
        mask.paste(255, (0, 0, width // 2, height))
        mask.save(folder / f"{name}-masklabel.png")
    return folder


def test_masks_are_no_pictures_and_what_is_not_read_is_said(tmp_path):
    folder = masked(ten(tmp_path / "photos"), {"3": (64, 64)})
    both = found(folder)
    assert len(captions(both)) == 10 and both.train.masks is None
    assert "1 masks are not read: data.masks=0.1 weighs the error by them" in both.report


@pytest.mark.parametrize("keep", ["all", "off"])
def test_a_mask_weighs_latent_pixels_framed_and_mirrored_as_its_picture(keep, tmp_path):
    folder = masked(ten(tmp_path / "photos"), {"3": (64, 64)})
    source = Captions(str(folder), masks=0.25, validation=0)
    framing = Framing(flip=True, random_crop=keep == "off")
    data = source.prepare(Base().load(), Sampler(), framing, Cache(tmp_path / "cache", keep))
    rows = {data.train.prompts[row]: row for row in range(10)}
    visits = Visits(data.train, 0, 1000)
    seen = [visits[rows["caption 3"], draw].mask for draw in range(12)]
    left = torch.cat([torch.ones(1, 8, 4), torch.full((1, 8, 4), 0.25)], dim=2)
    mirrored = left.flip(-1)
    assert {torch.equal(mask, left) for mask in seen if mask is not None} == {True, False}
    assert all(torch.equal(mask, left) or torch.equal(mask, mirrored) for mask in seen if mask is not None)
    whole = visits[rows["caption 4"], 0].mask
    assert whole is not None and torch.equal(whole, torch.ones(1, 8, 8))
    (batch,) = stack([visits[0, 0], visits[1, 0]])
    assert batch.mask is not None and batch.mask.shape == (2, 1, 8, 8)
    assert any("1 of 10 pictures have a mask; the others count wholly: 0.png, 1.png" in line for line in data.report)


def test_a_mask_is_part_of_what_the_data_goes_by(tmp_path):
    folder, model = masked(ten(tmp_path / "photos"), {"3": (64, 64)}), Base().load()

    def fingerprint() -> str:
        source = Captions(str(folder), masks=0.0)
        return source.prepare(model, Sampler(), Framing(), Cache(tmp_path / "cache")).fingerprint

    before = fingerprint()
    assert fingerprint() == before
    Image.new("L", (64, 64), 9).save(folder / "3-masklabel.png")
    assert fingerprint() != before


@pytest.mark.parametrize(
    ("masks", "sizes", "message"),
    [
        (0.1, {"3": (32, 64)}, "3-masklabel.png has 32 × 64 pixels, not the 64 × 64 of its picture"),
        (0.1, {}, "no picture has a mask: put <name>-masklabel.png beside <name>.png"),
        (1.0, {"3": (64, 64)}, "masks is the weight of black pixels, at least 0 and below 1, got 1.0"),
    ],
)
def test_masks_that_cannot_be_used_are_refused(masks, sizes, message, tmp_path):
    assert message in refused(masked(ten(tmp_path / "photos"), sizes), masks=masks)


def test_a_mask_that_cannot_be_read_to_its_end_is_refused_before_training(tmp_path):
    folder = masked(ten(tmp_path / "photos"), {"3": (64, 64)})
    file = folder / "3-masklabel.png"
    file.write_bytes(file.read_bytes()[:-30])
    assert "1 masks of" in (message := refused(folder, masks=0.1)) and "3-masklabel.png" in message


def test_a_dataset_has_no_masks(tmp_path):
    assert "only pictures in folders have masks" in refused(parquet(tmp_path / "a.parquet", ["a", "b"]), masks=0.1)


# ------------------------------------------------------------------------------------------------- datasets in parquet


def parquet(file: Path, texts: list[str | None], **columns: str) -> Path:
    """A dataset as `datasets` writes it to the Hub."""
    image, text = columns.get("image", "image"), columns.get("text", "text")
    rows = {image: [{"bytes": as_bytes(i), "path": None} for i in range(len(texts))], text: texts, "id": texts}
    features = Features({image: ImageFeature(decode=False), text: Value("string"), "id": Value("string")})
    file.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(rows, features=features).to_parquet(file)
    return file


def test_a_folder_of_parquet_files_is_a_dataset(tmp_path):
    parquet(tmp_path / "set/data/train-00000-of-00001.parquet", [f"caption {i}" for i in range(6)])
    parquet(tmp_path / "set/data/test-00000-of-00001.parquet", ["of the test"] * 2)
    both = fetched(tmp_path / "set", tmp_path / "cache", trigger="sks")
    assert sorted(captions(both).values()) == [f"sks, caption {i}" for i in range(6)]
    for path, prompt in captions(both).items():
        assert (both.train.chosen.folder / path).read_bytes() == as_bytes(int(prompt[-1]))
    assert set(captions(fetched(tmp_path / "set", tmp_path / "cache", split="test")).values()) == {"of the test"}


def test_columns_have_other_names_and_missing_ones_are_named_at_once(tmp_path):
    file = parquet(tmp_path / "set.parquet", ["a", "b"], image="photo", text="alt")
    assert "no column image or file_name: name it with data.image_column=<column>; it has photo, alt, id" in refused(
        file
    )
    assert "data.text_column" in refused(file, image_column="photo")
    both = fetched(file, tmp_path / "cache", image_column="photo", text_column="alt")
    assert set(captions(both).values()) == {"a", "b"}


def test_rows_without_caption_are_counted_and_most_of_them_are_refused(tmp_path):
    both = fetched(parquet(tmp_path / "half.parquet", ["a", None, "c", None]), tmp_path / "cache")
    assert "4 rows read; left out: 2 without a caption (row 1 of half.parquet; row 3 of half.parquet)" in said(both)
    with pytest.raises(UserError, match=r"3 without a caption .* most have no caption"):
        fetched(parquet(tmp_path / "most.parquet", ["a", None, None, None, "b"]), tmp_path / "cache")


def test_a_dataset_that_was_not_read_yet_is_bounded_by_its_rows_and_one_that_was_is_known(tmp_path):
    file = parquet(tmp_path / "set.parquet", ["a", None, "c", "", "e", "f", "g"])
    source, cache = Captions(str(file)), Cache(tmp_path / "cache")
    seen = source.find(cache, fetch=False)
    assert (seen.train, seen.validation, seen.both, seen.prompts, seen.fetched) == (6, 1, 7, 7, False)
    assert seen.report == ["at most 7 rows, 1 of them held back: to be read"] and not cache.folder.exists()
    both = source.find(cache, fetch=True)
    assert (both.train, both.validation, both.both, both.fetched) == (5, 1, 6, True)
    assert both.prompts == sorted(["a", "c", "", "e", "f", "g"])
    assert Captions(str(file)).find(cache, fetch=False) == both
    assert "at most 3 pictures" in said(Captions(str(file), max_images=3, seed=1).find(cache, fetch=False))
    assert Captions(str(file), validation=0).find(cache, fetch=False).both == 6  # the grid is of training pictures


def test_what_a_dataset_of_no_images_or_one_bounds(tmp_path):
    one = parquet(tmp_path / "one.parquet", ["a"])
    seen = Captions(str(one)).find(Cache(tmp_path / "cache"), fetch=False)
    assert (seen.train, seen.validation, seen.both) == (1, 1, 1)
    assert seen.report == ["at most 1 row, none of them held back: to be read"]
    hub = Captions("owner/set", max_images=40, validation=0).find(Cache(tmp_path / "cache"), fetch=False)
    assert (hub.train, hub.validation, hub.both) == (40, 16, 40)


def test_a_folder_of_pictures_is_found_without_fetching(tmp_path):
    folder = ten(tmp_path / "photos")
    found = [Captions(str(folder)).find(Cache(tmp_path / "cache"), fetch=fetch) for fetch in (False, True)]
    assert found[0] == found[1] and (found[0].train, found[0].validation) == (9, 1)


def test_a_dataset_is_read_until_there_are_enough(tmp_path):
    file = parquet(tmp_path / "set.parquet", [f"caption {i}" for i in range(20)])
    assert sorted(captions(fetched(file, tmp_path / "cache", max_images=3)).values()) == [
        "caption 0",
        "caption 1",
        "caption 2",
    ]
    assert len(list((tmp_path / "cache/captions").glob("*/images/*/*"))) == 3


def test_a_column_that_holds_no_pictures_or_no_text_is_named(tmp_path):
    pq.write_table(pa.table({"image": ["a.png"], "text": ["a"]}), tmp_path / "names.parquet")
    pq.write_table(pa.table({"image": [as_bytes(0)], "text": [1]}), tmp_path / "numbers.parquet")
    with pytest.raises(UserError, match=r"row 0 of names.parquet: column image holds str, not pictures"):
        fetched(tmp_path / "names.parquet", tmp_path / "cache")
    with pytest.raises(UserError, match=r"row 0 of numbers.parquet: column text holds int, not text"):
        fetched(tmp_path / "numbers.parquet", tmp_path / "cache")


# ------------------------------------------------------------------------------------------------------ to the training


def test_pictures_of_several_shapes_become_latents_in_buckets(tmp_path):
    sizes = [(96, 96), (150, 75), (75, 150), (64, 64), (200, 100), (120, 90)]
    for number, size in enumerate(sizes):
        make(tmp_path / "photos", {f"{number}.png": f"a, b, caption {number}"})
        picture(number, size).save(tmp_path / "photos" / f"{number}.png")
    source = Captions(str(tmp_path / "photos"), trigger="sks", shuffle_tags=True, caption_dropout=0.2)
    model, cache = Base().load(), Cache(tmp_path / "cache", keep="latents")
    data = source.prepare(model, Sampler(), Framing(), cache)
    assert len(data.train) == 5 and len(data.validation) == 1 and data.held_out_prompts == [data.validation.prompts[0]]
    visits = Visits(data.train, 0, 1000, model.factor, source.caption_dropout)
    seen = [visits[(row, draw)] for row in range(5) for draw in range(20)]
    assert len({tuple(visit.chosen.shape) for visit in seen}) >= 2
    assert all(visit.rejected is None and visit.embeds is None for visit in seen)
    texts = {visit.prompt for visit in seen}
    assert "" in texts and len(texts) > 12 and all(text.startswith("sks, ") for text in texts - {""})


def test_pictures_with_one_caption_are_sampled_with_it(tmp_path):
    folder = make(tmp_path / "photos", {f"{i}.png": "sks" for i in range(3)})
    data = Captions(str(folder)).prepare(Base().load(), Sampler(), Framing(), Cache(tmp_path / "cache"))
    assert data.held_out_prompts == ["sks"] and data.train.vary is None
    assert np.isclose(data.train.weight, 1).all()
