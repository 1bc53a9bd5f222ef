"""The file of all metrics, a row per step."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from dpo_sd.errors import UserError
from dpo_sd.files.atomic import replacing


class MetricsFile(Logger):
    """`metrics.csv`: a row per step, a column per metric, on disk as soon as it is logged.

    A run that is continued drops the rows after its checkpoint first, so that the file ends as if nothing had happened.
    """

    def __init__(self, file: Path):
        super().__init__()
        self.file = file
        self.rows: list[dict[str, str]] = []
        self.columns = ["step"]

    @property
    def name(self) -> str:
        return "metrics.csv"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """config.yaml has them."""

    @rank_zero_only
    def resume(self, step: int) -> None:
        """Keeps the rows of an earlier start up to and including `step`, and drops those after it."""
        if self.file.exists():
            try:
                with self.file.open(newline="", encoding="utf-8") as file:
                    reader = csv.DictReader(file)
                    self.columns = list(reader.fieldnames or ["step"])
                    # a row that was being written when the run was killed may lack its end
                    self.rows = [row for row in reader if None not in row.values() and int(row["step"]) <= step]
            except (ValueError, KeyError, csv.Error) as error:
                raise UserError(f"{self.file} is damaged ({error!r}): move it away to continue without it") from error
            self._rewrite()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {"step": str(step), **{name: repr(float(value)) for name, value in metrics.items()}}
        self.rows.append(row)
        if new := [name for name in row if name not in self.columns]:
            self.columns += new
            self._rewrite()
        else:
            with self.file.open("a", newline="") as file:
                csv.DictWriter(file, self.columns, restval="").writerow(row)

    def _rewrite(self) -> None:
        with replacing(self.file) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, restval="")
            writer.writeheader()
            writer.writerows(self.rows)
