"""Hydra callback that gives every start a folder of its own."""

from __future__ import annotations

import glob
import json
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NoReturn

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, open_dict, read_write

from dpo_sd.callbacks.sweep_table import JOB_NAME
from dpo_sd.errors import UserError, override
from dpo_sd.files.claims import held, made_anew
from dpo_sd.training import cluster


class OwnFolder(Callback):
    """Makes the folder of a run or of a sweep before anything else, under another name where that one is taken.

    A folder that the command line names is left as it is named. A job that its scheduler starts again goes on in the
    folder of its own run, which is told by the settings.
    """

    def __init__(self) -> None:
        self._open = ExitStack()

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.run.dir)
        if not folder.name:  # the working folder, of commands that keep nothing
            return
        _check_name(folder)
        own = _before_the_restart(folder, config) if cluster.restarted() else None
        if own is None and cluster.first_process() and not _is_named(config, "hydra.run.dir"):
            with suppress(OSError):  # which Hydra meets in its turn
                own = made_anew(folder)
        if own is not None:
            _rename(config, "run", own)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        _check_name(folder)
        try:
            if not _is_named(config, "hydra.sweep.dir"):
                folder = made_anew(folder)
                _rename(config, "sweep", folder)
                config.hydra.overrides.hydra.append(override("hydra.sweep.dir", str(folder)))  # for its jobs
            elif any(folder.glob(f"*/{JOB_NAME}")):
                _refuse(f"{folder} holds a sweep already: choose another hydra.sweep.dir")
            self._open.enter_context(held(folder))
        except UserError as error:
            _refuse(str(error))
        except OSError:
            pass  # which Hydra meets in its turn

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        self._open.close()


def _is_named(config: DictConfig, key: str) -> bool:
    return any(setting.lstrip("+").startswith(f"{key}=") for setting in config.hydra.overrides.hydra)


def _check_name(folder: Path) -> None:
    if "${" in str(folder):
        _refuse(f"{folder} is a name that Hydra cannot keep, because it looks up ${{…}}: choose another folder")


def _refuse(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(1)  # Hydra would make a warning of any other exception


def _rename(config: DictConfig, mode: str, folder: Path) -> None:
    with read_write(config), open_dict(config):
        config.hydra[mode].dir = str(folder)


def _before_the_restart(folder: Path, config: DictConfig) -> Path | None:
    """The folder in which this job ran with the same settings before its scheduler started it again."""
    for candidate in (folder, *sorted(folder.parent.glob(f"{glob.escape(folder.name)}-*"))):
        with suppress(OSError, ValueError, LookupError):
            record = json.loads((candidate / "run.json").read_text(encoding="utf-8"))
            if _settings(record["overrides"]) == _settings(config.hydra.overrides.task):
                return candidate
    return None


def _settings(overrides: Any) -> list[str]:
    """Those that tell a run: another machine of the job may have taken another preset."""
    return sorted(setting for setting in overrides if not setting.startswith(("resume=", "hardware=")))
