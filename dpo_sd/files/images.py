"""Safe reading of image files of any kind: as RGB, upright, and bounded in size."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin

from dpo_sd.errors import UserError
from dpo_sd.files.atomic import replacing
from dpo_sd.files.hashes import read_sha256, remembered

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "GIF", "TIFF")
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")
MAX_PIXELS = 8192 * 8192
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_TURNS = {  # that bring an image upright, by the number of its EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_THEIR_SIDE = {_TURNS[orientation] for orientation in (5, 6, 7, 8)}

# texts in a PNG say nothing of its pixels: ComfyUI and InvokeAI write workflows of more than Pillow's one MiB
PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = 2**26, 2**28
# `open_image` refuses images below Pillow's limit already, in its own words
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class ImageFacts(NamedTuple):
    """Facts about an image file that are known without decoding it.

    Args:
        sha256: SHA-256 of its bytes, hexadecimal.
        width, height: pixels, turned as the EXIF orientation says.
        problem: why the file cannot be used; "" if it can.
    """

    sha256: str
    width: int
    height: int
    problem: str


def facts(files: Iterable[Path]) -> Iterator[ImageFacts]:
    """Facts about each file; only files that are new or have changed are read."""
    found = remembered(files, "image 2", _facts, lambda file, error: ("", 0, 0, _unreadable(file, error)))
    return (ImageFacts(*value) for value in found)


def decoding_problems(files: Iterable[Path], unreadable: bool = True) -> Iterator[str]:
    """Why each file cannot be decoded to its end, "" if it can; only files that are new or have changed are read.

    Args:
        unreadable: a file that the disk does not give out is a problem too.

    Raises:
        OSError: if the disk does not give out a file, which is no problem of the picture, unless `unreadable`.
    """
    return remembered(files, "decoded 2", _decoding_problem, _unreadable if unreadable else None)


def has_png_end(file: Path) -> bool:
    """Whether a PNG file has its last chunk, without which its pixels may be whole but its bytes are not."""
    with open(file, "rb") as opened:
        opened.seek(max(0, file.stat().st_size - len(_PNG_END)))
        return opened.read() == _PNG_END


def open_image(file: Path, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Opens an image file without decoding it; its header is whole, and it has at most `MAX_PIXELS`.

    Args:
        file: path of the image.
        formats: Pillow's names of the formats that are read.

    Raises:
        UserError: if the file is not there, is no such image by its first bytes, is damaged, or is larger.
    """
    try:
        image = Image.open(file, formats=formats)
    except Image.DecompressionBombError as error:
        raise UserError(f"image {file} has more than {MAX_PIXELS} pixels: {error}") from error
    except Image.UnidentifiedImageError as error:
        what = _looks_like(file) or f"no {' or '.join(formats)} image, or its beginning is damaged"
        raise UserError(f"image {file} is {what}") from error
    except Exception as error:  # readers of headers raise nearly anything on broken data
        raise UserError(f"image {file} cannot be read: {error}") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        image.close()
        raise UserError(f"image {file} has {width} × {height} pixels, more than {MAX_PIXELS}: make it smaller")
    return image


def load_image(file: Path, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """An image decoded whole, in RGB: upright, on white where it is transparent, 16 bits as 8, the first of several.

    Args:
        file, formats: as for `open_image`.

    Raises:
        UserError: as `open_image`, and if the file cannot be read to its end.
    """
    with open_image(file, formats) as image:
        try:
            turn = _turn(image)
            image.load()
            return _rgb(image if turn is None else image.transpose(turn))
        except Exception as error:  # decoders raise nearly anything on broken data
            raise UserError(f"image {file} cannot be read to its end ({error}): replace or delete it") from error


def save_png(image: Image.Image, file: Path, text: Mapping[str, str] | None = None) -> None:
    """Writes an image as a PNG file, whole or not at all.

    Args:
        image: image to write.
        file: path of the file.
        text: contents of the file's text chunks, by keyword.
    """
    chunks = PngImagePlugin.PngInfo()
    for keyword, value in (text or {}).items():
        chunks.add_itxt(keyword, value)  # UTF-8, unlike tEXt
    with replacing(file) as temporary:
        image.save(temporary, format="PNG", pnginfo=chunks)


def _facts(file: str) -> ImageFacts:
    sha256 = read_sha256(file)
    try:
        with open_image(Path(file)) as image:
            width, height = image.size
            turned = _turn(image) in _ON_THEIR_SIDE
            return ImageFacts(sha256, *((height, width) if turned else (width, height)), "")
    except UserError as error:
        return ImageFacts(sha256, 0, 0, _of_the_picture(error))


def _decoding_problem(file: str) -> str:
    try:
        load_image(Path(file))
        return ""
    except UserError as error:
        return _of_the_picture(error)


def _of_the_picture(error: UserError) -> str:
    """The message of a damaged picture; what the disk or the memory could not do is raised, and not remembered."""
    cause = error.__cause__
    if isinstance(cause, MemoryError):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)) from error
    if isinstance(cause, OSError) and cause.errno is not None:  # Pillow's own have none
        raise cause
    return str(error)


def _unreadable(file: str, error: OSError) -> str:
    return f"image {file} cannot be read: {error.strerror or error}"


def _turn(image: Image.Image) -> Image.Transpose | None:
    """The turn that brings an image upright, from the EXIF data before its pixels; None if it is upright."""
    if image.format == "TIFF":  # Pillow turns it by itself
        return None
    try:
        # the PNG reader's own method decodes the pixels to look for EXIF behind them
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except Exception:  # a damaged EXIF spoils no pixel
        return None
    return _TURNS.get(orientation)  # type: ignore[arg-type]


def _looks_like(file: Path) -> str | None:
    """Description of a file that holds no image, with a remedy; None for an unknown kind."""
    with open(file, "rb") as opened:
        head = opened.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head.strip(b"\0"):
        return "empty: replace or delete it"
    if b"<svg" in head:
        return "an SVG, which has no pixels: save it as PNG"
    if head.startswith((b"<!doctype html", b"<html")):
        return "a web page, perhaps an error message in place of the picture: download it again"
    return None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow would clip sixteen bits to eight
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.mode == "F":
        raise ValueError("it holds floating-point numbers without a range")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
