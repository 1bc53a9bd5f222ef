"""A folder of images with captions: what lies in it, and which caption each image has."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from dpo_sd.data.tables import check_columns
from dpo_sd.errors import UserError
from dpo_sd.files.images import ENDINGS

IMAGE_COLUMNS, TEXT_COLUMNS = ("image", "file_name"), ("text", "caption")
METADATA = ("metadata.jsonl", "metadata.csv")


class Caption(NamedTuple):
    """One caption.

    Args:
        image: POSIX path of its image in the folder; the image need not be there, and "" is none.
        text: the caption itself.
        where: name of the place that it was read from.
    """

    image: str
    text: str
    where: str


class Listing(NamedTuple):
    """The files of a folder and the folders in it, as POSIX paths; names that begin with a dot are not seen.

    Args:
        images: by their endings.
        texts: .txt files.
        metadata: files of the names in `METADATA`.
        others: number of files of each ending that is not read.
    """

    images: list[str]
    texts: list[str]
    metadata: list[str]
    others: Counter[str]

    @property
    def is_dataset(self) -> bool:
        """Whether it is a folder of parquet files."""
        return not self.images and self.others[".parquet"] > 0

    def counted(self) -> str:
        """The endings that are not read: `3 .heic, 1 .zip`."""
        return ", ".join(f"{n} {ending}" for ending, n in self.others.most_common(5))


def listing(folder: Path) -> Listing:
    """The files of a folder, sorted by name within each folder."""
    files = Listing([], [], [], Counter())
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            path = (Path(place) / name).relative_to(folder).as_posix()
            ending = Path(name).suffix.lower()
            if ending in ENDINGS:
                files.images.append(path)
            elif ending == ".txt":
                files.texts.append(path)
            elif path in METADATA:
                files.metadata.append(path)
            else:
                files.others[ending or name] += 1
    if files.metadata and files.texts:
        files.others[".txt"] += len(files.texts)
    return files


def from_texts(folder: Path, files: Listing) -> list[Caption]:
    """The captions in .txt files, each with the image of the same name or one that is not there.

    Raises:
        UserError: if two images share a file, two files an image, or a file is no text.
    """
    images: dict[str, list[str]] = {}
    for path in files.images:
        images.setdefault(_stem(path), []).append(path)
    captions = []
    for path in files.texts:
        sharing = images.get(_stem(path), [""])
        if len(sharing) > 1:
            raise UserError(
                f"{' and '.join(sharing)} in {folder} share the caption {path}: delete or rename one of them"
            )
        captions.append(Caption(sharing[0], _read(folder / path), path))
    if twice := [stem for stem, n in Counter(map(_stem, files.texts)).items() if n > 1]:
        sharing = [path for path in files.texts if _stem(path) == twice[0]]
        raise UserError(f"{' and '.join(sharing)} in {folder} are captions of one picture: delete one of them")
    return captions


def _stem(path: str) -> str:
    return str(PurePosixPath(path).with_suffix(""))


def _read(file: Path) -> str:
    try:
        return " ".join(file.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is no text in UTF-8 ({error}): save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error}") from error


def from_metadata(folder: Path, names: Sequence[str], needed: Mapping[str, Sequence[str]]) -> list[Caption]:
    """The captions in a metadata file; rows without one are not among them.

    Args:
        names: metadata files of the folder.
        needed: columns of the image and of the text, in this order.

    Raises:
        UserError: if there are two files, or one that cannot be read, lacks a column or holds something else.
    """
    if len(names) > 1:
        raise UserError(f"{folder} has {' and '.join(names)}: delete or rename one of them")
    file = folder / names[0]
    captions = []
    for where, row in _rows(file):
        if "image_0" in row and not set(row) & set(IMAGE_COLUMNS):
            raise UserError(f"{file} holds pairs: use data=pairs data.pairs={folder}")
        check_columns(needed, list(row), where)
        image, text = (next(row[column] for column in columns if column in row) for columns in needed.values())
        if not isinstance(image, str) or not isinstance(text, str | None):
            raise UserError(f"{where}: picture and caption must be text, got {image!r} and {text!r}")
        if text is not None:
            captions.append(Caption(PurePosixPath(image).as_posix(), " ".join(text.split()), image))
    return captions


def _rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The place, in words, and the values of each row of a metadata file."""
    try:
        with open(file, encoding="utf-8-sig", newline="") as opened:
            if file.suffix == ".csv":
                reader = csv.DictReader(opened)
                for row in reader:
                    yield f"line {reader.line_num} of {file}", row
                return
            for number, line in enumerate(opened, start=1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise UserError(f"line {number} of {file} is no JSON object")
                yield f"line {number} of {file}", row
    except json.JSONDecodeError as error:
        raise UserError(f"line {number} of {file} is no JSON: {error}") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
