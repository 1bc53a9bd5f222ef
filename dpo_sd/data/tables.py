"""Datasets in columns: on the Hub, or in local parquet files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_sd.errors import UserError
from dpo_sd.files.hashes import sha256

if TYPE_CHECKING:
    from datasets import IterableDataset

# columns of which one must be there, by the setting that names it
Needed = Mapping[str, Sequence[str]]


class TabularDataset:
    """A dataset on the Hub, a local folder of parquet files in the same layout, or one such file.

    Args:
        path: `owner/name`, folder or file.
        split: which part.
        revision: branch, tag or commit of a repository; None takes its main branch as it is when it is first read.

    Raises:
        UserError: when it cannot be one, there is no such split, or a file is no parquet file.
    """

    def __init__(self, path: str, split: str = "train", revision: str | None = None):
        self.path, self.split, self.revision = path, split, revision
        local = Path(path).expanduser()
        self.files: list[Path] | None = None  # on the Hub, they are known once it is asked
        if local.exists():
            if revision is not None:
                raise UserError(f"{path} is on this computer and has no revision={revision}: leave it out")
            self.files = self._local_files(local)
            self._schemas = {file: _schema(file) for file in self.files}
        elif not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
            raise UserError(
                f"{path}: there is no such folder or file, and a dataset on the Hub is written owner/name, "
                "as yuvalkirstain/pickapic_v2"
            )

    def _local_files(self, local: Path) -> list[Path]:
        if local.is_file():
            return [local]
        if not any(local.rglob("*.parquet")):
            raise UserError(f"{local} holds no parquet file")
        from datasets import load_dataset_builder

        files = load_dataset_builder("parquet", data_dir=str(local)).config.data_files or {}
        self._check_split(files)
        return [Path(file) for file in files[self.split]]

    def _check_split(self, splits: Iterable[Any]) -> None:
        splits = [str(split) for split in splits]
        if self.split not in splits:
            raise UserError(
                f"{self.path} has no split {self.split}: it has {', '.join(splits)}; write data.split=<one of them>"
            )

    def check(self, needed: Needed) -> None:
        """Refuses a local dataset in which a column is missing; one on the Hub is checked when it is read.

        Args:
            needed: columns.

        Raises:
            UserError: when one is missing, naming those that there are.
        """
        for file in self.files or []:
            check_columns(needed, self._schemas[file], str(file))

    def identity(self) -> list[str | None]:
        """What tells it from other datasets: of local files their content, wherever they lie."""
        if self.files is None:
            return [self.path, self.split, self.revision]
        return [sha256(file) for file in self.files]

    def commit(self) -> str | None:
        """The commit that the revision means now; None for local files.

        Raises:
            UserError: when the Hub cannot be reached, or has no such dataset.
        """
        if self.files is not None:
            return None
        from huggingface_hub import HfApi

        with self._reading():
            return HfApi().dataset_info(self.path, revision=self.revision, timeout=10).sha

    def stream(self, needed: Needed, optional: Sequence[str], commit: str | None) -> tuple[IterableDataset, list[str]]:
        """Its rows, pictures undecoded, and the names of its files.

        Args:
            needed, optional: columns; those of the latter that are there are read too.
            commit: of a repository.

        Raises:
            UserError: when it cannot be read, or a column is missing.
        """
        from datasets import load_dataset_builder

        with self._reading():
            if self.files is None:
                builder = load_dataset_builder(self.path, revision=commit)
            else:
                builder = load_dataset_builder("parquet", data_files={self.split: [str(file) for file in self.files]})
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
    def _reading(self) -> Iterator[None]:
        """Turns what goes wrong into one line that says what to do."""
        from datasets.exceptions import DatasetNotFoundError
        from huggingface_hub import constants
        from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError
        from pyarrow import ArrowException

        try:
            yield
        except UserError:
            raise
        except RevisionNotFoundError as error:
            raise UserError(f"{self.path} has no revision {self.revision} on the Hub") from error
        except (RepositoryNotFoundError, DatasetNotFoundError) as error:
            if isinstance(error, GatedRepoError) or "is a gated dataset" in str(error):
                why = f"{self.path} asks for consent: accept its terms on its page, then hf auth login"
            else:
                why = f"the Hub has no public dataset {self.path}: check its name, or hf auth login"
            raise UserError(why) from error
        except (HTTPError, ArrowException, OSError, ValueError) as error:
            message = next(iter(str(error).splitlines()), type(error).__name__)
            if self.files is not None:
                raise UserError(f"{self.path} cannot be read: {message}") from error
            why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"the Hub cannot be read ({message})"
            raise UserError(
                f"{self.path}: {why}; start again with a network, which goes on where this ended, or give a local "
                "folder of parquet files as data.path"
            ) from error


def check_columns(needed: Needed, there: Sequence[str], where: str) -> None:
    """Refuses what lacks a column.

    Raises:
        UserError: naming the columns that there are, and the setting that names another.
    """
    for setting, columns in needed.items():
        if not set(columns) & set(there):
            raise UserError(
                f"{where} has no column {' or '.join(columns)}: name it with {setting}=<column>; it has "
                f"{', '.join(there)}"
            )


def _schema(file: Path) -> list[str]:
    """Names of the columns of a parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_schema(file).names
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file} is no parquet file, or it is damaged: {str(error).splitlines()[0]}") from error
