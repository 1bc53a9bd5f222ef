"""The pair folder: pairs.jsonl, which lists two images for a prompt on each line, and safe reading of those images."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from types import NoneType
from typing import Any

from PIL import Image

from dpo_sd.errors import UserError
from dpo_sd.files import images
from dpo_sd.files.atomic import write_text
from dpo_sd.files.hashes import read_sha256
from dpo_sd.files.json_lines import json_line, read_records
from dpo_sd.files.names import spelt
from dpo_sd.files.texts import is_text

PAIRS = "pairs.jsonl"
SHOWN = ("PNG", "JPEG", "WEBP")  # formats that every browser shows and that hold no script


@dataclass(frozen=True)
class Pair:
    """Two images of one prompt.

    Args:
        pair_id: `pair_id` of the prompt and the two uids.
        prompt: text of any length.
        image_0, image_1: POSIX paths relative to the folder.
        image_0_uid, image_1_uid: SHA-256 of the files' bytes, hexadecimal; "" if nobody recorded it.
        ranking_id: shared by the pairs of one set of more than two images.
        model_0, model_1: the model and the LoRAs that drew each, in words: "tiny", "tiny + style:0.8".
        seed_0, seed_1: the seed that each was drawn from.
        settings: how both were drawn (scheduler, steps, guidance, …), for the record only.

    Raises:
        ValueError: if a value is of another type.
    """

    pair_id: str
    prompt: str
    image_0: str
    image_1: str
    image_0_uid: str
    image_1_uid: str
    ranking_id: str | None = None
    model_0: str | None = None
    model_1: str | None = None
    seed_0: int | None = None
    seed_1: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, types in _TYPES.items():
            if type(getattr(self, key)) not in types:
                raise ValueError(f"{key} must be {types[0].__name__}, got {getattr(self, key)!r:.100}")


_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_REQUIRED = {each.name for each in fields(Pair) if each.default is MISSING and each.default_factory is MISSING}
_TYPES: dict[str, tuple[type, ...]] = dict.fromkeys(_REQUIRED, (str,)) | {
    "ranking_id": (str, NoneType),
    "model_0": (str, NoneType),
    "model_1": (str, NoneType),
    "seed_0": (int, NoneType),
    "seed_1": (int, NoneType),
    "settings": (dict,),
}


def pair_id(prompt: str, image_0_uid: str, image_1_uid: str) -> str:
    """Identity of a pair by its content: 16 hexadecimal digits."""
    # JSON keeps ("a", "bc") apart from ("ab", "c")
    return hashlib.sha256(json.dumps([prompt, image_0_uid, image_1_uid]).encode()).hexdigest()[:16]


def is_uid(text: str) -> bool:
    """Whether a text is a SHA-256 as `read_sha256` gives it; pairs from elsewhere may have uids of other kinds."""
    return _SHA256.fullmatch(text) is not None


def read_pairs(folder: str | Path) -> list[Pair]:
    """The pairs of a folder in the order of its pairs.jsonl; the images are not looked at.

    Raises:
        UserError: if the folder, its pairs.jsonl or pairs in it are missing, or a line is not a pair or repeats one.
    """
    folder = Path(folder)
    file = folder / PAIRS
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: draw pairs into it with python -m dpo_sd.generate out={folder}")
    if not file.is_file():
        raise UserError(f"no {PAIRS} in {folder}: draw pairs with python -m dpo_sd.generate out={folder}")
    pairs: dict[str, Pair] = {}
    for number, record in read_records(file):
        try:
            pair = _pair(record)
            if pair.pair_id in pairs:
                raise ValueError(f"pair {pair.pair_id} stands here a second time: remove one of the two lines")
        except ValueError as error:
            raise UserError(f"{file}, line {number}: {error}") from error
        pairs[pair.pair_id] = pair
    if not pairs:
        raise UserError(f"{file} is empty: draw pairs with python -m dpo_sd.generate out={folder}")
    return list(pairs.values())


def write_pairs(folder: str | Path, pairs: Iterable[Pair]) -> None:
    """Writes pairs.jsonl, whole or not at all; the same pairs give the same bytes.

    Raises:
        OSError: if the folder cannot be written.
    """
    write_text(Path(folder) / PAIRS, "".join(json_line(asdict(pair)) for pair in pairs))


def current(pairs: Iterable[Pair]) -> list[Pair]:
    """The pairs of the images as they are now: of several with the same prompt and files, the last one listed."""
    by_files = {(pair.prompt, pair.image_0, pair.image_1): pair for pair in pairs}
    return list(by_files.values())


def changed_images(folder: str | Path, pairs: Iterable[Pair]) -> dict[str, list[str]]:
    """The images whose bytes have changed since they were listed, by the pair_id of their pairs.

    A uid that is no SHA-256, as of pairs from elsewhere, tells nothing; nor does an image that is missing or cannot be
    opened count as changed: `image_file` and `load_image` say what is wrong with it.

    Args:
        folder: holds the images; each of them is read once, whole.
        pairs: the pairs whose images are looked at.

    Returns:
        The paths of the changed images, as the pair gives them; pairs without any are left out.
    """
    found: dict[str, str | None] = {}  # uid of the bytes as they are now, by image
    changed: dict[str, list[str]] = {}
    for pair in pairs:
        for image, uid in ((pair.image_0, pair.image_0_uid), (pair.image_1, pair.image_1_uid)):
            if not is_uid(uid):
                continue
            if image not in found:
                found[image] = _uid_of(folder, image)
            if found[image] not in (None, uid):
                changed.setdefault(pair.pair_id, []).append(image)
    return changed


def image_file(folder: str | Path, relative: str) -> Path:
    """The file of an image in a folder, resolved.

    Args:
        folder: holds the images.
        relative: path inside the folder, as `spelt` reads it.

    Raises:
        UserError: if the path is an address or leads out of the folder, or there is no plain file, or its name is not
            UTF-8.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", relative):
        raise UserError(f"image {relative[:200]!r} is an address: give the path of a file in {folder}")
    path = PurePosixPath(spelt(folder, relative))
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"image {relative[:200]!r} leads out of {folder}: give a path inside")
    try:
        root, file = Path(folder).resolve(), (Path(folder) / path).resolve(strict=True)
    except (OSError, ValueError, RuntimeError) as error:  # missing, NUL in the name, circle of links
        raise UserError(f"image {relative[:200]!r} is not in {folder}: {error}") from error
    if not file.is_relative_to(root):
        raise UserError(f"image {relative[:200]!r} is a link out of {folder}: put the file itself there")
    if not is_text(relative):
        raise UserError(f"image {relative[:200]!r} has a name that is not UTF-8: rename the file in {folder}")
    if not file.is_file():
        raise UserError(f"image {relative[:200]!r} in {folder} is not a plain file")
    return file


