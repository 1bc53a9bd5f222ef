"""One message for each mistake: which setting, what it was given, and what to write instead."""

from __future__ import annotations

import errno
import json
import os
import re
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import Field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra.errors import CompactHydraException, InstantiationException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
    ValidationError,
)

from dpo_sd.composition.options import chosen, groups, options, targets
from dpo_sd.composition.schema import schema
from dpo_sd.errors import UserError

# where no program can write, whoever starts it
_UNWRITABLE = (errno.EROFS, errno.ENOSPC, errno.EDQUOT)
_DENIED = (errno.EACCES, errno.EPERM)
_NO_SUCH_PLACE = (errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR)
_OTHER_PLACES = "hydra.run.dir=<folder> and cache_dir=<folder> choose other places"
_UNLOCATED = re.compile(r"Error locating target '(.*?)'.*full_key: (\S+)", re.DOTALL)
LAUNCHERS = ("joblib", "submitit_")  # of the extra `sweep`
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list"}


def no_value(key: str) -> str:
    """Message for a setting that must be given and is not."""
    return f"{key} has no value: give {key}={'|'.join(options(key)) or '<value>'}"


def written(value: Any) -> str:
    """The value as it is written on a command line."""
    return repr(value) if isinstance(value, str) else json.dumps(value, default=str)


