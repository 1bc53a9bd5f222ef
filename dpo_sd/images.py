"""Image files of any kind, read safely: as RGB, upright, and never larger than a computer can bear."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps

from dpo_sd.errors import UserError
from dpo_sd.remembered import read_sha256, remembered

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "GIF", "TIFF")
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")
MAX_PIXELS = 8192 * 8192


class ImageFacts(NamedTuple):
    """What is known of an image file without decoding it.

    Args:
        sha256: of its bytes, hexadecimal.
        width, height: in pixels, turned as the EXIF orientation says.
        problem: why it cannot be used; "" where it can.
    """

    sha256: str
    width: int
    height: int
    problem: str


def facts(files: Iterable[Path]) -> Iterator[ImageFacts]:
    """What is known of each file; read anew only where the file has changed.

    Raises:
        OSError: when a file cannot be read.
    """
    return (ImageFacts(*value) for value in remembered(files, "image 1", _facts))


def _facts(file: str) -> ImageFacts:
    sha256 = read_sha256(file)
    try:
        with open_image(Path(file)) as image:
            width, height = image.size
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            return ImageFacts(sha256, *((height, width) if turned else (width, height)), "")
    except UserError as error:
        return ImageFacts(sha256, 0, 0, str(error))
    except Exception as error:  # to find their EXIF, PNGs are decoded
        return ImageFacts(sha256, 0, 0, f"image {file} cannot be read to its end ({error})")


def open_image(file: Path, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """An image file, opened and not decoded: its header is known to be whole and its size bearable.

    Args:
        formats: Pillow's names of those that are read.

    Raises:
        UserError: when it is not there, no such image by its first bytes, damaged, or has more than `MAX_PIXELS`.
    """
    try:
        image = Image.open(file, formats=formats)
    except Image.DecompressionBombError as error:
        raise UserError(f"image {file} has more than {MAX_PIXELS} pixels: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise UserError(f"image {file} is no {' or '.join(formats)} image, or its beginning is damaged") from error
    except Exception as error:  # readers of headers raise nearly anything on broken data
        raise UserError(f"image {file} cannot be read: {error}") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        image.close()
        raise UserError(f"image {file} has {width} × {height} pixels, more than {MAX_PIXELS}: make it smaller")
    return image


def load_image(file: Path, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """The image decoded whole, in RGB: upright, on white where it is transparent, 16 bits as 8, the first of several.

    Args:
        file, formats: as for `open_image`.

    Raises:
        UserError: when it cannot be read to its end.
    """
    with open_image(file, formats) as image:
        try:
            return _rgb(ImageOps.exif_transpose(image))
        except Exception as error:  # decoders raise nearly anything on broken data
            raise UserError(f"image {file} cannot be read to its end ({error}): replace or delete it") from error


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
