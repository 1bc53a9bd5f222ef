"""Image files of any kind become upright RGB pictures, or one line that says what to do with them."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from dpo_sd.errors import UserError
from dpo_sd.files import images
from dpo_sd.files.images import ENDINGS, MAX_PIXELS, facts, load_image, save_png

RED, WHITE, BLUE = (255, 0, 0), (255, 255, 255), (0, 0, 255)
FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "avif": "AVIF", "bmp": "BMP", "gif": "GIF", "tiff": "TIFF"}


@pytest.fixture(autouse=True)
def memory(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DPO_SD_CACHE", str(tmp_path / "memory"))


def noise_image(width: int = 48, height: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def kept(image: Image.Image, file: Path, **how: Any) -> Path:
    image.save(file, **how)
    return file


def problem(file: Path) -> str:
    """What is said of a file when it is found, or else when it is decoded."""
    (known,) = facts([file])
    if known.problem:
        return known.problem
    with pytest.raises(UserError) as caught:
        load_image(file)
    return str(caught.value)


def is_near(picture: Image.Image, place: tuple[int, int], colour: tuple[int, int, int]) -> bool:
    assert picture.mode == "RGB"
    return bool(np.abs(np.array(picture.getpixel(place)) - colour).max() < 60)


@pytest.mark.parametrize("ending", FORMATS)
def test_every_format_is_read_with_its_size(ending, tmp_path):
    file = kept(Image.new("RGB", (48, 32), RED), tmp_path / f"a.{ending}", format=FORMATS[ending])
    (known,) = facts([file])
    assert known[1:] == (48, 32, "")
    assert load_image(file).size == (48, 32) and is_near(load_image(file), (3, 3), RED)


def test_the_ending_may_be_in_capitals_or_that_of_another_format(tmp_path):
    for name in ("a.PNG", "a.JpG", "a.webp"):
        assert load_image(kept(Image.new("RGB", (8, 8), RED), tmp_path / name, format="PNG")).size == (8, 8)
    assert {f".{ending}" for ending in FORMATS} <= set(ENDINGS)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "avif", "tiff"])
def test_a_picture_stands_upright_and_so_does_its_size(ending, orientation, tmp_path):
    """Red above blue once it is turned, as a viewer turns it."""
    upright = Image.new("RGB", (32, 64), BLUE)
    upright.paste(RED, (0, 0, 32, 32))
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that undoes each
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(back[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = kept(stored, tmp_path / f"a.{ending}", format=FORMATS[ending], exif=exif)
    (known,) = facts([file])
    assert (known.width, known.height) == (32, 64) == load_image(file).size
    assert is_near(load_image(file), (16, 12), RED) and is_near(load_image(file), (16, 52), BLUE)


def test_no_picture_is_decoded_to_know_its_size(tmp_path, monkeypatch):
    """Pillow's own look for the EXIF of a PNG decodes it: half an hour for ten thousand large ones."""
    files = [kept(noise_image(), tmp_path / f"a.{ending}") for ending in FORMATS]
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("decoded"))
    assert [known[1:] for known in facts(files)] == [(48, 32, "")] * len(files)


def test_a_damaged_exif_spoils_no_picture(tmp_path):
    file = kept(Image.new("RGB", (8, 4), RED), tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\xff\xffnonsense")
    (known,) = facts([file])
    assert known[1:] == (8, 4, "") and load_image(file).size == (8, 4)


def test_transparency_becomes_white(tmp_path):
    half = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    half.paste((0, 0, 0, 0), (0, 0, 8, 4))
    pictures = {
        "rgba.png": half,
        "palette.png": half.quantize(4),
        "palette.gif": half,
        "grey.png": half.convert("LA"),
        "rgba.webp": half,
    }
    for name, picture in pictures.items():
        read = load_image(kept(picture, tmp_path / name, **({"lossless": True} if "webp" in name else {})))
        assert is_near(read, (4, 1), WHITE) and not is_near(read, (4, 6), WHITE), name


def test_a_transparent_colour_becomes_white(tmp_path):
    file = kept(Image.new("RGB", (4, 4), BLUE), tmp_path / "a.png", transparency=BLUE)
    assert load_image(file).getpixel((0, 0)) == WHITE


def test_grey_and_black_and_white_become_rgb(tmp_path):
    assert load_image(kept(Image.new("L", (4, 4), 100), tmp_path / "a.png")).getpixel((0, 0)) == (100, 100, 100)
    assert load_image(kept(Image.new("1", (4, 4), 1), tmp_path / "b.png")).getpixel((0, 0)) == WHITE


@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_sixteen_bits_become_eight_without_clipping(ending, tmp_path):
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    read = np.asarray(load_image(kept(Image.fromarray(ramp), tmp_path / f"a.{ending}")))
    assert (read[..., 0].reshape(-1) == np.arange(256)).all()


def test_floating_point_numbers_are_refused(tmp_path):
    file = kept(Image.fromarray(np.zeros((4, 4), np.float32)), tmp_path / "a.tiff")
    assert "floating-point numbers without a range" in problem(file)


def test_cmyk_becomes_rgb(tmp_path):
    read = load_image(kept(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), tmp_path / "a.jpg"))
    assert is_near(read, (4, 4), RED)


def test_the_first_frame_stands_for_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE, WHITE)]
    for name in ("a.gif", "a.png", "a.webp", "a.tiff"):
        file = kept(frames[0], tmp_path / name, save_all=True, append_images=frames[1:])
        assert is_near(load_image(file), (4, 4), RED), name