def nearest(word: Any, words: Iterable[Any], prefix: str = "") -> str:
    """Question whether the nearest other word was meant; empty where none is near."""
    near = get_close_matches(str(word), [str(other) for other in words], n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def unknown_setting(full_key: str, siblings: Iterable[Any], root: Any) -> str:
    """Message for an unknown setting, with the nearest valid name.

    Args:
        full_key: dotted path from the root.
        siblings: the keys that would be right in its place.
        root: the composition.
    """
    parent, _, key = full_key.rpartition(".")
    siblings = [str(name) for name in siblings if not str(name).startswith("_") and name != "hydra"]
    if parent and not siblings:
        return f"{full_key}: {parent} is given as a whole, {parent}={{{key}:...}}"
    if not parent:
        siblings += [group for group in groups() if group not in siblings]
    hint = nearest(key, siblings, f"{parent}." if parent else "")
    owners = [
        name
        for name, target in targets().items()
        if name.startswith(f"{parent}/") and key in settings_of(schema(target))
    ]
    if owners:
        hint = f"; it belongs to {' and '.join(owners).replace('/', '=')}"
    if not hint:  # perhaps it only lacks its group
        paths = {path.rpartition(".")[2]: path for path in _paths(OmegaConf.to_container(root)) if path != full_key}
        near = get_close_matches(key, paths, n=1)
        hint = f"; did you mean {paths[near[0]]}?" if near else ""
    has = f" ({chosen(parent, root)} has: {', '.join(siblings)})" if parent else ""
    return f"{full_key}: no such setting{hint}{has}"


def settings_of(kind: Any) -> dict[str, Field[Any]]:
    """Fields of a schema by name; none for a node without a schema."""
    return {each.name: each for each in fields(kind)} if is_dataclass(kind) else {}


def _paths(node: Any, prefix: str = "") -> Iterator[str]:
    for key, value in node.items() if isinstance(node, dict) else []:
        if key != "hydra" and not str(key).startswith("_"):
            yield prefix + str(key)
            yield from _paths(value, f"{prefix}{key}.")


def explain_value(error: OmegaConfBaseException) -> str:
    """Message for a key or a value that OmegaConf refused."""
    key, parent, child = error.full_key or "", error.parent_node, error.child_node
    if isinstance(error, ConfigKeyError | ConfigAttributeError) and isinstance(parent, DictConfig):
        return unknown_setting(key, parent, parent._get_root())
    if isinstance(error, ValidationError):
        kind = list if isinstance(child, ListConfig) else child._metadata.ref_type if child is not None else None
        kind = parent._metadata.element_type if kind is None and parent is not None else kind
        if kind in KINDS:
            null = " or null" if child is not None and child._metadata.optional else ""
            return f"{key} must be {KINDS[kind]}{null}, got {written(error.value)}"
    reason = str(error).splitlines()[0]
    # without a key it is a whole group that was given a value: `loss: sft` in a file
    return f"{key}: {reason}" if key else f"{reason}; choose an option with override /<group>: <option> under defaults"


def _of_composition(place: str | None, error: OmegaConfBaseException) -> str:
    """Message for a value that did not fit when the file at `place` was composed."""
    if place is None:
        return explain_value(error)
    remedy = ""
    if place.startswith("experiment/") and isinstance(error, ConfigKeyError | ConfigAttributeError):
        remedy = f"; leave out {place.replace('/', '=')} and give what else it sets, or let the class take this one"
    return f"in {place}.yaml: {explain_value(error)}{remedy}"


def explain(error: BaseException) -> str | None:
    """Message for a mistake of the user's; None for any other exception, which keeps its traceback."""
    causes = [error]
    while following := causes[-1].__cause__ or (
        causes[-1].__context__ if isinstance(causes[-1], CompactHydraException) else None
    ):
        causes.append(following)
    mistake = next((cause for cause in causes if isinstance(cause, UserError)), None)
    if mistake is not None:
        built = re.search(r"full_key: (\S+)", str(error)) if isinstance(error, InstantiationException) else None
        return f"{built[1]}: {mistake}" if built else str(mistake)
    if isinstance(error, OverrideParseException):
        return f"cannot read {error.override}: write key=value, and a value with special characters as key=\"'a=b'\""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, option = error.missing_cfg_file.rpartition("/")
        hint = nearest(option, error.options)
        if group == "hydra/launcher" and option.startswith(LAUNCHERS):
            return f"{group}={option} needs a package that is not installed: run pip install -e '.[sweep]'"
        return f"{group}={option}: no such option{hint} ({group} has: {', '.join(error.options)})"
    if missing := re.search(r"Missing mandatory value: (\S+)", str(error)):  # hydra.run.dir asks for it first
        return no_value(missing[1])
    if (group := re.match(r"Could not override '(.+?)'", str(error))) and options(group[1]):
        return f"{group[1]} is a group of other commands: --help shows the settings of this one"
    if isinstance(error, CompactHydraException) and not isinstance(error, InstantiationException):
        value = next((cause for cause in causes if isinstance(cause, OmegaConfBaseException)), None)
        place = re.match(r"In '(.+?)': ", str(error))
        return _of_composition(place[1] if place else None, value) if value else str(error).partition("\n")[0]
    if isinstance(error, InterpolationResolutionError):
        return explain_value(error)
    if isinstance(error, InstantiationException) and (unknown := _UNLOCATED.match(str(error))):
        return f"{unknown[2]}._target_={unknown[1]}: there is no such class"
    cause = causes[-1]
    if isinstance(cause, RuntimeError) and "home directory" in str(cause):  # pathlib's, of ~
        return "this user has no home directory: write folders without ~, and give cache_dir=<folder>"
    return _of_file(cause) if isinstance(cause, OSError) else None


def _of_file(error: OSError) -> str | None:
    """Message for a file or folder that cannot be used; None where the mistake may be ours."""
    calls = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
    if isinstance(error, FileNotFoundError):
        if not _has_working_folder():
            return "the working folder has been deleted: change into another one"
        # /proc and its like say that what cannot be made is not there; `_open` makes a log
        if calls.isdisjoint(("mkdir", "_open")):
            return None
    elif error.errno in _DENIED and isinstance(error.filename, str) and not _is_reachable(error.filename):
        return f"cannot read {error.filename}: {error.strerror}; make it readable for this user"
    elif error.errno not in (*_DENIED, *_UNWRITABLE, *_NO_SUCH_PLACE):  # a disk that fails, a mount that has gone
        return f"{error.filename}: {error.strerror}" if error.filename and error.errno else None
    place = f"cannot write {error.filename}" if error.filename else "cannot write"
    return f"{place}: {error.strerror}; {_OTHER_PLACES}"


def _is_reachable(file: str) -> bool:
    """Whether a file, or the folder that it would lie in, may be read: otherwise reading was what failed."""
    place = next(place for place in (Path(file), *Path(file).absolute().parents) if os.path.lexists(place))
    return os.access(place, os.R_OK | os.X_OK if os.path.isdir(place) else os.R_OK)


def _has_working_folder() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True
