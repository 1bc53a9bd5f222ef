"""A folder of images with captions: what lies in it, and which caption each image has."""

from __future__ import annotations

import csv
import io
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from dpo_sd.data.tables import check_columns, read_rows
from dpo_sd.errors import UserError
from dpo_sd.files.images import ENDINGS
from dpo_sd.files.json_lines import read_records
from dpo_sd.files.names import composed, printable, spelt
from dpo_sd.files.texts import is_text, read_text

IMAGE_COLUMNS, TEXT_COLUMNS = ("image", "file_name"), ("text", "caption")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
MASK = "-masklabel.png"  # ends the names of masks, as in OneTrainer
TEXT_ENDINGS = (".txt", ".caption")  # of two files for one image, the first


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
        texts: text files with captions, outside the folders that have a metadata file, and one for each image.
        metadata: files of the names in `METADATA`.
        others: number of files of each ending that is not read.
        passed_over: files and folders that cannot be read, each with the reason.
        masks: masks of images, by the image; they are no images themselves.
    """

    images: list[str]
    texts: list[str]
    metadata: list[str]
    others: Counter[str]
    passed_over: list[str]
    masks: dict[str, str]

    @property
    def is_dataset(self) -> bool:
        """Whether it is a folder of parquet files."""
        return not self.images and (self.others[".parquet"] > 0 or any(map(_is_parquet, self.metadata)))

    def counted(self) -> str:
        """The endings that are not read: `3 .heic, 1 .zip`."""
        return ", ".join(f"{n} {printable(ending)}" for ending, n in self.others.most_common(5))

    def repeated(self) -> list[str]:
        """The folders with images whose names ask Kohya's trainer to repeat them: 10_style."""
        folders = dict.fromkeys(name for path in self.images for name in path.split("/")[:-1])
        return [name for name in folders if re.match(r"\d+_", name)]


def listing(folder: Path) -> Listing:
    """The files of a folder, sorted by name within each folder; linked folders come last, each once.

    Raises:
        UserError: if the folder or one in it cannot be read.
    """
    files = Listing([], [], [], Counter(), [], {})
    texts: list[str] = []
    for path in _walk(folder, files.passed_over):
        name, ending = os.path.basename(path), ending_of(path)
        if ending in ENDINGS:
            files.images.append(path)
        elif ending in TEXT_ENDINGS:
            texts.append(path)
        elif name.lower() in METADATA:
            files.metadata.append(path)
        else:
            files.others[ending or name] += 1
    by_stem = {_stem(path): path for path in files.images}
    for path in files.images:
        if path.lower().endswith(MASK) and (image := by_stem.get(composed(path[: -len(MASK)]))):
            files.masks[image] = path
    masks = set(files.masks.values())
    files.images[:] = [path for path in files.images if path not in masks]
    ruled = tuple(path[: path.rindex("/") + 1] if "/" in path else "" for path in files.metadata)
    first = {_stem(path) for path in texts if ending_of(path) == TEXT_ENDINGS[0]}
    for path in texts:
        second = ending_of(path) != TEXT_ENDINGS[0] and _stem(path) in first
        if second or path.startswith(ruled):
            files.others[ending_of(path)] += 1
        else:
            files.texts.append(path)
    return files


def _walk(folder: Path, passed_over: list[str]) -> Iterator[str]:
    """Paths of the files, folder by folder; linked folders after the others, and none a second time."""

    def refuse(error: OSError) -> None:
        raise UserError(f"folder {error.filename} cannot be read: {error.strerror}") from error

    seen: set[tuple[int, int]] = set()
    waiting = [""]  # the folder itself, then links to folders
    while waiting:
        start = waiting.pop(0)
        for place, folders, names in os.walk(os.path.join(folder, start), onerror=refuse):
            status = os.stat(place)
            below = os.path.relpath(place, folder)
            prefix = "" if below == os.curdir else f"{below}/"
            if (status.st_dev, status.st_ino) in seen:
                passed_over.append(f"{below}, a folder that is read under another name")
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            for name in [*folders, *names]:
                if not is_text(name):
                    passed_over.append(f"{prefix}{name}, whose name is not UTF-8: rename it")
            folders[:] = sorted(name for name in folders if not name.startswith(".") and is_text(name))
            linked = [name for name in folders if os.path.islink(os.path.join(place, name))]
            waiting += [prefix + name for name in linked]
            folders[:] = [name for name in folders if name not in linked]
            for name in sorted(names):
                if name.startswith(".") or not is_text(name):
                    continue
                if os.path.isfile(os.path.join(place, name)):
                    yield prefix + name
                else:  # reading a pipe would wait for ever
                    passed_over.append(f"{prefix}{name}, which is no plain file")


