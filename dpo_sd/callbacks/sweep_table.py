"""The table at the end of a sweep: a row per job with its overrides and results."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from dpo_sd.errors import UserError

JOB_NAME = "job.json"  # in each job's folder, because jobs may run in other processes or on other machines
COLUMNS = ("job", "overrides", "win rate", "score", "loss", "time", "error")


class SweepTable(Callback):
    """Hydra callback that ends a sweep in one table, printed and kept as sweep.md and sweep.csv in its folder.

    A failed job is a row of the table and makes the sweep end with exit code 1.
    """

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        error = None
        if job_return.status == JobStatus.FAILED:
            failure = job_return._return_value
            # the entry point has said a user's mistake in one line; anything else is a bug
            kind = "" if isinstance(failure, UserError) else f"{type(failure).__name__}: "
            error = kind + str(failure).partition("\n")[0]
            # a failed job would keep Hydra from calling on_multirun_end
            job_return.status = JobStatus.COMPLETED
            job_return.return_value = math.nan
        job = {"overrides": list(job_return.overrides or []), "error": error}
        folder = Path(config.hydra.runtime.output_dir)
        (folder / JOB_NAME).write_text(json.dumps(job, indent=2), encoding="utf-8")

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        rows = sweep_rows(folder)
        with (folder / "sweep.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(row.values() for row in rows)
        table = markdown(rows)
        (folder / "sweep.md").write_text(table, encoding="utf-8")
        print(table + f"\n{folder / 'sweep.md'}")
        if any(row["error"] for row in rows):
            raise SystemExit(1)


def sweep_rows(folder: Path) -> list[dict[str, str]]:
    """One row for each job of a sweep, keyed by `COLUMNS`, in the order of the jobs.

    Args:
        folder: folder of the sweep, in which each job has a folder with job.json and, if it got that far, summary.json.
    """
    paths = sorted(folder.glob(f"*/{JOB_NAME}"), key=lambda path: (len(path.parent.name), path.parent.name))
    jobs = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    shared = set.intersection(*(set(job["overrides"]) for job in jobs)) if len(jobs) > 1 else set()
    rows = []
    for path, job in zip(paths, jobs, strict=True):
        summary_path = path.parent / "summary.json"
        finished = not job["error"] and summary_path.is_file()
        summary = json.loads(summary_path.read_text(encoding="utf-8")) if finished else {}
        error = job["error"] or ("" if finished else "no summary.json")
        overrides = " ".join(override for override in job["overrides"] if override not in shared)
        cells = (path.parent.name, overrides, *_results(summary), error)
        rows.append(dict(zip(COLUMNS, cells, strict=True)))
    return rows


def _results(summary: dict[str, Any]) -> tuple[str, str, str, str]:
    """Win rate, score, loss and time of a run."""
    win_rate = score = loss = time = ""
    if verdict := summary.get("verdict"):
        low, high = round(100 * verdict["low"]), round(100 * verdict["high"])
        win_rate = f"{100 * verdict['win_rate']:.0f} % [{low}, {high}] n={verdict['n_prompts']} ({verdict['judge']})"
        score = f"{verdict['score_before']:.3f} → {verdict['score_after']:.3f}"
    if "train/loss" in summary.get("metrics", {}):
        loss = f"{summary['metrics']['train/loss']:.4g}"
    if "wall_time_s" in summary:
        time = f"{summary['wall_time_s']:.0f} s"
    return win_rate, score, loss, time


def markdown(rows: list[dict[str, str]]) -> str:
    """The rows as a Markdown table that also reads well in a terminal; columns without a value are left out."""
    columns = [column for column in COLUMNS if any(row[column] for row in rows)]
    cells = [columns, *([row[column].replace("|", "\\|") for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"
