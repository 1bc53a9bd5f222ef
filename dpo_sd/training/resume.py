"""The newest checkpoint of a run, and the check that it belongs to the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from dpo_sd.errors import UserError, in_shell
from dpo_sd.files.checksums import is_whole

# Settings that may change when a run is continued: where and how it runs and who watches it, but not what it learns.
FREE = ("resume", "name", "cache_dir", "hardware", "judge", "callbacks", "logger")
_PARTS = {"global_step": int, "adapters": dict, "optimizer_states": list, "loops": dict}  # of a checkpoint
FREE_TRAINER = (
    "max_steps",
    "max_epochs",
    "max_hours",
    "validate_every",
    "log_every",
    "devices",
    "num_nodes",
    "strategy",
)


def newest_checkpoint(resume: str | None) -> Path | None:
    """Checkpoint that `resume=` names, or the last one in the run folder it names; None if there is none yet.

    Raises:
        UserError: if that run is finished and its checkpoints are gone.
    """
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
    """Content of a checkpoint: tensors and plain values.

    Raises:
        UserError: if it is no whole checkpoint of this package.
    """
    import pickle

    import torch

    try:
        if not is_whole(path):
            others = sorted(path.parent.glob("step=*.ckpt"), reverse=True)
            whole = next((other for other in others if is_whole(other)), None)
            way_out = f"go on with {in_shell('resume', whole)}" if whole else "start that run again without resume="
            raise UserError(f"{path} is damaged, or no checkpoint of this version of dpo_sd: {way_out}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint["identity"]["settings"], dict):
            raise TypeError("identity")
        for key, kind in _PARTS.items():
            if not isinstance(checkpoint[key], kind):
                raise TypeError(key)
        return checkpoint
    except UserError:
        raise
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError, ValueError, OSError) as error:
        raise UserError(f"{path} is not a whole checkpoint of dpo_sd ({type(error).__name__}): name another") from error


def check_same_run(checkpoint: Path, settings: dict[str, Any]) -> None:
    """Refuse a checkpoint of another composition.

    Raises:
        UserError: if settings differ that decide what is learnt, or more updates are done than are wanted.
    """
    state = read_checkpoint(checkpoint)
    before = state["identity"]["settings"]
    if settings["trainer"]["max_steps"] < state["global_step"]:
        raise UserError(
            f"{checkpoint} has {state['global_step']} updates behind it, and trainer.max_steps is "
            f"{settings['trainer']['max_steps']}: raise it, or continue from an earlier checkpoint"
        )
    free = {"sampler.batch_size", *(f"trainer.{name}" for name in FREE_TRAINER)}  # the first goes with the hardware
    if settings["optimizer"]["schedule"] != "constant":
        free -= {"trainer.max_steps", "trainer.max_epochs"}  # the learning rate falls towards that update
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
    """Refuse a checkpoint of other weights or other pairs under the same settings.

    Raises:
        UserError: if the fingerprints differ.
    """
    there = read_checkpoint(checkpoint)["identity"][what]
    if there != fingerprint:
        named = {"model": "model weights", "data": "pairs"}[what]
        raise UserError(
            f"{checkpoint} was trained with other {named} (fingerprint {there}, now {fingerprint}): "
            "restore them to continue that run, or start a new one without resume="
        )


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted keys."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return result