def test_the_first_picture_stands_for_several_in_a_jpeg(tmp_path):
    first, second = (Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE))
    file = kept(first, tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[second])
    (known,) = facts([file])
    assert known[1:] == (8, 8, "") and is_near(load_image(file), (4, 4), RED)


def test_jpegs_that_are_progressive_subsampled_or_carry_a_profile_are_read(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for number, how in enumerate([{"progressive": True}, {"subsampling": "4:1:1"}, {"icc_profile": profile}]):
        file = kept(Image.new("RGB", (16, 16), RED), tmp_path / f"{number}.jpg", **how)
        assert is_near(load_image(file), (4, 4), RED)


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "avif", "bmp", "gif", "tiff"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_picture_that_is_cut_short_is_no_half_picture(share, ending, tmp_path):
    data = kept(noise_image(200, 200), tmp_path / f"whole.{ending}").read_bytes()
    file = tmp_path / f"cut.{ending}"
    file.write_bytes(data[: int(share * len(data))])
    assert problem(file).startswith(f"image {file} ")


def test_damage_at_any_place_is_one_message_or_none(tmp_path):
    rng = np.random.default_rng(0)
    for ending in FORMATS:
        data = kept(noise_image(), tmp_path / f"whole.{ending}").read_bytes()
        for number in range(40):
            broken = bytearray(data)
            for place in rng.integers(0, len(data) if number % 2 else 64, 8):
                broken[place] = rng.integers(256)
            file = tmp_path / f"{number}.{ending}"
            file.write_bytes(broken)
            (known,) = facts([file])
            try:
                picture = load_image(file)
            except UserError as error:
                assert str(file) in str(error)
            else:
                assert picture.size == (known.width, known.height)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "is empty"),
        (bytes(4096), "is empty"),
        (b"\n<!DOCTYPE html><html><body>404 Not Found</body></html>", "is a web page"),
        (b"<html><body>Access denied</body></html>", "is a web page"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"></svg>', "is an SVG"),
        (b'{"error": "not found"}', "is no PNG or JPEG"),
        (b"\xff\xd8\xff\xe0", "cannot be read|is no PNG or JPEG"),
        (b"\x89PNG\r\n\x1a\n", "cannot be read|is no PNG or JPEG"),
    ],
)
def test_what_is_no_picture_is_named_for_what_it_is(content, what, tmp_path):
    file = tmp_path / "a.jpg"
    file.write_bytes(content)
    assert any(each in problem(file) for each in what.split("|"))


def test_a_folder_and_a_missing_file_are_named(tmp_path):
    (tmp_path / "a.png").mkdir()
    for name in ("a.png", "b.png"):
        with pytest.raises(UserError, match=name):
            load_image(tmp_path / name)


def bomb(width: int, height: int) -> bytes:
    """A PNG that says it has that size, in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(30000, 30000), (9000, 9000), (12000, 10000)])
def test_a_picture_that_would_fill_the_memory_is_refused_before_it_is_decoded(size, tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(bomb(*size))
    assert f"more than {MAX_PIXELS}" in problem(file)


def test_a_large_picture_is_refused_in_our_words_alone(tmp_path):
    """12000 x 10000 is where Pillow would warn, which pytest's own filters would hide here."""
    file = tmp_path / "a.png"
    file.write_bytes(bomb(12000, 10000))
    program = f"from pathlib import Path; from dpo_sd.files.images import load_image; load_image(Path({str(file)!r}))"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "UserError: image" in ended.stderr and "DecompressionBomb" not in ended.stderr


@pytest.mark.parametrize("size", [1_500_000, 30_000_000])
def test_large_texts_spoil_no_picture(size, tmp_path):
    texts = PngInfo()
    for keyword in ("prompt", "workflow", "parameters"):
        texts.add_itxt(keyword, "x" * size, zip=True)
    Image.new("RGB", (8, 4), "red").save(tmp_path / "a.png", pnginfo=texts)
    (known,) = facts([tmp_path / "a.png"])
    assert (known.width, known.height, known.problem) == (8, 4, "")
    assert load_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 0, 0)


def test_a_file_that_may_not_be_read_is_a_problem_only_as_long(tmp_path, monkeypatch):
    def denied(file: str) -> str:
        raise PermissionError(13, "Permission denied")

    file = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(file)
    with monkeypatch.context() as patch:
        patch.setattr(images, "read_sha256", denied)
        assert problem(file) == f"image {file} cannot be read: Permission denied"
    (known,) = facts([file])
    assert known.problem == ""


def test_a_text_that_unpacks_to_gigabytes_is_refused(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    data = b"Comment\0\0" + zlib.compress(bytes(100_000_000))
    chunk = struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))
    file = tmp_path / "a.png"
    file.write_bytes(buffer.getvalue()[:33] + chunk + buffer.getvalue()[33:])
    assert str(file) in problem(file)


def test_a_saved_image_is_read_back_as_it_was(tmp_path):
    image = noise_image()
    save_png(image, tmp_path / "new" / "step=000000.png")
    assert Image.open(tmp_path / "new" / "step=000000.png").tobytes() == image.tobytes()
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["step=000000.png"]


def test_a_failed_write_leaves_the_former_image(tmp_path, monkeypatch):
    file = tmp_path / "sheet.png"
    save_png(Image.new("RGB", (64, 64), "red"), file)
    former = file.read_bytes()

    def full(self: Image.Image, place: Path, **options: str) -> None:
        place.write_bytes(b"half an image")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save_png(Image.new("RGB", (64, 64), "blue"), file)
    assert file.read_bytes() == former
    assert list(tmp_path.iterdir()) == [file]