def from_texts(folder: Path, files: Listing) -> list[Caption]:
    """The captions in text files, each with the image of the same name or one that is not there.

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
        captions.append(Caption(sharing[0], " ".join(read_text(folder / path).split()), path))
    if twice := [stem for stem, n in Counter(map(_stem, files.texts)).items() if n > 1]:
        sharing = [path for path in files.texts if _stem(path) == twice[0]]
        raise UserError(f"{' and '.join(sharing)} in {folder} are captions of one picture: delete one of them")
    return captions


def ending_of(path: str) -> str:
    """The ending of a path in small letters, with its dot; empty where it has none."""
    return os.path.splitext(path)[1].lower()


def _stem(path: str) -> str:
    return composed(os.path.splitext(path)[0])


def from_metadata(folder: Path, names: Sequence[str], needed: Mapping[str, Sequence[str]]) -> list[Caption]:
    """The captions in metadata files, each of the images in its own folder; rows without one are not among them.

    Args:
        names: metadata files of the folder.
        needed: columns of the image and of the text, in this order.

    Raises:
        UserError: if two files lie in one folder, or one cannot be read, lacks a column or holds something else.
    """
    captions = []
    for above in dict.fromkeys(map(os.path.dirname, names)):
        here = [name for name in names if os.path.dirname(name) == above]
        if len(here) > 1:
            raise UserError(f"{folder} has {' and '.join(here)}: delete or rename one of them")
        captions += _captions(folder, above, folder / here[0], needed)
    return captions


def _captions(folder: Path, above: str, file: Path, needed: Mapping[str, Sequence[str]]) -> Iterator[Caption]:
    """The captions in a metadata file.

    Args:
        above: path of the file's own folder, which its image names begin at.
    """
    rows = list(_rows(file))
    everywhere = list(dict.fromkeys(column for _, row in rows for column in row))
    if "image_0" in everywhere and not set(everywhere) & set(IMAGE_COLUMNS):
        raise UserError(f"{file} holds pairs: use data=pairs data.pairs={file.parent}")
    if rows:
        check_columns(needed, everywhere, rows[0][0])
    for where, row in rows:
        image, text = (valued(row, columns) for columns in needed.values())
        if not isinstance(image, str) or not isinstance(text, str | None):
            raise UserError(f"{where}: picture and caption must be text, got {image!r:.100} and {text!r:.100}")
        if text is not None:
            path = spelt(folder, PurePosixPath(above, spelt(file.parent, image)).as_posix())
            yield Caption(path, " ".join(text.split()), path)


def valued(row: Mapping[str, Any], columns: Sequence[str]) -> Any:
    """The first value in one of these columns of a row, None where all are empty, of which NaN is a sign too."""
    return next((value for column in columns if (value := row.get(column)) is not None and value == value), None)


def _rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The place, in words, and the values of each row of a metadata file."""
    if _is_parquet(file.name):
        for number, row in enumerate(read_rows(file)):
            yield f"row {number} of {file}", row
    elif file.suffix.lower() == ".csv":
        yield from _csv_rows(file)
    else:
        for number, row in read_records(file):
            yield f"line {number} of {file}", row


def _csv_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    text = read_text(file)
    head = text.strip().partition("\n")[0]
    delimiter = max(",;\t", key=head.count)  # the comma where there is none, for a single column
    csv.field_size_limit(sys.maxsize)  # otherwise a long text is an error
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    columns: list[str] = []
    begin = 1
    try:
        for values in reader:
            where, begin = f"line {begin} of {file}", reader.line_num + 1
            if not columns:
                columns = [name.strip() for name in values]
                if twice := [name for name, n in Counter(columns).items() if name and n > 1]:
                    raise UserError(f"{where} names the column {twice[0]} twice: rename one of them")
            elif values and len(values) != len(columns):
                raise UserError(
                    f"{where} has {len(values)} values for the {len(columns)} columns {', '.join(columns)}: put texts "
                    f"that hold {'a tab' if delimiter == chr(9) else repr(delimiter)} or a line end in double quotes"
                )
            elif values:
                yield where, dict(zip(columns, values, strict=True))
    except csv.Error as error:
        raise UserError(
            f"line {begin} of {file} cannot be read ({error}): close the double quotes around its texts, without a "
            "blank behind them, and write those in them twice"
        ) from error


def _is_parquet(name: str) -> bool:
    return name.lower().endswith(".parquet")
