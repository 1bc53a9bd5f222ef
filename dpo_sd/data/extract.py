"""Rows of a dataset that is streamed, never fetched whole; what is taken of them stays as files."""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo_sd.errors import UserError
from dpo_sd.files.atomic import replacing, write_json
from dpo_sd.files.tensors import content_key
from dpo_sd.noise import order

if TYPE_CHECKING:
    from datasets import IterableDataset

    from dpo_sd.data.tables import Needed, TabularDataset

# of a row and its place, in words: what is kept of it, pictures as bytes; or why it is left out
Pick = Callable[[dict[str, Any], str], dict[str, Any] | str]
MEASURED = 32  # rows after which it is known how much room the others need
FRUITLESS = 1000  # rows of which none can be used, after which nothing better is expected
UNSEEN = b"unread"  # stands for a picture


class Extract:
    """What `pick` takes of the rows of a dataset, as files in a folder.

    The dataset's files are read in an order that the seed decides, and their rows as they stand. A log gets one line
    for every row, after its pictures are on the disk, so that a killed extraction goes on at the next row and ends in
    the same folder. More rows can be wanted later; the first ones stay the same.

    Args:
        dataset: where rows come from.
        folder: what is kept is in a folder of its own in this one, named by what decides it.
        needed: columns that `pick` reads.
        optional: columns that it reads where there are such.
        pick: what is kept of a row.
        settings: all that `pick` depends on, beside the row.
        seed: of the order of the dataset's files.
    """

    def __init__(
        self,
        dataset: TabularDataset,
        folder: Path,
        needed: Needed,
        optional: Sequence[str],
        pick: Pick,
        settings: Any,
        seed: int,
    ):
        self.dataset, self.needed, self.optional, self.pick, self.seed = dataset, needed, optional, pick, seed
        self._above, self._settings = folder, settings

    @functools.cached_property
    def folder(self) -> Path:
        """Of what is kept; its name depends on the content of local files, which are read for it."""
        identity = self.dataset.identity()
        return self._above / content_key(kind="extract 1", dataset=identity, settings=self._settings, seed=self.seed)

    @property
    def images(self) -> Path:
        return self.folder / "images"

    @property
    def log(self) -> Path:
        return self.folder / "rows.jsonl"

    @property
    def about(self) -> Path:
        return self.folder / "of.json"

    def rows(self, wanted: int | None, what: str) -> Iterator[dict[str, Any]]:
        """What was kept of the rows, until `wanted` of them are there, and in between what was left out.

        A kept row has what `pick` returned, with paths below `images` for pictures; one that was left out has
        `left_out`, why, and `where`. Only what is missing is read from the dataset.

        Args:
            wanted: None means all rows.
            what: rows are called in messages.

        Raises:
            UserError: when the dataset cannot be read, nothing in it can be used, or there is no room.
        """
        with _writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = open(self.folder / "lock", "w")  # noqa: SIM115 - closed below
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another process may want the same
            _cut_torn_line(self.log)
            begun = self._begun()
            if not begun.suffices(wanted):
                self._go_on(begun, wanted, what)
        return _first(self._entries(), wanted)

    def foreseen(self, wanted: int | None) -> Iterator[dict[str, Any]] | None:
        """What `rows` would give, with nothing written and no network; None where that would have to be fetched.

        Local files are read but for their pictures: each is taken to be there, with its place in words for a path.

        Raises:
            UserError: as `rows`.
        """
        if self.dataset.files is not None:
            return _first(self._glimpsed(self.dataset.files), wanted)
        return _first(self._entries(), wanted) if self._begun().suffices(wanted) else None

    def _glimpsed(self, files: Sequence[Path]) -> Iterator[dict[str, Any]]:
        def pick(values: dict[str, Any], where: str) -> dict[str, Any] | str:
            taken = self.pick(values, where)
            if isinstance(taken, str):
                return taken
            return {name: f"{name} of {where}" if value is UNSEEN else value for name, value in taken.items()}

        texts = _Texts(files, {*self.optional}.union(*self.needed.values()))
        with self.dataset._reading():
            yield from self._picked(pick, texts, [file.name for file in files], _Begun())

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

    def _commit(self) -> str | None:
        """The commit that was read first, so that all rows are of one state of the dataset."""
        if not self.about.exists():
            commit = self.dataset.commit()
            with _writing(self.folder):
                write_json(self.about, {"path": self.dataset.path, "split": self.dataset.split, "commit": commit})
        return json.loads(self.about.read_text(encoding="utf-8"))["commit"]

    def _go_on(self, begun: _Begun, wanted: int | None, what: str) -> None:
        """Reads from there on, as many as are wanted."""
        from tqdm import tqdm

        kept = begun.kept
        stream, names = self.dataset.stream(self.needed, self.optional, self._commit())
        total = _smaller(wanted, _length(stream))
        room = _Room(self.folder, None if total is None else total - kept, what)
        with (
            open(self.log, "ab", buffering=0) as log,
            tqdm(total=total, initial=kept, desc=f"reading {what}", unit=what.removesuffix("s")) as bar,
            self.dataset._reading(),
        ):
            for entry in self._picked(self.pick, stream, names, begun):
                if "left_out" not in entry:
                    entry = self._written(entry, room)
                    kept += 1
                    bar.update()
                self._append(log, entry)
                if kept == wanted:
                    return
            self._append(log, {"end": True})

    def _picked(self, pick: Pick, stream: Any, names: list[str], begun: _Begun) -> Iterator[dict[str, Any]]:
        """Place of each row from there on, and what is kept of it, or why it is left out."""
        nothing = begun.kept == 0
        for read, (entry, values, where) in enumerate(self._unread(stream, names, begun.file, begun.row), start=1):
            taken = pick(values, where)
            if not isinstance(taken, str):
                nothing = False
                yield entry | taken
                continue
            if nothing and read == FRUITLESS:
                raise UserError(f"{self.dataset.path}: the first {read} rows are all {taken}")
            yield entry | {"left_out": taken, "where": where}

    def _unread(
        self, stream: Any, names: list[str], first_file: int, first_row: int
    ) -> Iterator[tuple[dict[str, Any], dict[str, Any], str]]:
        """The rows from there on: place, values, and place in words."""
        files = order(self.seed, 0, stream.num_shards)
        for file in range(first_file, len(files)):
            part, skipped = stream.shard(len(files), files[file]), first_row if file == first_file else 0
            name = names[files[file]] if len(names) == len(files) else f"part {files[file]}"
            for row, values in enumerate(part.skip(skipped) if skipped else part, start=skipped):
                yield {"file": file, "row": row}, values, f"row {row} of {name}"

    def _append(self, log: Any, entry: dict[str, Any]) -> None:
        line = json.dumps(entry).encode() + b"\n"
        with _writing(self.folder):
            if log.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _written(self, taken: dict[str, Any], room: _Room) -> dict[str, Any]:
        """The same with paths for pictures, which are on the disk then."""
        size, entry = 0, {}
        for key, value in taken.items():
            if isinstance(value, bytes):
                digest = hashlib.sha256(value).hexdigest()
                entry[key] = f"{digest[:2]}/{digest}"
                file = self.images / entry[key]
                size += len(value)
                if not file.exists():
                    with _writing(self.folder), replacing(file) as temporary:
                        temporary.write_bytes(value)
            else:
                entry[key] = value
        room.taken(size)
        return entry


