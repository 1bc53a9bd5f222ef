"""Sheets of images side by side."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dpo_sd.files.sheets import LABEL, MARGIN, comparison

CELL = 40


def row(*colours: str) -> list[Image.Image]:
    return [Image.new("RGB", (64, 64), colour) for colour in colours]


def dark(sheet: Image.Image, left: int, top: int, right: int, bottom: int) -> int:
    """Pixels of ink in a part of the sheet."""
    return int((np.asarray(sheet.crop((left, top, right, bottom)).convert("L")) < 128).sum())


def test_a_sheet_has_a_column_per_caption_and_a_row_per_name():
    rows = {"base": row("red", "lime", "blue"), "policy": row("cyan", "magenta", "yellow")}
    sheet = comparison(["a", "b", "c"], rows, CELL)
    assert sheet.width == LABEL + 3 * (CELL + MARGIN)
    assert 2 * (CELL + MARGIN) < sheet.height < 3 * (CELL + MARGIN)
    seen = [
        sheet.getpixel((LABEL + column * (CELL + MARGIN) + CELL // 2, MARGIN + line * (CELL + MARGIN) + CELL // 2))
        for line in range(2)
        for column in range(3)
    ]
    assert seen == [picture.getpixel((0, 0)) for pictures in rows.values() for picture in pictures]


def test_names_and_captions_are_written():
    rows = {"base": row("white", "white"), "": row("white", "white")}
    sheet = comparison(["a red circle", ""], rows, CELL)
    foot, middle = MARGIN + 2 * (CELL + MARGIN), LABEL + CELL + MARGIN
    assert dark(sheet, 0, 0, LABEL, MARGIN + CELL) > 10
    assert dark(sheet, 0, MARGIN + CELL, LABEL, foot) == 0  # the row without a name
    assert dark(sheet, LABEL, foot, middle, sheet.height) > 10
    assert dark(sheet, middle, foot, sheet.width, sheet.height) == 0  # the column without a caption


@pytest.mark.parametrize(
    "caption",
    [
        "word " * 200,
        "x" * 500,
        "مرحبا بالعالم",
        "🔴🟦 emoji 👩‍👩‍👧",
        "漢字" * 40,
        "two\nlines\ttab",
        "\u200f\u202e\u0301",
        "   ",
    ],
)
def test_any_caption_keeps_to_five_lines_under_its_image(caption):
    plain = comparison(["one line"], {"base": row("red")}, CELL)
    sheet = comparison([caption], {"base": row("red")}, CELL)
    assert sheet.width == plain.width
    assert sheet.height <= plain.height + 4 * 15


def test_images_of_any_mode_and_size_fill_their_cell():
    pictures = [Image.new("L", (8, 8), 200), Image.new("RGBA", (512, 512), (10, 20, 30, 255))]
    sheet = comparison(["a", "b"], {"base": pictures}, CELL)
    corners = [(LABEL + 1, MARGIN + 1), (LABEL + 2 * CELL + MARGIN - 2, MARGIN + CELL - 2)]
    assert [sheet.getpixel(corner) for corner in corners] == [(200, 200, 200), (10, 20, 30)]


def test_a_sheet_of_nothing_is_still_an_image():
    assert comparison([], {}).size == (LABEL, 2 * MARGIN)
