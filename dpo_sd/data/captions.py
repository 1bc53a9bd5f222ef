"""Pictures with captions, in a folder or a dataset, as training data for loss=sft."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from dpo_sd.data.cache import Cache
from dpo_sd.data.extract import Extract, Tally, picture_bytes
from dpo_sd.data.preparing import prepare
from dpo_sd.data.samples import Found, find, left_out
from dpo_sd.data.source import PreparedData, checked_dropout
from dpo_sd.data.splitting import check_validation, split_pictures
from dpo_sd.data.tables import TabularDataset, check_columns
from dpo_sd.errors import UserError
from dpo_sd.files.images import ENDINGS
from dpo_sd.noise import order

if TYPE_CHECKING:
    from dpo_sd.data.frames import Framing
    from dpo_sd.models.sampling import Sampler
    from dpo_sd.models.stable_diffusion import StableDiffusion

IMAGE_COLUMNS, TEXT_COLUMNS = ("image", "file_name"), ("text", "caption")
METADATA = ("metadata.jsonl", "metadata.csv")
UNCAPTIONED, PICTURELESS = "without a caption", "without a picture"


class Captions:
    """Pictures with captions: a folder, or a dataset on the Hub or in parquet files.

    A folder, read with the folders in it, has a .txt file of the same name beside each picture, or a `metadata.jsonl`
    or `metadata.csv` with `file_name` (or `image`) and `text` (or `caption`). Pictures without a caption are left out
    and named; where there is no caption at all, a trigger is one. Files and folders that begin with a dot are not seen.

    Args:
        path: folder, parquet file, folder of parquet files, or repository on the Hub, which is streamed.
        trigger: put in front of every caption with a comma, `sks style` for example.
        shuffle_tags: shuffles what stands between the commas of a caption at every visit, the trigger apart.
        caption_dropout: share of visits that train on the empty prompt, in [0, 1].
        validation: share of the pictures held back for the validation grid, in (0, 0.5] and at most 128, or how many;
            with 0, or with a single picture, all are trained on and the grid is of some of them.
        max_images: at most so many pictures; the seed chooses them. None takes all.
        image_column, text_column: of a dataset or a metadata file; None takes `image` or `file_name`, and `text` or
            `caption`.
        split: of a dataset.
        revision: branch, tag or commit of a repository; None takes its main branch.
        seed: of the split into training and validation, and of `max_images`.

    Raises:
        UserError: when a setting is out of range, there are no pictures or most have no caption, two pictures share a
            caption file, or a file with captions cannot be read.
    """

    has_pairs: ClassVar[bool] = False
    labeller: str | None = None

    def __init__(
        self,
        path: str,
        trigger: str | None = None,
        shuffle_tags: bool = False,
        caption_dropout: float = 0.0,
        validation: float = 0.1,
        max_images: int | None = None,
        image_column: str | None = None,
        text_column: str | None = None,
        split: str = "train",
        revision: str | None = None,
        seed: int = 0,
    ):
        if validation != 0:  # which holds back none
            check_validation(validation)
        if max_images is not None and max_images < 1:
            raise UserError(f"max_images must be at least 1, or null for all, got {max_images}")
        self.path, self.trigger, self.shuffle_tags = path, (trigger or "").strip().rstrip(","), shuffle_tags
        self.validation, self.max_images, self.seed = validation, max_images, seed
        self.image_column, self.text_column = image_column, text_column
        self.caption_dropout = checked_dropout(caption_dropout)
        self.dataset: TabularDataset | None = None
        self.found: Found | None = None  # of a dataset, once it is fetched
        folder = Path(path).expanduser()
        files = _listing(folder) if folder.is_dir() else None
        if files is not None and not files.is_dataset:
            if revision is not None:
                raise UserError(f"{path} is on this computer and has no revision={revision}: leave it out")
            self.found = self._in_folder(folder, files)
            return
        self.dataset = TabularDataset(path, split, revision)
        self.dataset.check(self._needed)

    def fetch(self, cache: Cache) -> Found:
        """The pictures; those of a dataset streamed into the cache folder as far as they are not there.

        Raises:
            UserError: when the dataset cannot be read, or most of its rows have no caption.
        """
        if self.found is None:
            extract = self._extract(cache)
            self.found = self._in_dataset(extract.rows(self.max_images, "pictures"), extract.images)
        return self.found

    def foreseen(self, cache: Cache) -> Found | None:
        """The pictures as `fetch` would find them, with those of a dataset unread and nothing written; None before they
        are fetched.

        Raises:
            UserError: as `fetch`.
        """
        if self.found is not None:
            return self.found
        rows = self._extract(cache).foreseen(self.max_images)
        return None if rows is None else self._in_dataset(rows, None)

    def prepare(self, model: StableDiffusion, sampler: Sampler, framing: Framing, cache: Cache) -> PreparedData:
        """Reads and encodes what is not in the cache yet."""
        data = prepare(model, self.fetch(cache), framing, cache)
        if not self.shuffle_tags:
            return data
        return replace(data, train=replace(data.train, vary=ShuffledTags(len(_tags(self.trigger)))))

    @property
    def _needed(self) -> dict[str, Sequence[str]]:
        return {
            "data.image_column": [self.image_column] if self.image_column else IMAGE_COLUMNS,
            "data.text_column": [self.text_column] if self.text_column else TEXT_COLUMNS,
        }

    def _extract(self, cache: Cache) -> Extract:
        assert self.dataset is not None
        settings = [self.image_column, self.text_column]
        return Extract(self.dataset, cache.folder / "captions", self._needed, [], self._pick, settings, self.seed)

    def _in_dataset(self, rows: Iterable[dict[str, Any]], images: Path | None) -> Found:
        assert self.dataset is not None
        tally = Tally(named=(UNCAPTIONED, PICTURELESS))
        paths, captions = [], []
        for row in tally.kept(rows):
            paths.append(row["image"])
            captions.append(row["text"])
        report = [f"{self.path}, {self.dataset.split}: {tally}"]
        if 2 * tally.left_out[UNCAPTIONED] > tally.read:
            raise UserError(f"{report[0]}; most have no caption: see data.text_column")
        return self._split(images, paths, captions, report)

    def _pick(self, row: dict[str, Any], where: str) -> dict[str, Any] | str:
        image_column, text_column = (
            next(column for column in columns if column in row) for columns in self._needed.values()
        )
        text, picture = row[text_column], picture_bytes(row[image_column], image_column, where)
        if text is not None and not isinstance(text, str):
            raise UserError(f"{where}: column {text_column} holds {type(text).__name__}, not text")
        if text is None:
            return UNCAPTIONED
        return PICTURELESS if picture is None else {"image": picture, "text": text}

    def _in_folder(self, folder: Path, files: _Files) -> Found:
        if not files.images:
            others = f"; it has {_counted(files.others)}" if files.others else ""
            raise UserError(f"{folder} holds no picture that can be read ({', '.join(ENDINGS)}){others}")
        if files.metadata:
            captions, origin = _from_metadata(folder, files.metadata, self._needed), files.metadata[0]
        elif self.image_column or self.text_column:
            raise UserError(
                f"{folder} has no {' or '.join(METADATA)} for image_column and text_column to name a column of"
            )
        else:
            captions, origin = _from_texts(folder, files), ".txt files"
        report = [f"{folder}: {len(files.images)} pictures, {len(captions)} captions in {origin}"]
        there = set(files.images)
        used = [caption for caption in captions if caption.image in there]
        pictureless = [caption.where for caption in captions if caption.image not in there]
        bare = sorted(there - {caption.image for caption in used})
        if not captions and self.trigger:
            used, bare = [_Caption(image, "", image) for image in files.images], []
        if 2 * len(bare) > len(files.images):
            raise UserError(_mostly_bare(folder, files, bare, pictureless))
        left_out(UNCAPTIONED, bare, len(files.images), report)
        left_out(f"captions {PICTURELESS}", pictureless, len(captions), report)
        if files.others:
            report.append(f"not read: {_counted(files.others)}")
        if self.max_images is not None:
            used = [used[row] for row in order(self.seed, 0, len(used))[: self.max_images]]
        return self._split(folder, [caption.image for caption in used], [caption.text for caption in used], report)

    def _split(self, folder: Path | None, paths: list[str], captions: list[str], report: list[str]) -> Found:
        if empty := [path for path, caption in zip(paths, captions, strict=True) if not caption.strip()]:
            what = "the trigger alone" if self.trigger else "the empty prompt"
            named = ", ".join(empty[:5]) + (" …" if len(empty) > 5 else "")
            report.append(f"{len(empty)} pictures have an empty caption and are trained on {what}: {named}")
        prompts = [", ".join(part for part in (self.trigger, caption.strip()) if part) for caption in captions]
        samples, rows = find(folder, prompts, paths, None, None, None, report)
        if not rows:
            raise UserError(f"no picture of {self.path} can be used: {report[-1]}")
        return split_pictures(samples, self.validation, self.seed, report)


@dataclass(frozen=True)
class ShuffledTags:
    """Shuffles the tags of a caption, which commas part.

    Args:
        kept: how many tags stay in front.
    """

    kept: int

    def __call__(self, text: str, generator: np.random.Generator) -> str:
        tags = _tags(text)
        return ", ".join([*tags[: self.kept], *generator.permutation(np.array(tags[self.kept :], object))])


def _tags(text: str) -> list[str]:
    return [tag for part in text.split(",") if (tag := part.strip())]


class _Caption(NamedTuple):
    """image: path in the folder; where: it was read, in words."""

    image: str
    text: str
    where: str


class _Files(NamedTuple):
    """What a folder holds, as POSIX paths in it; others: how many there are of each ending that is not read."""

    images: list[str]
    texts: list[str]
    metadata: list[str]
    others: Counter[str]

    @property
    def is_dataset(self) -> bool:
        return not self.images and self.others[".parquet"] > 0


def _listing(folder: Path) -> _Files:
    files = _Files([], [], [], Counter())
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


def _counted(endings: Counter[str]) -> str:
    return ", ".join(f"{n} {ending}" for ending, n in endings.most_common(5))


def _from_texts(folder: Path, files: _Files) -> list[_Caption]:
    """The captions in .txt files, each with the picture of the same name or one that is not there."""
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
        captions.append(_Caption(sharing[0], _read(folder / path), path))
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


def _from_metadata(folder: Path, names: Sequence[str], needed: Mapping[str, Sequence[str]]) -> list[_Caption]:
    """The captions in a metadata file; rows without one are not among them."""
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
            captions.append(_Caption(PurePosixPath(image).as_posix(), " ".join(text.split()), image))
    return captions


def _rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a metadata file, with their places in words."""
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


def _mostly_bare(folder: Path, files: _Files, bare: Sequence[str], pictureless: Sequence[str]) -> str:
    named = ", ".join(bare[:5]) + (" …" if len(bare) > 5 else "")
    what = f"{len(bare)} of {len(files.images)} pictures in {folder} have no caption ({named})"
    if pictureless:
        what += f", and {len(pictureless)} captions have no picture ({', '.join(pictureless[:5])})"
    elif not files.texts and not files.metadata:
        return f"{what}: write .txt files of the same names, or let one phrase stand for all with data.trigger=<phrase>"
    return f"{what}: name the files of both alike, or move pictures without a caption away"
