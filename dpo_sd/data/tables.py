"""Datasets in columns: on the Hub, or in local parquet files."""

from __future__ import annotations

import functools
import glob
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_sd.errors import UserError
from dpo_sd.files.hashes import sha256
from dpo_sd.models.hub import PICK_A_PIC, hub_errors, no_consent, not_there

if TYPE_CHECKING:
    from datasets import IterableDataset

# columns of which one must be there, by the setting that names it
Needed = Mapping[str, Sequence[str]]
_INSTEAD = "a local folder of parquet files as data.path"


class TabularDataset:
    """A dataset on the Hub, a local folder of parquet files in the same layout, or one such file.

    Args:
        path: `owner/name`, folder or file.
        split: name of the part to read.
        revision: branch, tag or commit of a repository; None takes its main branch as it is when it is first read.

    Raises:
        UserError: if it can be no dataset.
    """

    def __init__(self, path: str, split: str = "train", revision: str | None = None):
        self.path, self.split, self.revision = path, split, revision
        if not path:
            raise UserError("path is empty: name a folder, a file, or a dataset on the Hub")
        self._local = Path(path).expanduser()
        if self._local.exists():
            if revision is not None:
                raise UserError(f"{path} is on this computer and has no revision={revision}: leave it out")
        elif not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
            raise UserError(
                f"{path}: there is no such folder or file, and a dataset on the Hub is written owner/name, "
                f"as {PICK_A_PIC}"
            )

    @functools.cached_property
    def files(self) -> list[Path] | None:
        """The parquet files of the split; None on the Hub, where they are known once it is asked.

        Raises:
            UserError: if a local folder has none, or no such split.
        """
        if not self._local.exists():
            return None
        if linked := next(self._linked(), None):
            raise UserError(
                f"{linked} is a link to a folder, and parquet files are not read through it: link the files"
            )
        whole = self._local.absolute()
        if not (found := [whole] if whole.is_file() else _parquet_files(whole)):
            raise UserError(f"{self._local} holds no parquet file")
        if chained := next((file for file in found if "::" in str(file)), None):  # fsspec's sign
            raise UserError(f"{chained} has :: in its name, which the reader takes for two addresses: rename it")
        if whole.is_file():
            return [self._local]
        from datasets import load_dataset_builder

        try:
            files = load_dataset_builder("parquet", data_dir=glob.escape(str(self._local))).config.data_files or {}
        except (OSError, ValueError) as error:
            raise UserError(f"{self._local} cannot be read: {str(error).splitlines()[0]}") from error
        self._check_split(files)
        return [Path(file) for file in files[self.split]]

    def _linked(self) -> Iterator[Path]:
        """The links in the folder that lead to folders with parquet files."""
        links = (Path(place, name) for place, folders, _ in os.walk(self._local) for name in folders)
        yield from (link for link in links if link.is_symlink() and _parquet_files(link))

    def _check_split(self, splits: Iterable[Any]) -> None:
        splits = [str(split) for split in splits]
        if self.split not in splits:
            raise UserError(
                f"{self.path} has no split {self.split}: it has {', '.join(splits)}; write data.split=<one of them>"
            )

    def length(self, needed: Needed) -> int | None:
        """Rows of local files, by their metadata alone; None on the Hub, where nothing is asked.

        Args:
            needed: columns.

        Raises:
            UserError: if a file is no parquet file, or a column is missing, naming those that there are.
        """
        if self.files is None:
            return None
        rows = 0
        for file in self.files:
            columns, n = _metadata(file)
            if n:
                check_columns(needed, columns, str(file))
            rows += n
        return rows

    def identity(self) -> list[str | None]:
        """The values that tell it from other datasets: for local files their hashes, wherever they lie."""
        if self.files is None:
            return [self.path, self.split, self.revision]
        return [sha256(file) for file in self.files]

    def commit(self) -> str | None:
        """The commit that the revision means now; None for local files.

        Raises:
            UserError: if the Hub cannot be reached, or has no such dataset.
        """
        if self.files is not None:
            return None
        from huggingface_hub import HfApi

        with self.reading():
            return HfApi().dataset_info(self.path, revision=self.revision, timeout=10).sha

    def stream(self, needed: Needed, optional: Sequence[str], commit: str | None) -> tuple[IterableDataset, list[str]]:
        """Its rows, images undecoded, and the names of its files.

        Args:
            needed, optional: columns; those of the latter that are there are read too.
            commit: hash of a repository's commit.

        Raises:
            UserError: if it cannot be read, or a column is missing.
        """
        from datasets import load_dataset_builder

        with self.reading():
            if self.files is None:
                builder = load_dataset_builder(self.path, revision=commit)
            else:
                files = [file for file in self.files if _metadata(file)[1]]  # the reader fails where there is no row
                if not files:
                    raise UserError(f"{self.path} has no rows")
                patterns = [glob.escape(str(file)) for file in files]
                types = _types(files, {*optional}.union(*needed.values()))
                builder = load_dataset_builder("parquet", data_files={self.split: patterns}, **types)
            data_files = builder.config.data_files or {}
            if data_files:
                self._check_split(data_files)
            rows: Any = builder.as_streaming_dataset(split=self.split)
            names = rows.column_names or list(next(iter(rows)))
            check_columns(needed, names, self.path)
            wanted = {*optional}.union(*needed.values())
            rows = rows.select_columns([column for column in names if column in wanted])
            return (rows.decode(False) if rows.features else rows), [
                Path(str(file)).name for file in data_files.get(self.split, [])
            ]

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turns errors of reading into one line that says what to do.

        Raises:
            UserError: if something goes wrong inside.
        """
        from datasets.exceptions import DatasetNotFoundError
        from pyarrow import ArrowException

        with hub_errors(self.path, _INSTEAD, "dataset ", self.revision, self._unreadable):
            try:
                yield
            except DatasetNotFoundError as error:
                gated = "is a gated dataset" in str(error)
                raise (no_consent(self.path) if gated else not_there(self.path, _INSTEAD, "dataset ")) from error
            except ArrowException as error:
                raise ValueError(error) from error
            except TypeError as error:
                if "Couldn't cast" not in str(error):
                    raise
                raise UserError(f"{self.path} has a column of other types in one file than another: {error}") from error

    def _unreadable(self, error: Exception, offline: bool) -> str:
        message = next(iter(str(error).splitlines()), type(error).__name__)
        if self.files is not None:
            return f"{self.path} cannot be read: {message}"
        why = "HF_HUB_OFFLINE is set" if offline else f"the Hub cannot be read ({message})"
        return f"{self.path}: {why}; start again with a network, which goes on where this ended, or give {_INSTEAD}"


def check_columns(needed: Needed, there: Sequence[str], where: str) -> None:
    """Refuses a table that lacks a column.

    Args:
        there: names of its columns.
        where: name of the table, for the message.

    Raises:
        UserError: if one is missing, naming the columns that there are, and the setting that names another.
    """
    for setting, columns in needed.items():
        if not set(columns) & set(there):
            raise UserError(
                f"{where} has no column {' or '.join(columns)}: name it with {setting}=<column>; it has "
                f"{', '.join(there)}"
            )


def _types(files: Sequence[Path], wanted: set[str]) -> dict[str, Any]:
    """Settings of the reader with the types that the wanted columns have in all files together.

    The reader would take those of the first file, in which a column may have no value, and so no type.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Features

    schemas = []
    for file in files:
        with _opening(file):
            schemas.append(pq.read_schema(file))
    if all(schema.equals(schemas[0]) for schema in schemas):
        return {}
    schemas = [pa.schema([field for field in schema if field.name in wanted], schema.metadata) for schema in schemas]
    together = schemas[0]
    for file, schema in zip(files, schemas, strict=True):
        if apart := set(schema.names) ^ set(together.names):
            raise UserError(f"{file} and {files[0].name} do not both have the column {min(apart)}: give it to both")
        try:
            together = pa.unify_schemas([together, schema], promote_options="permissive")
        except pa.ArrowException as error:
            raise UserError(f"{file} has a column of another type than the files before it: {error}") from error
    return {"columns": together.names, "features": Features.from_arrow_schema(together)}


def _parquet_files(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.suffix.lower() == ".parquet"]


def read_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a parquet file.

    Raises:
        UserError: if it is no parquet file, or damaged.
    """
    import pyarrow.parquet as pq

    with _opening(file):
        for batch in pq.ParquetFile(file).iter_batches():
            yield from batch.to_pylist()


@contextmanager
def _opening(file: Path) -> Iterator[None]:
    """Turns errors of a parquet file into one line that names it."""
    import pyarrow as pa

    try:
        yield
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise UserError(f"{file} is no parquet file, or it is damaged: {str(error).splitlines()[0]}") from error


def _metadata(file: Path) -> tuple[list[str], int]:
    """Names of the columns, and number of rows, of a parquet file."""
    import pyarrow.parquet as pq

    with _opening(file):
        metadata = pq.read_metadata(file)
        return metadata.schema.to_arrow_schema().names, metadata.num_rows
