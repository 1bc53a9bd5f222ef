"""Rows of a dataset that is streamed, never fetched whole; what is taken of them stays as files."""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo_sd.errors import UserError
from dpo_sd.files.atomic import replacing, write_json
from dpo_sd.files.claims import take_turn
from dpo_sd.files.room import free_bytes, writing
from dpo_sd.files.tensors import content_key
from dpo_sd.noise import order

if TYPE_CHECKING:
    from datasets import IterableDataset

    from dpo_sd.data.tables import Needed, TabularDataset

# of a row and its place, in words: what is kept of it, images as bytes; or why it is left out
Pick = Callable[[dict[str, Any], str], dict[str, Any] | str]
MEASURED = 32  # rows after which it is known how much room the others need
FRUITLESS = 1000  # rows of which none can be used, after which nothing better is expected


class Extract:
    """The part of a dataset that `pick` takes, as files in a folder.

    The dataset's files are read in an order that the seed decides, and their rows as they stand. A log gets one line
    for every row, after its images are on the disk, so that a killed extraction goes on at the next row and ends in
    the same folder. More rows can be wanted later; the first ones stay the same.

    Args:
        dataset: where rows come from.
        above: parent of the folder that the part is kept in, which is named by what decides it.
        needed: columns that `pick` reads.
        optional: columns that it reads where there are such.
        pick: decides what is kept of a row.
        settings: all that `pick` depends on in addition to the row.
        seed: seed of the order of the dataset's files.
    """

    def __init__(
        self,
        dataset: TabularDataset,
        above: Path,
        needed: Needed,
        optional: Sequence[str],
        pick: Pick,
        settings: Any,
        seed: int,
    ):
        self.dataset, self.needed, self.optional, self.pick, self.seed = dataset, needed, optional, pick, seed
        self._above, self._settings = above, settings

    @functools.cached_property
    def folder(self) -> Path:
        """Folder of the part; its name depends on the content of local files, which are read for it."""
        identity = self.dataset.identity()
        return self._above / content_key(kind="extract 1", dataset=identity, settings=self._settings, seed=self.seed)

    @property
    def images(self) -> Path:
        """Folder of the images."""
        return self.folder / "images"

    @property
    def log(self) -> Path:
        """The file with a line for every row."""
        return self.folder / "rows.jsonl"

    @property
    def about(self) -> Path:
        """The file that says which dataset it is, and which commit of it."""
        return self.folder / "of.json"

    def rows(self, wanted: int | None, what: str) -> Iterator[dict[str, Any]]:
        """The rows that were kept, until `wanted` of them are there, and in between those that were left out.

        A kept row has what `pick` returned, with paths below `images` for images; one that was left out has
        `left_out`, why, and `where`. Only what is missing is read from the dataset.

        Args:
            wanted: rows to keep at most; None means all.
            what: name of the rows in messages.

        Raises:
            UserError: if the dataset cannot be read, nothing in it can be used, or there is no room.
        """
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = open(self.folder / "lock", "w")  # noqa: SIM115 - closed below
        with lock:
            take_turn(lock.fileno(), fcntl.LOCK_EX)  # another process may want the same
            _cut_torn_line(self.log)
            begun = self._begun()
            if not begun.suffices(wanted):
                self._go_on(begun, wanted, what)
        return _first(self._entries(), wanted)

    def there(self, wanted: int | None) -> Iterator[dict[str, Any]] | None:
        """The same if it has all been read before, otherwise None; nothing is written and no network asked."""
        if not self._above.exists():  # local files need not be read to know the folder's name
            return None
        return _first(self._entries(), wanted) if self._begun().suffices(wanted) else None

    def _begun(self) -> _Begun:
        kept = file = row = 0
        for entry in self._entries():
            if "end" in entry:
                return _Begun(kept, file, row, ended=True)
            kept += "left_out" not in entry
            file, row = entry["file"], entry["row"] + 1
        return _Begun(kept, file, row)

    def _entries(self) -> Iterator[dict[str, Any]]:
        if self.log.exists():
            with open(self.log, encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):
                    if not line.endswith("\n"):  # another process has not ended it, or was killed
                        return
                    try:
                        yield json.loads(line)
                    except ValueError as error:
                        raise UserError(f"line {number} of {self.log} is damaged: delete {self.folder}") from error

    @property
    def commit(self) -> str | None:
        """The commit that is read, that of the first time: all rows are of one state; None for local files."""
        return json.loads(self.about.read_text(encoding="utf-8"))["commit"]

    def _commit(self) -> str | None:
        if not self.about.exists():
            commit = self.dataset.commit()
            with writing(self.folder):
                write_json(self.about, {"path": self.dataset.path, "split": self.dataset.split, "commit": commit})
        return self.commit

    def _go_on(self, begun: _Begun, wanted: int | None, what: str) -> None:
        """Reads from there on until so many rows are kept."""
        from tqdm import tqdm

        kept = begun.kept
        stream, names = self.dataset.stream(self.needed, self.optional, self._commit())
        total = _smaller(wanted, _length(stream))
        room = _Room(self.folder, None if total is None else total - kept, what)
        with (
            open(self.log, "ab", buffering=0) as log,
            tqdm(total=total, initial=kept, desc=f"reading {what}", unit=what.removesuffix("s")) as bar,
            self.dataset.reading(),
        ):
            for entry in self._picked(stream, names, begun):
                if "left_out" not in entry:
                    entry = self._written(entry, room)
                    kept += 1
                    bar.update()
                self._append(log, entry)
                if kept == wanted:
                    return
            self._append(log, {"end": True})

    def _picked(self, stream: IterableDataset, names: list[str], begun: _Begun) -> Iterator[dict[str, Any]]:
        """The place of each row from there on, and what is kept of it or why it is left out."""
        nothing = begun.kept == 0
        for read, (entry, values, where) in enumerate(self._unread(stream, names, begun), start=1):
            taken = self.pick(values, where)
            if not isinstance(taken, str):
                nothing = False
                yield entry | taken
                continue
            if nothing and read == FRUITLESS:
                raise UserError(f"{self.dataset.path}: the first {read} rows, up to {where}, are all {taken}")
            yield entry | {"left_out": taken, "where": where}

    def _unread(
        self, stream: IterableDataset, names: list[str], begun: _Begun
    ) -> Iterator[tuple[dict[str, Any], dict[str, Any], str]]:
        """Place, values, and place in words of each row from there on."""
        files = order(self.seed, 0, stream.num_shards)
        for file in range(begun.file, len(files)):
            part, skipped = stream.shard(len(files), files[file]), begun.row if file == begun.file else 0
            name = names[files[file]] if len(names) == len(files) else f"part {files[file]}"
            for row, values in enumerate(part.skip(skipped) if skipped else part, start=skipped):
                yield {"file": file, "row": row}, values, f"row {row} of {name}"

    def _append(self, log: Any, entry: dict[str, Any]) -> None:
        line = json.dumps(entry).encode() + b"\n"
        with writing(self.folder):
            if log.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _written(self, taken: dict[str, Any], room: _Room) -> dict[str, Any]:
        """The entry with paths for images, which are on the disk then."""
        size, entry = 0, {}
        for key, value in taken.items():
            if isinstance(value, bytes):
                digest = hashlib.sha256(value).hexdigest()
                entry[key] = f"{digest[:2]}/{digest}"
                file = self.images / entry[key]
                size += len(value)
                if not file.exists():
                    with writing(self.folder), replacing(file) as temporary:
                        temporary.write_bytes(value)
            else:
                entry[key] = value
        room.taken(size)
        return entry


