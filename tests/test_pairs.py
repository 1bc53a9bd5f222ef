"""Pair folders: what is written is read back, and no file is opened that is not an image of the folder."""

from __future__ import annotations

import json
import struct
import unicodedata
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dpo_sd.errors import UserError
from dpo_sd.files.hashes import read_sha256
from dpo_sd.files.images import MAX_PIXELS
from dpo_sd.preferences.pair_folder import (
    PAIRS,
    Pair,
    changed_images,
    check_image,
    current,
    image_file,
    load_image,
    pair_id,
    read_pairs,
    write_pairs,
)

PROMPTS = {
    "newlines": "first\nsecond\r\nthird\u2028fourth\x85fifth\x00",
    "HTML": "<script>alert('x')</script> &amp; ![](http://example.org/x.png)",
    "emoji": "a 🦊 and a 👩‍👩‍👧",
    "right to left": "قطة حمراء \u202e reversed",
    "5000 characters": "word " * 1000,
    "lone surrogates": "\udcff begins and ends \ud83d",
    "quotes and backslashes": "\\ud83d \"quoted\" 'single'",
    "nothing": "",
}


def make_pair(prompt: str = "a red circle", uid: str = "", **details: Any) -> Pair:
    uids = f"0{uid}", f"1{uid}"
    return Pair(pair_id(prompt, *uids), prompt, f"images/{uid}0.png", f"images/{uid}1.png", *uids, **details)


