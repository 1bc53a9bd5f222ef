"""`resume=<run>`: the settings of a run from its folder, its newest checkpoint, and whether it is the same run.

Nothing heavy is imported before a checkpoint is read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from dpo_sd.errors import UserError

# What may change when a run is continued: where and how it runs and what watches it, but not what it learns.
FREE = ("resume", "name", "cache_dir", "hardware", "callbacks", "logger")
FREE_TRAINER = ("max_steps", "validate_every", "log_every", "devices", "num_nodes", "strategy")


def resume_arguments(arguments: list[str]) -> list[str]:
    """The command line with the settings of the run that `resume=<run>` continues, in that run's folder.

    The settings are the "overrides" of the run's run.json, less those that the command line sets anew.

    Args:
        arguments: the command line without the program; `resume=` names a run folder or a checkpoint in it.

    Raises:
        UserError: when there is no such run, when its run.json is unfit, and in a sweep.
    """
    given = {_key(argument): argument for argument in arguments}
    value = given.get("resume", "=null").partition("=")[2].strip("'\"")
    if value == "null":
        return arguments
    if not value:
        raise UserError("resume= is empty: name a run folder or a checkpoint, or leave it out")
    if not {"-m", "--multirun", "sweep"}.isdisjoint(given):
        raise UserError(f"resume={value} continues one run and cannot be part of a sweep: leave out -m and sweep=")
    path = Path(value).expanduser()
    if not path.exists():
        raise UserError(f"resume={value}: there is no such run folder or checkpoint")
    run = next((folder for folder in (path, *path.parents[:2]) if (folder / "run.json").is_file()), None)
    if run is None:
        raise UserError(f"resume={value}: no run.json there, so this is no run folder or checkpoint of one")
    try:
        overrides = json.loads((run / "run.json").read_text("utf-8"))["overrides"]
        if not all(isinstance(override, str) and not override.startswith("-") for override in [*overrides]):
            raise TypeError
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"resume={value}: {run / 'run.json'} is damaged, it does not list the overrides") from error

    # of the sweep that the run was part of, only the run goes on
    replayed = {_key(override): override for override in overrides if _key(override) not in {*given, "sweep", "resume"}}
    for key, override in replayed.items():
        if key.startswith("hydra") or "_target_" in override:  # a file may not choose what is executed
            raise UserError(f"resume={value}: run.json sets {override}: say that on the command line yourself")
    folder = [] if "hydra.run.dir" in given else [f"hydra.run.dir={_quoted(run)}"]
    at = arguments.index(given["resume"])
    whence = f"resume={_quoted(path if path.is_file() else run)}"  # a folder inside the run means the run
    return [*arguments[:at], *replayed.values(), *folder, whence, *arguments[at + 1 :]]


def _key(argument: str) -> str:
    return argument.partition("=")[0].lstrip("+~")


def _quoted(path: Path) -> str:
    """The path as a value for Hydra, which would stumble over the = of step=000200.ckpt."""
    return "'" + str(path).replace("'", r"\'") + "'"


def newest_checkpoint(resume: str | None) -> Path | None:
    """The checkpoint that `resume=` names, or the last one of the run folder it names; None when there is none yet."""
    if resume is None:
        return None
    path = Path(resume).expanduser()
    if path.is_file():
        return path
    candidates = [path / "checkpoints" / "last.ckpt", *sorted((path / "checkpoints").glob("step=*.ckpt"), reverse=True)]
    checkpoint = next((candidate for candidate in candidates if candidate.is_file()), None)
    if checkpoint is None and (path / "summary.json").exists():
        raise UserError(f"resume={resume}: that run is finished and its checkpoints are gone; start a new one")
    return checkpoint


def read_checkpoint(path: Path) -> dict[str, Any]:
    import pickle

    import torch

    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint["identity"]["settings"], dict):
            raise TypeError("identity")
        for key in ("identity", "global_step", "adapters", "optimizer_states", "loops"):
            checkpoint[key]
        return checkpoint
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError, ValueError, OSError) as error:
        raise UserError(f"{path} is not a whole checkpoint of dpo_sd ({type(error).__name__}): name another") from error


def check_same_run(checkpoint: Path, settings: dict[str, Any]) -> None:
    """Raises UserError, naming the settings that differ, when a checkpoint comes from another composition."""
    state = read_checkpoint(checkpoint)
    before = state["identity"]["settings"]
    if settings["trainer"]["max_steps"] < state["global_step"]:
        raise UserError(
            f"{checkpoint} has {state['global_step']} updates behind it, and trainer.max_steps is "
            f"{settings['trainer']['max_steps']}: raise it, or continue from an earlier checkpoint"
        )
    free = {f"trainer.{name}" for name in FREE_TRAINER}
    if settings["optimizer"]["schedule"] != "constant":
        free.remove("trainer.max_steps")  # the learning rate falls towards that update
    old, new = (
        {key: value for key, value in flat(tree).items() if key.split(".")[0] not in FREE and key not in free}
        for tree in (before, settings)
    )
    differing = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    if differing:
        named = ", ".join(f"{key} (there {old.get(key)!r}, here {new.get(key)!r})" for key in differing[:5])
        raise UserError(
            f"{checkpoint} was made with other settings: {named}. Leave them as they were to continue that run, "
            "or start a new one without resume="
        )


def check_same(checkpoint: Path, what: Literal["model", "data"], fingerprint: str) -> None:
    """Raises UserError when a checkpoint comes from other weights or other pairs under the same settings."""
    there = read_checkpoint(checkpoint)["identity"][what]
    if there != fingerprint:
        named = {"model": "model weights", "data": "pairs"}[what]
        raise UserError(
            f"{checkpoint} was trained with other {named} (fingerprint {there}, now {fingerprint}): "
            "restore them to continue that run, or start a new one without resume="
        )


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return result
