"""`resume=<run>`: the command line with the settings of the run that it continues."""

from __future__ import annotations

import json
import re
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dpo_sd.composition.messages import explain_value
from dpo_sd.composition.options import own_flags, targets_in, written_targets
from dpo_sd.errors import UserError, override


def resume_arguments(arguments: list[str]) -> list[str]:
    """The command line with the settings of the run that `resume=<run>` continues, in that run's folder.

    The settings are the "overrides" of the run's run.json, less those that the command line sets anew.

    Args:
        arguments: the command line without the program; `resume=` names a run folder or a checkpoint in it.

    Raises:
        UserError: if there is no such run, its run.json is unfit, it needs a --config-dir that is not given, and in a
            sweep.
    """
    given = {_key(argument): argument for argument in arguments}
    value = _value(given.get("resume", "resume=null"))
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
        record = json.loads((run / "run.json").read_text("utf-8"))
        overrides, command = record["overrides"], record.get("command", [])
        texts = [*overrides, *command]
        if not all(isinstance(text, str) for text in texts) or any(text.startswith("-") for text in overrides):
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"resume={value}: {run / 'run.json'} is damaged, it does not list the overrides") from error

    own = own_flags(command)
    if lacking := sorted(own.keys() - own_flags(arguments).keys()):
        flags = " ".join(f"{flag} {own[flag]}" for flag in lacking)
        raise UserError(f"resume={value}: that run has options of the user's own: add {flags}")
    # of the sweep that the run was part of, only the run goes on
    replayed = {_key(setting): setting for setting in overrides if _key(setting) not in {*given, "sweep", "resume"}}
    for key, setting in replayed.items():
        # a file may not choose what is executed; `check_replayed` looks at what comes of the rest
        if "hydra" in key or any(word in setting for word in ("_target_", "oc.decode", "oc.create")):
            raise UserError(f"resume={value}: run.json sets {setting}: say that on the command line yourself")
    folder = [] if "hydra.run.dir" in given else [override("hydra.run.dir", str(run))]
    at = arguments.index(given["resume"])
    whence = override("resume", str(path if path.is_file() else run))  # a folder inside the run means the run
    return [*arguments[:at], *replayed.values(), *folder, whence, *arguments[at + 1 :]]


def check_replayed(cfg: DictConfig, given: list[str]) -> None:
    """Refuses a composition with settings of a run's file that would execute what nobody has named.

    Its interpolations are resolved, so that nothing can come of them later.

    Args:
        cfg: composed from `resume_arguments`.
        given: the command line, of which `resume=` is a part.

    Raises:
        UserError: if a class is none of conf/, of `--config-dir` or of the command line, or a pickle is to be trusted.
    """
    try:
        OmegaConf.resolve(cfg)
    except OmegaConfBaseException as error:
        raise UserError(explain_value(error)) from error
    own = [argument for argument in given if _key(argument) != "resume"]  # a path may have any text in it
    named = {target for argument in own for target in re.findall(r"_target_\s*[=:]\s*([\w.]+)", argument)}
    if unknown := sorted(set(targets_in(OmegaConf.to_container(cfg))) - written_targets() - named):
        raise UserError(f"the settings of that run choose {unknown[0]}: name it on the command line if you trust it")
    if OmegaConf.select(cfg, "model.pickle") and "model.pickle" not in map(_key, own):
        raise UserError("that run reads a pickle, which can run code: add model.pickle=true if you trust it")


def _key(argument: str) -> str:
    return argument.partition("=")[0].lstrip("+~")


def _value(argument: str) -> str:
    """The text after the =, as Hydra reads it where it is in quotes; without them step=000200.ckpt would stop Hydra."""
    text = argument.partition("=")[2]
    if text[:1] not in ("'", '"'):
        return text
    return str(OmegaConf.create({"value": OverridesParser.create().parse_override(argument).value()}).value)