def png(width: int, height: int) -> bytes:
    """A PNG of which there is no more than the header."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return start + struct.pack(">I", 1000) + b"IDAT"


# ---- pairs.jsonl


def test_pairs_are_read_back_as_they_were_written(tmp_path: Path):
    details = {"model_0": "tiny", "model_1": "tiny + style:0.8", "seed_0": 2**63 - 1, "seed_1": 0}
    pairs = [
        make_pair(uid="a"),
        make_pair(uid="b", ranking_id="set 3", **details, settings={"steps": 20, "guidance": 4.5, "scheduler": "ddim"}),
    ]
    write_pairs(tmp_path, pairs)
    assert read_pairs(tmp_path) == pairs


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_a_prompt_of_any_text_is_one_line_and_comes_back(tmp_path: Path, prompt: str):
    write_pairs(tmp_path, [make_pair(prompt)])
    written = (tmp_path / PAIRS).read_bytes()
    assert written.count(b"\n") == 1
    assert written.decode()
    assert read_pairs(tmp_path) == [make_pair(prompt)]


def test_the_same_pairs_give_the_same_bytes(tmp_path: Path):
    for name in ("one", "other"):
        write_pairs(tmp_path / name, [make_pair(prompt, settings={"b": 1, "a": 2}) for prompt in PROMPTS.values()])
    assert (tmp_path / "one" / PAIRS).read_bytes() == (tmp_path / "other" / PAIRS).read_bytes()


def test_a_line_has_the_keys_in_the_order_of_the_fields(tmp_path: Path):
    write_pairs(tmp_path, [make_pair()])
    assert list(json.loads((tmp_path / PAIRS).read_text())) == list(Pair.__dataclass_fields__)


def test_ids_keep_apart_what_only_looks_alike_when_joined():
    assert pair_id("a", "bc", "d") != pair_id("ab", "c", "d") != pair_id("ab", "d", "c")
    assert pair_id("a", "b", "c") == pair_id("a", "b", "c")
    assert len(pair_id("a", "b", "c")) == 16


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("{}\n", r"line 1: the key '\w+' is missing"),
        ("GOOD\nnonsense\n", "line 2: not JSON"),
        ("GOOD\n[1]\n", "line 2: not a JSON object"),
        ("GOOD\n" + "[" * 100_000 + "\n", "line 2: not JSON"),
        ("GOOD\n\nGOOD\n", "line 3: pair .* stands here a second time"),
        ("UNKNOWN\n", "line 1: unknown key 'colour'"),
        ("NUMBER\n", "line 1: prompt must be str, got 5"),
        ("ALTERED\n", "line 1: .* is not the pair_id of this prompt"),
    ],
)
def test_a_broken_pairs_file_is_refused_by_line(tmp_path: Path, content: str, message: str):
    write_pairs(tmp_path, [make_pair()])
    good = json.loads((tmp_path / PAIRS).read_text())
    variants = {"GOOD": {}, "UNKNOWN": {"colour": 1}, "NUMBER": {"prompt": 5}, "ALTERED": {"prompt": "another"}}
    for word, change in variants.items():
        content = content.replace(word, json.dumps(good | change))
    (tmp_path / PAIRS).write_text(content)
    with pytest.raises(UserError, match=message):
        read_pairs(tmp_path)


def test_bytes_that_are_no_text_are_refused_by_line(tmp_path: Path):
    (tmp_path / PAIRS).write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(UserError, match="line 1: not JSON"):
        read_pairs(tmp_path)


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_a_folder_without_pairs_says_how_to_draw_some(tmp_path: Path, name: str):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=rf"python -m dpo_sd\.generate out={tmp_path / name}"):
        read_pairs(tmp_path / name)


# ---- images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """<tmp>/pairs/images/a.png, beside <tmp>/secret.png that no path of the folder may reach."""
    folder = tmp_path / "pairs"
    (folder / "images").mkdir(parents=True)
    for file in (folder / "images/a.png", tmp_path / "secret.png"):
        Image.new("RGB", (3, 2), "red").save(file)
    return folder


def test_an_image_of_the_folder_is_found_and_read(folder: Path):
    assert image_file(folder, "images/a.png") == (folder / "images/a.png").resolve()
    assert check_image(folder / "images/a.png") == (3, 2)
    assert load_image(folder, "images/a.png").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    "relative",
    ["http://example.org/a.png", "s3://bucket/a.png", "file:///etc/passwd"],
)
def test_an_address_is_refused(folder: Path, relative: str):
    with pytest.raises(UserError, match="is an address"):
        image_file(folder, relative)


@pytest.mark.parametrize("relative", ["../secret.png", "images/../../secret.png", "/etc/passwd", "/"])
def test_a_path_that_climbs_is_refused(folder: Path, relative: str):
    with pytest.raises(UserError, match="leads out of"):
        image_file(folder, relative)


def test_a_path_that_leads_back_into_the_folder_is_that_of_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch):
    file = (folder / "images/a.png").resolve()
    (folder.parent / "alias").symlink_to(folder)
    absolute = str(folder / "images/a.png")
    for relative in (absolute, absolute.replace("/", "\\"), "images/../images/a.png", "gone/../images/A.png"):
        assert image_file(folder, relative) == image_file(folder.parent / "alias", relative) == file
    monkeypatch.chdir(folder)
    assert image_file(".", absolute) == image_file(".", "../pairs/images/a.png") == file


def test_a_colon_in_a_name_makes_no_address(folder: Path):
    for name in ("style:0.8.png", "a:b.png", "data:image"):
        Image.new("RGB", (8, 8)).save(folder / name, "PNG")
        assert image_file(folder, name).name == name
    for name in ("https:a.png", "C:\\a.png"):
        with pytest.raises(UserError, match="is not in"):
            image_file(folder, name)


def test_the_case_of_a_name_does_not_count_where_only_one_is_meant(folder: Path):
    assert image_file(folder, "Images/A.PNG").name == "a.png"
    (folder / "more").mkdir()
    for name in ("b.png", "B.png"):
        Image.new("RGB", (8, 8)).save(folder / "more" / name)
    assert image_file(folder, "more/B.png").name == "B.png"
    with pytest.raises(UserError, match="is not in"):
        image_file(folder, "more/B.PNG")


@pytest.mark.parametrize("link", ["images/link.png", "elsewhere"])
def test_a_link_out_of_the_folder_is_refused(folder: Path, link: str):
    (folder / "images/link.png").symlink_to(folder.parent / "secret.png")
    (folder / "elsewhere").symlink_to(folder.parent)
    with pytest.raises(UserError, match="is a link out of"):
        image_file(folder, "elsewhere/secret.png" if link == "elsewhere" else link)


def test_a_link_within_the_folder_and_a_folder_that_is_a_link_are_fine(folder: Path):
    (folder / "images/link.png").symlink_to("a.png")
    (folder.parent / "alias").symlink_to(folder)
    assert load_image(folder.parent / "alias", "images/link.png").size == (3, 2)


@pytest.mark.parametrize(
    "relative", ["images/deleted.png", "images/a.png/b.png", "images/\x00.png", "x" * 5000, "circle", "\ud83d.png"]
)
def test_a_missing_image_is_refused(folder: Path, relative: str):
    (folder / "circle").symlink_to("circle")
    with pytest.raises(UserError, match="is not in"):
        image_file(folder, relative)


@pytest.mark.parametrize("relative", ["images", "", "."])
def test_a_folder_is_no_image(folder: Path, relative: str):
    with pytest.raises(UserError, match="is not a plain file"):
        image_file(folder, relative)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"\x89PNG", "is no PNG or JPEG or WEBP image"),
        (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><script>alert(1)</script></svg>', "is an SVG"),
        (b"<!doctype html><title>x</title>", "is a web page"),
        (b"GIF89a" + bytes(20), "is no PNG or JPEG or WEBP image"),
        (b"%PDF-1.7", "is no PNG or JPEG or WEBP image"),
    ],
    ids=["empty", "cut", "SVG", "HTML", "GIF", "PDF"],
)
def test_a_file_that_is_not_png_jpeg_or_webp_is_refused_whatever_it_is_called(
    tmp_path: Path, content: bytes, said: str
):
    for name in ("a.png", "a.svg"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=said):
            check_image(tmp_path / name)
        with pytest.raises(UserError, match=said):
            load_image(tmp_path, name)


@pytest.mark.parametrize("cut", [9, 20, 28])
def test_a_damaged_header_is_refused(tmp_path: Path, cut: int):
    (tmp_path / "a.png").write_bytes(png(64, 64)[:cut])
    with pytest.raises(UserError, match=r"a\.png"):
        check_image(tmp_path / "a.png")


@pytest.mark.parametrize(("width", "height"), [(30_000, 30_000), (8192, 8193), (2**31 - 1, 1)])
def test_an_image_with_too_many_pixels_is_refused_by_its_header(tmp_path: Path, width: int, height: int):
    (tmp_path / "a.png").write_bytes(png(width, height))
    with pytest.raises(UserError, match=f"a.png has .*more than {MAX_PIXELS}|a.png has more than {MAX_PIXELS}"):
        check_image(tmp_path / "a.png")


def test_an_image_with_just_as_many_pixels_as_allowed_passes(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(png(8192, 8192))
    assert check_image(tmp_path / "a.png") == (8192, 8192)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_truncated_image_is_refused_when_it_is_read(folder: Path, suffix: str):
    file = folder / f"images/cut.{suffix}"
    Image.effect_noise((64, 64), 90).convert("RGB").save(file)
    load_image(folder, f"images/cut.{suffix}")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match=rf"cut\.{suffix}"):
        load_image(folder, f"images/cut.{suffix}")


def test_an_image_is_turned_as_its_orientation_says(folder: Path):
    image = Image.new("RGB", (3, 2))
    exif = image.getexif()
    exif[0x0112] = 6  # a quarter turn
    image.save(folder / "images/turned.jpg", exif=exif)
    assert load_image(folder, "images/turned.jpg").size == (2, 3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_images_of_other_modes_come_as_rgb(folder: Path, mode: str):
    Image.new(mode, (3, 2)).save(folder / "images/mode.png")
    assert load_image(folder, "images/mode.png").mode == "RGB"


# ---- images that changed


def test_images_whose_bytes_are_no_longer_those_that_were_listed_are_found(folder: Path):
    (folder / "images/b.png").write_bytes((folder / "images/a.png").read_bytes() + b"more")
    a, b = read_sha256(folder / "images/a.png"), read_sha256(folder / "images/b.png")
    there = Pair(pair_id("p", a, b), "p", "images/a.png", "images/b.png", a, b)
    again = Pair(pair_id("q", b, a), "q", "images/b.png", "images/a.png", b, a)
    assert changed_images(folder, [there, again]) == {}
    (folder / "images/b.png").write_bytes(b"another")
    changed = {there.pair_id: ["images/b.png"], again.pair_id: ["images/b.png"]}
    assert changed_images(folder, [there, again]) == changed


@pytest.mark.parametrize("uid", ["", "7b9c2f1e-1f0c-4b2f-9d61-3f0f5d0e4a11", "A" * 64])
def test_of_images_without_a_checksum_nothing_is_said(folder: Path, uid: str):
    assert changed_images(folder, [Pair("x", "p", "images/a.png", "images/a.png", uid, uid)]) == {}


def test_a_missing_image_is_not_called_changed(folder: Path):
    uids = "0" * 64, read_sha256(folder / "images/a.png")
    assert changed_images(folder, [Pair("x", "p", "images/none.png", "images/a.png", *uids)]) == {}


def test_an_image_is_found_as_another_system_spells_it_and_never_outside(folder: Path):
    folder_name, name = (unicodedata.normalize("NFD", text) for text in ("für", "é.png"))
    (folder / folder_name).mkdir()
    Image.new("RGB", (8, 8)).save(folder / folder_name / name)
    for spelling in ("für/é.png", "für\\é.png", f" {folder_name}/é.png"):
        assert image_file(folder, spelling).name == name
    Image.new("RGB", (8, 8)).save(folder.parent / "outside.png")
    for spelling in ("..\\outside.png", "für\\..\\..\\outside.png", f"{folder.parent}\\outside.png".replace("/", "\\")):
        with pytest.raises(UserError):
            image_file(folder, spelling)


def test_of_pairs_with_the_same_files_the_last_one_is_current():
    former, other, anew = (
        Pair(uid, "p", "a.png", f"{b}.png", uid, "1") for uid, b in (("0", "b"), ("1", "c"), ("2", "b"))
    )
    assert set(map(id, current([former, other, anew]))) == {id(other), id(anew)}