class _Begun(NamedTuple):
    """Progress of a log.

    Args:
        kept: rows that were kept.
        file, row: place of the next row to read, in the order of reading.
        ended: whether there is none.
    """

    kept: int = 0
    file: int = 0
    row: int = 0
    ended: bool = False

    def suffices(self, wanted: int | None) -> bool:
        return self.ended or (wanted is not None and self.kept >= wanted)


def _first(entries: Iterable[dict[str, Any]], wanted: int | None) -> Iterator[dict[str, Any]]:
    kept = 0
    for entry in entries:
        if "end" in entry:
            return
        yield entry
        kept += "left_out" not in entry
        if kept == wanted:
            return


class _Room:
    """Measures the first rows, then says how much the others need, and refuses what the disk cannot hold."""

    def __init__(self, folder: Path, rows: int | None, what: str):
        self.folder, self.rows, self.what = folder, rows, what
        self.n = self.size = 0

    def taken(self, size: int) -> None:
        from tqdm import tqdm

        self.n, self.size = self.n + 1, self.size + size
        if self.n != MEASURED or self.rows is None or self.rows <= MEASURED:
            return
        needed, free = self.size / self.n * (self.rows - self.n), free_bytes(self.folder)
        tqdm.write(f"data    {self.rows} {self.what} take about {needed / 2**30:.2g} GiB in {self.folder}")
        if needed > free:
            raise UserError(
                f"{self.rows} {self.what} need about {needed / 2**30:.1f} GiB more, and {self.folder} has "
                f"{free / 2**30:.1f} GiB left: make room, choose another place with cache_dir=<folder>, or take fewer"
            )


def _cut_torn_line(log: Path) -> None:
    """Removes the part of a line that a killed process has left."""
    if log.exists():
        with open(log, "rb+") as file:
            end = file.seek(0, os.SEEK_END)
            start = max(0, end - 2**20)  # lines are shorter
            file.seek(start)
            file.truncate(start + file.read().rfind(b"\n") + 1)


def _length(rows: IterableDataset) -> int | None:
    splits = rows.info.splits
    return splits[str(rows.split)].num_examples if splits and str(rows.split) in splits else None


def _smaller(first: int | None, second: int | None) -> int | None:
    return min((n for n in (first, second) if n), default=None)