class _Begun(NamedTuple):
    """How far a log has come: rows kept, and the row of the file that follows."""

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


class _Texts:
    """Local parquet files as a stream of rows whose pictures stay unread, with `UNSEEN` in their place.

    Args:
        files: one shard each.
        wanted: columns, those of them that a file has.
    """

    def __init__(self, files: Sequence[Path], wanted: Container[str]):
        self.files, self.wanted, self.num_shards = files, wanted, len(files)

    def shard(self, num_shards: int, index: int) -> Iterator[dict[str, Any]]:
        import pyarrow.parquet as pq
        from pyarrow.types import is_binary, is_large_binary, is_struct

        with pq.ParquetFile(self.files[index]) as file:
            texts, unseen = [], {}
            for column in file.schema_arrow:
                if column.name not in self.wanted:
                    continue
                if is_binary(column.type) or is_large_binary(column.type) or is_struct(column.type):
                    unseen[column.name] = UNSEEN
                else:
                    texts.append(column.name)
            for batch in file.iter_batches(columns=texts):
                yield from (row | unseen for row in batch.to_pylist())


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
        needed, free = self.size / self.n * (self.rows - self.n), shutil.disk_usage(self.folder).free
        tqdm.write(f"data    {self.rows} {self.what} take about {needed / 2**30:.2g} GiB in {self.folder}")
        if needed > free:
            raise UserError(
                f"{self.rows} {self.what} need about {needed / 2**30:.1f} GiB more, and {self.folder} has "
                f"{free / 2**30:.1f} GiB left: make room, choose another place with cache_dir=<folder>, or take fewer"
            )


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error}): make room, or choose another place with cache_dir=<folder>; "
            "what is complete is kept"
        ) from error


def _cut_torn_line(log: Path) -> None:
    """Takes away what a killed process has left of a line."""
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


def picture_bytes(value: Any, column: str, where: str) -> bytes | None:
    """The bytes of a picture as a dataset holds it; None where there is none.

    Args:
        value: bytes, or `{"bytes": …, "path": …}` with bytes or with a path on the Hub.

    Raises:
        UserError: when it is no picture.
    """
    if isinstance(value, dict) and value.keys() >= {"bytes", "path"}:
        if value["bytes"] is None and "://" in (value["path"] or ""):
            import fsspec

            with fsspec.open(value["path"], "rb") as file:
                return file.read()  # type: ignore[union-attr]
        value = value["bytes"]
    if value is not None and not isinstance(value, bytes):
        raise UserError(f"{where}: column {column} holds {type(value).__name__}, not pictures")
    return value or None


class Tally:
    """Tells rows that were kept from those that were left out, and counts the latter.

    Args:
        named: reasons whose first five rows are named.
    """

    def __init__(self, named: Sequence[str]):
        self.named = named
        self.read = 0
        self.left_out: Counter[str] = Counter()
        self.places: dict[str, list[str]] = {}

    def kept(self, entries: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for entry in entries:
            self.read += 1
            if "left_out" not in entry:
                yield entry
                continue
            reason = entry["left_out"]
            self.left_out[reason] += 1
            if reason in self.named and self.left_out[reason] <= 5:
                self.places.setdefault(reason, []).append(entry["where"])

    def __str__(self) -> str:
        """`120 rows read; left out: 12 tied, 2 without a caption (row 5 of a.parquet; row 9 of a.parquet)`"""
        said = []
        for reason, n in self.left_out.most_common():
            places = "; ".join(self.places.get(reason, [])) + (" …" if reason in self.places and n > 5 else "")
            said.append(f"{n} {reason}" + (f" ({places})" if places else ""))
        return f"{self.read} rows read" + (f"; left out: {', '.join(said)}" if said else "")
