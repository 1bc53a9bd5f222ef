"""Sheets of images side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

MARGIN, LABEL, LINE = 6, 74, 15  # pixels


def comparison(captions: Sequence[str], rows: Mapping[str, Sequence[Image.Image]], cell: int = 136) -> Image.Image:
    """Sheet with one column per caption and one row per name: a column holds the same prompt and seed drawn by each.

    Args:
        captions: texts under the columns.
        rows: one image per caption, by the name that stands at the left of the row.
        cell: width and height of an image in the sheet, in pixels.
    """
    font = ImageFont.load_default(12)
    wrapped = [textwrap.wrap(caption, max(cell // 7, 1), max_lines=5, placeholder=" …") for caption in captions]
    foot = LINE * max(map(len, wrapped), default=0) + MARGIN
    size = (LABEL + len(captions) * (cell + MARGIN), MARGIN + len(rows) * (cell + MARGIN) + foot)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for row, (name, images) in enumerate(rows.items()):
        top = MARGIN + row * (cell + MARGIN)
        draw.text((MARGIN, top + cell // 2), name, fill="black", font=font, anchor="lm")
        for column, image in enumerate(images):
            fitted = ImageOps.contain(image.convert("RGB"), (cell, cell), Image.Resampling.LANCZOS)
            left, above = ((cell - side) // 2 for side in fitted.size)
            sheet.paste(fitted, (LABEL + column * (cell + MARGIN) + left, top + above))
    top = MARGIN + len(rows) * (cell + MARGIN)
    for column, lines in enumerate(wrapped):
        for number, line in enumerate(lines):
            draw.text((LABEL + column * (cell + MARGIN), top + number * LINE), line, fill="black", font=font)
    return sheet
