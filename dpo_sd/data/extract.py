"""Rows of a dataset that is streamed, never fetched whole; what is taken of them stays as files."""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo_sd.errors import UserError
from dpo_sd.files.atomic import replacing, write_json
from dpo_sd.files.claims import take_turn
from dpo_sd.files.hashes import read_sha256
from dpo_sd.files.images import facts
from dpo_sd.files.json_lines import parse_object
from dpo_sd.files.room import free_bytes, writing
from dpo_sd.files.tensors import content_key
from dpo_sd.noise import order

if TYPE_CHECKING:
    from datasets import IterableDataset

    from dpo_sd.data.tables import Needed, TabularDataset

# of a row and its place, in words: what is kept of it, images as bytes; or why it is left out
Pick = Callable[[dict[str, Any], str], dict[str, Any] | str]
MEASURED = 32  # rows after which it is known how much room the others need
_PICTURE = re.compile(r"([0-9a-f]{2})/(\1[0-9a-f]{62})")  # path of an image, whose name is its SHA-256
FRUITLESS = 1000  # rows of which none can be used, after which nothing better is expected


class Extract:
    """The part of a dataset that `pick` takes, as files in a folder.

    The dataset's files are read in an order that the seed decides, and their rows as they stand. A log gets one line
    for every row, after its images are on the disk, so that a killed extraction goes on at the next row and ends in
    the same folder. More rows can be wanted later; the first ones stay the same. What is damaged or gone in the folder
    is read anew.

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
            begun = self._begun()
            self._cut(begun.size, what)
            broken = self._broken(wanted)
            if broken or not begun.suffices(wanted):
                if not self._of_one_commit(what):
                    begun, broken = _Begun(), set()
                self._mend(broken, what)
                if not begun.suffices(wanted):
                    self._go_on(begun, wanted, what)
        return _first(self._entries(), wanted)

    def there(self, wanted: int | None) -> Iterator[dict[str, Any]] | None:
        """The same if it has all been read before, otherwise None; nothing is written and no network asked."""
        if not self._above.exists():  # local files need not be read to know the folder's name
            return None
        whole = self._begun().suffices(wanted) and not self._broken(wanted)
        return _first(self._entries(), wanted) if whole else None

    def _begun(self) -> _Begun:
        kept = file = row = size = 0
        for entry, size in self._lines():
            if "end" in entry:
                return _Begun(kept, file, row, size, ended=True)
            kept += "left_out" not in entry
            file, row = entry["file"], entry["row"] + 1
        return _Begun(kept, file, row, size)

    def _cut(self, size: int, what: str) -> None:
        """Removes from the log what follows its sound lines, as a killed process leaves it, or a disk."""
        if self.log.exists():
            with open(self.log, "rb+") as file:
                file.seek(size)
                if b"\n" in file.read():  # more than a line that was not ended
                    _say(f"{self.log} is damaged behind byte {size}: the {what} from there on are read anew")
                file.truncate(size)

    def _broken(self, wanted: int | None) -> set[tuple[int, int]]:
        """File and row of the rows with an image that is gone, or is no longer the one that its name says."""
        images = (
            ((entry["file"], entry["row"]), path)
            for entry in _first(self._entries(), wanted)
            for path in _images(entry)
        )
        images, again = itertools.tee(images)  # one by one: a million paths are not for the memory
        known = facts(self.images / path for _, path in again)
        return {place for (place, path), fact in zip(images, known, strict=True) if fact.sha256 != path[3:]}

    def _entries(self) -> Iterator[dict[str, Any]]:
        return (entry for entry, _ in self._lines())

    def _lines(self) -> Iterator[tuple[dict[str, Any], int]]:
        """The entries up to the first line that is torn or damaged, each with the byte where it ends."""
        if self.log.exists():
            with open(self.log, "rb") as lines:
                place, end = (0, -1), 0
                for line in lines:
                    entry, end = _entry(line, place), end + len(line)
                    if entry is None:
                        return
                    yield entry, end
                    place = entry.get("file", 0), entry.get("row", 0)

    def _of_one_commit(self, what: str) -> bool:
        """Whether it is known which commit the log's rows are of; otherwise it begins anew, with the present one."""
        with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
            if isinstance(self.commit, str | None):
                return True
        if self.log.exists():
            _say(f"{self.about} is damaged or gone: the {what} are read anew")
        commit = self.dataset.commit()
        with writing(self.folder):
            self.log.unlink(missing_ok=True)
            write_json(self.about, {"path": self.dataset.path, "split": self.dataset.split, "commit": commit})
        return False

    @property
    def commit(self) -> str | None:
        """The commit that is read, that of the first time: all rows are of one state; None for local files."""
        return json.loads(self.about.read_text(encoding="utf-8"))["commit"]

    def _mend(self, broken: set[tuple[int, int]], what: str) -> None:
        """Reads the images of those rows again."""
        if not broken:
            return
        _say(f"{len(broken)} {what} in {self.folder} have pictures that are damaged or gone, and are read anew")
        stream, names = self.dataset.stream(self.needed, self.optional, self.commit)
        with self.dataset.reading():
            for place, values, where in self._unread(stream, names, _Begun(0, *min(broken))):
                if (place["file"], place["row"]) in broken:
                    taken = self.pick(values, where)
                    if not isinstance(taken, str):
                        self._written(taken, _Room(self.folder, None, what))
                    if (place["file"], place["row"]) == max(broken):
                        return

    def _go_on(self, begun: _Begun, wanted: int | None, what: str) -> None:
        """Reads from there on until so many rows are kept."""
        from tqdm import tqdm

        kept = begun.kept
        stream, names = self.dataset.stream(self.needed, self.optional, self.commit)
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
        """The entry with paths for images, which are whole on the disk then."""
        size, entry = 0, {}
        for key, value in taken.items():
            if isinstance(value, bytes):
                digest = hashlib.sha256(value).hexdigest()
                entry[key] = f"{digest[:2]}/{digest}"
                file = self.images / entry[key]
                size += len(value)
                with writing(self.folder):
                    if not file.exists() or read_sha256(file) != digest:
                        with replacing(file) as temporary:
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
        size: bytes of its sound lines.
        ended: whether there is none.
    """

    kept: int = 0
    file: int = 0
    row: int = 0
    size: int = 0
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
        self.n, self.size = self.n + 1, self.size + size
        if self.n != MEASURED or self.rows is None or self.rows <= MEASURED:
            return
        needed, free = self.size / self.n * (self.rows - self.n), free_bytes(self.folder)
        _say(f"{self.rows} {self.what} take about {needed / 2**30:.2g} GiB in {self.folder}")
        if needed > free:
            raise UserError(
                f"{self.rows} {self.what} need about {needed / 2**30:.1f} GiB more, and {self.folder} has "
                f"{free / 2**30:.1f} GiB left: make room, choose another place with cache_dir=<folder>, or take fewer"
            )


def _entry(line: bytes, after: tuple[int, int]) -> dict[str, Any] | None:
    """The entry on a line of the log; None if the line is torn or damaged.

    Args:
        after: file and row of the entry before.
    """
    if not line.endswith(b"\n"):
        return None
    try:
        entry = parse_object(line)
        if entry == {"end": True}:
            return entry
        file, row = entry["file"], entry["row"]
        follows = row == after[1] + 1 if file == after[0] else file > after[0] and row == 0
        kept = {"left_out", "where"} <= entry.keys() or _images(entry)
        return entry if follows and kept else None
    except (ValueError, LookupError, TypeError):
        return None


def _images(entry: dict[str, Any]) -> list[str]:
    """The paths in an entry."""
    return [value for value in entry.values() if isinstance(value, str) and _PICTURE.fullmatch(value)]


def _say(line: str) -> None:
    from tqdm import tqdm

    tqdm.write(f"data    {line}")


def _length(rows: IterableDataset) -> int | None:
    splits = rows.info.splits
    return splits[str(rows.split)].num_examples if splits and str(rows.split) in splits else None


def _smaller(first: int | None, second: int | None) -> int | None:
    return min((n for n in (first, second) if n), default=None)
