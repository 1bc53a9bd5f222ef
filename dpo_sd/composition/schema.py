"""The constructor is the schema: what configuration can tell each class, read from the class's source.

The classes import torch, diffusers and Lightning, which is too slow for `--help` and for a message about a misspelt
key; so their modules are parsed and never imported.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable
from dataclasses import field, make_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Optional, Union, get_args, get_origin

from omegaconf import MISSING

PACKAGE = Path(__file__).parent.parent
CONF_DIR = next(path for path in (PACKAGE / "conf", PACKAGE.parent / "conf") if path.is_dir())  # wheel, checkout
# drawn into the YAML files as /schema/<name>
SCHEMAS = {
    "model": "dpo_sd.models.base.Base",
    "lora": "dpo_sd.lora.attaching.LoRA",
    "data/shapes": "dpo_sd.data.shapes.Shapes",
    "data/renders": "dpo_sd.data.shapes.Renders",
    "data/pairs": "dpo_sd.data.pairs.Pairs",
    "data/captions": "dpo_sd.data.captions.Captions",
    "data/pickapic": "dpo_sd.data.pickapic.PickAPic",
    "loss/sft": "dpo_sd.losses.SFTLoss",
    "loss/dpo": "dpo_sd.losses.DiffusionDPOLoss",
    "optimizer/adamw": "dpo_sd.training.optimizers.AdamW",
    "optimizer/adamw8bit": "dpo_sd.training.optimizers.AdamW8bit",
    "optimizer/prodigy": "dpo_sd.training.optimizers.Prodigy",
    "callbacks/checkpoint": "dpo_sd.callbacks.checkpoint.Checkpoint",
    "callbacks/samples": "dpo_sd.callbacks.samples.Samples",
    "callbacks/verdict": "dpo_sd.callbacks.verdict.Verdict",
    "callbacks/health": "dpo_sd.callbacks.health.Health",
    "callbacks/export": "dpo_sd.callbacks.export.Export",
    "callbacks/progress": "dpo_sd.callbacks.progress.Progress",
    "judge/oracle": "dpo_sd.judges.oracle.Oracle",
    "annotator/person": "dpo_sd.annotation.app.Person",
    "annotator/oracle": "dpo_sd.annotation.simulated.SimulatedAnnotator",
    "sampler": "dpo_sd.models.sampling.Sampler",
    "framing": "dpo_sd.data.frames.Framing",
    "hardware": "dpo_sd.training.hardware.Hardware",
}


@functools.cache
def _body(name: str) -> list[ast.stmt]:
    path = PACKAGE.joinpath(*name.split(".")[1:])
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8")).body


@functools.cache
def _module(name: str) -> tuple[dict[str, ast.ClassDef], dict[str, ast.expr]]:
    """Classes of a module, and the values that it assigns to names or imports under them from another of ours."""
    classes = {node.name: node for node in _body(name) if isinstance(node, ast.ClassDef)}
    imported: dict[str, ast.expr] = {}
    for node in (node for statement in _body(name) for node in ast.walk(statement)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{PACKAGE.name}."):
            there = _assigned(_body(str(node.module)))
            imported |= {each.asname or each.name: there[each.name] for each in node.names if each.name in there}
    return classes, imported | _assigned(_body(name))


def _assigned(body: Iterable[ast.stmt]) -> dict[str, ast.expr]:
    assigned: dict[str, ast.expr] = {}
    for node in body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(target, ast.Name) and node.value is not None:
            assigned[target.id] = node.value
    return assigned


def _line(target: str) -> list[ast.ClassDef]:
    """A class and its ancestors in the same module, nearest first."""
    module, _, name = target.rpartition(".")
    classes, _ = _module(module)
    line = [classes[name]]
    while parents := [base.id for base in line[-1].bases if isinstance(base, ast.Name) and base.id in classes]:
        line.append(classes[parents[0]])
    return line


def class_attribute(target: str, name: str) -> Any:
    """Literal value of a class attribute such as `needs_pairs`, without importing the class; None where it has none."""
    values = [assigned[name] for node in _line(target) if name in (assigned := _assigned(node.body))]
    return ast.literal_eval(values[0]) if values else None


def _parameters(target: str) -> list[tuple[str, ast.expr | None, ast.expr | None]]:
    """Name, annotation and default of what the class is called with."""
    declared: dict[str, ast.AnnAssign] = {}
    for node in _line(target):
        for statement in node.body:
            if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
                args = statement.args
                defaults = [None] * (len(args.args) - len(args.defaults)) + args.defaults + args.kw_defaults
                named = zip(args.args + args.kwonlyargs, defaults, strict=True)
                return [(arg.arg, arg.annotation, default) for arg, default in named]
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                declared.setdefault(statement.target.id, statement)
    return [(name, statement.annotation, statement.value) for name, statement in declared.items()]  # of a dataclass


def schema(target: str) -> type:
    """Dataclass of the settings of a class of this package: its parameters, their types and defaults, and `_target_`.

    A parameter is a setting when its annotation is made of bool, int, float, str, Path, None, Literal, list, tuple,
    Sequence and dict; the others are given by code. A default that is neither a literal nor the name of one in the
    same module makes the setting mandatory. The module is read, never imported.

    Args:
        target: dotted path, "dpo_sd.losses.DiffusionDPOLoss" for example.
    """
    module, _, name = target.rpartition(".")
    _, values = _module(module)
    words: dict[str, Any] = {"Literal": Literal, "Optional": Optional, "Union": Union, "Path": str, "Sequence": list}
    words |= {alias: eval(ast.unparse(node), words) for alias, node in values.items() if _is_literal_type(node)}
    settings: list[tuple[str, Any, Any]] = [("_target_", str, target)]
    for parameter, annotation, default in _parameters(target):
        if annotation is None:
            continue
        try:
            hint = eval(ast.unparse(annotation), words)
        except NameError:
            continue
        if isinstance(default, ast.Name):
            default = values.get(default.id)
        try:
            value = MISSING if default is None else ast.literal_eval(default)
        except ValueError:
            value = MISSING
        choices = {"choices": _choices(hint)}
        if isinstance(value, list | tuple | dict):
            value = dict(value) if isinstance(value, dict) else list(value)
            settings.append((parameter, _plain(hint), field(default_factory=value.copy, metadata=choices)))
        else:
            settings.append((parameter, _plain(hint), field(default=value, metadata=choices)))
    return make_dataclass(name, settings)


def _is_literal_type(node: ast.expr) -> bool:
    return isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "Literal"


def _plain(hint: Any) -> Any:
    """The type in words that OmegaConf knows."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return type(args[0])
    if origin in (Union, UnionType):
        return Union[tuple(_plain(arg) for arg in args)]  # noqa: UP007 - the members are computed
    return list[_plain(args[0])] if origin in (list, tuple) else hint


def _choices(hint: Any) -> tuple[Any, ...]:
    """What the Literals in a type allow."""
    args = get_args(hint)
    return args if get_origin(hint) is Literal else tuple(choice for arg in args for choice in _choices(arg))
