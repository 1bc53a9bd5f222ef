"""Options of conf/ and of the user's own folders: which there are, and how Hydra reads them."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dpo_sd.composition.schema import CONF_DIR, is_readable, typed
from dpo_sd.errors import UserError

CONTRACTS: dict[str, str] = {  # base classes of what the groups compose; a class of the user's own has them too
    "loss": "dpo_sd.losses.Loss",
    "data": "dpo_sd.data.source.Source",
    "annotator": "dpo_sd.annotation.annotator.Annotator",
    "judge": "dpo_sd.judges.judge.Judge",
    "callbacks": "dpo_sd.callbacks.watcher.Watcher",
}
_FLAGS = ("--config-dir", "--config-name")
_WITH_VALUE = (*_FLAGS, "-cd", "-cn", "--config-path", "-cp", "--package", "-p", "--cfg", "-c")


class TypedFiles(FileConfigSource):
    """Files of conf/ and of `--config-dir`, whose nodes with a `_target_` have the types and defaults of the class.

    The config.yaml of a run, or of its record, is read as settings on top of run.yaml: what has come to be a setting
    since then has its default.
    """

    def load_config(self, config_path: str) -> ConfigResult:
        if os.path.normpath(config_path).startswith(os.pardir):
            raise UserError(f"{config_path}: an option lies in conf/ or in the folder of --config-dir, not above it")
        result = super().load_config(config_path)
        group = config_path.partition("/")[0] if "/" in config_path else ""
        if group not in ("experiment", "sweep", "hydra"):  # which only say what differs
            try:
                config: Any = result.config
                defaults = config.pop("defaults", None)  # no setting of the class
                result.config = config = typed(config, CONTRACTS.get(group))
                if defaults is not None:
                    with open_dict(config):
                        config["defaults"] = defaults
            except UserError as error:
                raise UserError(f"{Path(self.path) / config_path}.yaml: {error}") from error
        if group in CONTRACTS and result.config and not _chooses(result.config):
            raise UserError(f"{Path(self.path) / config_path}.yaml has no _target_, which says what class it sets")
        if not group and "trainer" in result.config and "defaults" not in result.config:  # the config.yaml of a run
            result.config["defaults"] = ["run", "_self_"]
        return result


def _chooses(config: Any) -> bool:
    """Whether an option says which class it sets, under a name of its own where it is a callback, or by an option."""
    nodes = [config, *(node for node in map(config._get_node, config) if isinstance(node, DictConfig))]
    return "defaults" in config or any("_target_" in node for node in nodes)


def register_files() -> None:
    """Has Hydra read files by `TypedFiles`."""
    Plugins.instance()  # registers Hydra's own sources first
    SourcesRegistry.instance().types[TypedFiles.scheme()] = TypedFiles


def find_own_modules(arguments: list[str]) -> None:
    """Puts the folder of --config-dir last on Python's path, so that own classes may lie beside their options."""
    sys.path.extend(str(folder) for folder in own_folders(arguments) if str(folder) not in sys.path)


def flags_first(arguments: list[str]) -> list[str]:
    """The same command line, flags before settings: Hydra takes no settings on both sides of a flag."""
    flags, settings, rest = [], [], iter(arguments)
    for argument in rest:
        if argument.startswith("-"):
            flags += [argument, *([next(rest, "")] if argument in _WITH_VALUE else [])]
        else:
            settings.append(argument)
    return [*flags, *settings]


def own_flags(arguments: list[str]) -> dict[str, str]:
    """The flags of a command line that say where options of the user's own lie, with their values."""
    found = {}
    for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
        flag, equals, value = argument.partition("=")
        if name := {"-cd": "--config-dir", "-cn": "--config-name"}.get(flag, flag if flag in _FLAGS else ""):
            found[name] = value if equals else following
    return found


def own_folders(arguments: list[str]) -> list[Path]:
    """The folder that a command line names with --config-dir; none where it names none."""
    folder = own_flags(arguments).get("--config-dir")
    return [Path(folder).expanduser().absolute()] if folder else []


def folders() -> list[Path]:
    """conf/, and the folders of the user's own."""
    return [CONF_DIR, *own_folders(sys.argv[1:])]


def options(group: str) -> list[str]:
    """Names of the options of a group; none where there is no such group."""
    return sorted({path.stem for folder in folders() for path in (folder / group).glob("*.yaml")})


def groups() -> list[str]:
    """Names of the groups of conf/."""
    return sorted(path.name for path in CONF_DIR.iterdir() if path.is_dir())


def targets() -> dict[str, str]:
    """The class of each option by its path, "loss/dpo"; options without a class of ours or the user's are left out."""
    found: dict[str, str] = {}
    for folder in folders():
        for path in sorted(folder.glob("*/*.yaml")):
            if (target := _target_in(path)) and is_readable(target):
                found[f"{path.parent.name}/{path.stem}"] = target
    return found


def written_targets() -> set[str]:
    """All classes and functions that conf/ and the user's own options name."""
    found: set[str] = set()
    for file in (path for folder in folders() for path in folder.rglob("*.yaml")):
        with suppress(YAMLError, OmegaConfBaseException):  # none of the options, or Hydra says so
            found.update(targets_in(OmegaConf.to_container(OmegaConf.load(file))))
    return found


def targets_in(node: Any) -> Iterator[str]:
    """All that a node of plain dicts and lists names as `_target_`."""
    if isinstance(node, dict):
        yield from [str(node["_target_"])] if "_target_" in node else []
        node = list(node.values())
    for inner in node if isinstance(node, list) else []:
        yield from targets_in(inner)


@functools.cache
def _target_in(path: Path) -> str | None:
    match = re.search(r"^\s*_target_:\s*(\S+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return match[1] if match else None


def chosen(key: str, root: Any) -> str:
    """The override that chose the node at `key`, "loss=dpo", where its class tells; otherwise the key."""
    target = OmegaConf.select(root, f"{key}._target_")
    names = [name for name, of in targets().items() if of == target and name.startswith(f"{key}/")]
    return names[0].replace("/", "=") if len(names) == 1 else key
