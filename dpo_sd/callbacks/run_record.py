"""The record of a run, from which it can be rerun: config.yaml, run.json and summary.json."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from dpo_sd.callbacks.watcher import Run, Watcher
from dpo_sd.files.atomic import write_json, write_text
from dpo_sd.training.provenance import versions


def _peak_memory() -> float:
    """Peak memory of this process so far, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes there, KiB elsewhere


class RunRecord(Watcher):
    """Writes the record of a run into its folder.

    Args:
        folder: run folder.
        config: resolved settings.
        overrides: settings of the command line, which `resume=` replays.
    """

    def __init__(self, folder: Path, config: dict[str, Any], overrides: list[str]):
        self.folder, self.config = folder, config
        self.earlier_s = 0.0  # spent before the checkpoint that this start continues from
        self.started = time.monotonic()
        self.record: dict[str, Any] = {
            "command": ["python", "-m", "dpo_sd.train", *sys.argv[1:]],
            "overrides": overrides,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            **versions(),
            "seed": config["seed"],
        }

    def begin(self) -> None:
        """Writes config.yaml and run.json before anything expensive, so that a killed run can be continued."""
        for partial in self.folder.rglob(".*.partial"):  # what a start that was killed was writing
            partial.unlink()
        write_text(self.folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(self.config)))
        file = self.folder / "run.json"
        if file.exists():  # a continued run stays what it was; its starts are listed
            earlier = json.loads(file.read_text(encoding="utf-8"))
            starts = [*earlier.pop("continued", []), self.record]
            self.record = {**earlier, "overrides": self.record["overrides"], "continued": starts}
        write_json(file, self.record)

    def add(self, **facts: Any) -> None:
        """Adds facts that became known later, such as fingerprints."""
        self.record |= facts
        write_json(self.folder / "run.json", self.record)

    @property
    def wall_time_s(self) -> float:
        return self.earlier_s + time.monotonic() - self.started

    def state_dict(self) -> dict[str, Any]:
        return {"wall_time_s": self.wall_time_s}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.earlier_s = state_dict["wall_time_s"]

    def finish(self, run: Run, watchers: Iterable[Watcher]) -> dict[str, Any]:
        """Writes and returns the summary of a finished run, with what its watchers have to add."""
        summary: dict[str, Any] = {
            "steps": run.step,
            "skipped_steps": run.module.skipped,
            "metrics": run.metrics,
            "wall_time_s": round(self.wall_time_s, 1),
            "peak_memory_gib": round(_peak_memory(), 2),
            "peak_gpu_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
            "verdict": None,
        }
        for watcher in watchers:
            summary |= watcher.summary()
        write_json(self.folder / "summary.json", summary)
        return summary