def check_image(file: Path) -> tuple[int, int]:
    """Width and height in pixels, from the header alone.

    Raises:
        UserError: if the file is not an image that every browser shows, and as `dpo_sd.files.images.open_image`.
    """
    with images.open_image(file, SHOWN) as image:
        return image.size


def load_image(folder: str | Path, relative: str) -> Image.Image:
    """An image of the folder decoded whole, as by `dpo_sd.files.images.load_image`.

    Args:
        folder, relative: as for `image_file`.

    Raises:
        UserError: if the file is not there or not an image that can be read to its end.
    """
    return images.load_image(image_file(folder, relative), SHOWN)


def _uid_of(folder: str | Path, relative: str) -> str | None:
    try:
        return read_sha256(image_file(folder, relative))
    except (UserError, OSError):
        return None


def _pair(record: dict[str, Any]) -> Pair:
    if missing := _REQUIRED - record.keys():
        raise ValueError(f"the key {min(missing)!r} is missing")
    if unknown := record.keys() - _TYPES.keys():
        raise ValueError(f"unknown key {min(unknown)!r}; there are {', '.join(each.name for each in fields(Pair))}")
    pair = Pair(**record)
    expected = pair_id(pair.prompt, pair.image_0_uid, pair.image_1_uid)
    if pair.pair_id != expected:
        raise ValueError(f"{pair.pair_id!r:.100} is not the pair_id of this prompt and these images: {expected} is")
    return pair
