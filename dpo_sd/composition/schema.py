"""The constructor is the schema: the settings of a class, read from its source.

The classes import torch, diffusers and Lightning, which is too slow for `--help` and for a message about a misspelt
key; so their modules are parsed and never imported. A class of the user's own is read in the same way, from a module
that Python would find.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import field, make_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, Optional, Union, get_args, get_origin

from omegaconf import MISSING, DictConfig, OmegaConf

from dpo_sd.errors import UserError

# libraries whose classes have no settings of ours: reading them would only take time
_FOREIGN = {"torch", "lightning", "hydra", "diffusers", "transformers", "peft", "typing", "dataclasses", "collections"}
PACKAGE = Path(__file__).parent.parent
CONF_DIR = next(path for path in (PACKAGE / "conf", PACKAGE.parent / "conf") if path.is_dir())  # wheel, checkout


class Definition(NamedTuple):
    """A class as its source has it.

    Args:
        module: dotted name of the module that it stands in.
        node: statement that defines it.
    """

    module: str
    node: ast.ClassDef

    @property
    def target(self) -> str:
        return f"{self.module}.{self.node.name}"


class Parameter(NamedTuple):
    """A parameter of a constructor, with the module whose names its annotation and its default use."""

    name: str
    annotation: ast.expr | None
    default: ast.expr | None
    module: str


def schema(target: str) -> type:
    """Dataclass of the settings of a class: its parameters, their types and defaults, and `_target_`.

    A parameter is a setting when its annotation is made of bool, int, float, str, Path, None, Literal, list, tuple,
    Sequence and dict; the others are given by code. `**anything` takes the settings of the base class too. A default
    that is neither a literal nor the name of one makes the setting mandatory.

    Args:
        target: dotted path, "dpo_sd.losses.DiffusionDPOLoss" for example.

    Raises:
        UserError: if there is no such module or class.
    """
    return _schema(target, source(target.rpartition(".")[0]))


@functools.cache  # one dataclass for each class, so that nodes of it merge
def _schema(target: str, file: Path | None) -> type:
    settings: list[tuple[str, Any, Any]] = [("_target_", str, target)]
    for parameter in _parameters(target):
        hint = _hint(parameter)
        if hint is None:
            continue
        value, choices = _default(parameter), {"choices": _choices(hint)}
        if isinstance(value, list | tuple | dict):
            value = dict(value) if isinstance(value, dict) else list(value)
            settings.append((parameter.name, _plain(hint), field(default_factory=value.copy, metadata=choices)))
        else:
            settings.append((parameter.name, _plain(hint), field(default=value, metadata=choices)))
    return make_dataclass(target.rpartition(".")[2], settings)


def typed(node: Any, contract: str | None = None) -> Any:
    """The same settings, in which every node with a `_target_` of ours has the types and defaults of its class.

    Args:
        node: as a file has it.
        contract: base class that the targets must have, as "dpo_sd.losses.Loss"; None types classes of this package
            alone, and leaves the others as they are.

    Raises:
        UserError: if there is no such class, if it lacks the base class, or if a setting is unknown or of another type.
    """
    if not isinstance(node, DictConfig) or node._is_none() or node._is_missing():
        return node
    target = node.get("_target_")
    if isinstance(target, str) and _is_to_be_typed(target, contract):
        structured = OmegaConf.structured(schema(target))
        return OmegaConf.merge(structured, {key: node._get_node(key) for key in node})
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig):
            node._set_item_impl(key, typed(child, contract))
    return node


def _is_to_be_typed(target: str, contract: str | None) -> bool:
    if contract is None:
        return target.startswith(f"{PACKAGE.name}.")
    if not is_a(target, contract):
        base = contract.rpartition(".")
        raise UserError(
            f"_target_={target} cannot be used here: its class must have the base class {base[2]} of {base[0]}"
        )
    return True


def is_readable(target: str) -> bool:
    """Whether the source of a class can be found: not that of a library's, nor of one that is not there."""
    try:
        return next(_lineage(target), None) is not None
    except UserError:
        return False


def is_a(target: str, contract: str) -> bool:
    """Whether a class is another one or has it among its ancestors; both by their dotted paths."""
    return any(definition.target == contract for definition in _lineage(target))


def class_attribute(target: str, name: str) -> Any:
    """Literal value of a class attribute such as `needs_pairs`, without importing the class; None where it has none."""
    for definition in _lineage(target):
        value = _assigned(definition.node.body).get(name)
        if value is not None:
            return _literal(value, definition.module)
    return None


# ------------------------------------------------------------------------------------------------------------- reading


def _parameters(target: str) -> list[Parameter]:
    """Parameters of the nearest constructor, those that its `**anything` hands on included; or a dataclass's fields."""
    found: dict[str, Parameter] = {}
    fields: dict[str, Parameter] = {}
    for definition in _lineage(target):
        for statement in definition.node.body:
            if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
                for parameter in _of_constructor(statement.args, definition.module):
                    found.setdefault(parameter.name, parameter)
                if statement.args.kwarg is None:
                    return list(found.values())
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                each = Parameter(statement.target.id, statement.annotation, statement.value, definition.module)
                fields.setdefault(each.name, each)
    return list((found or fields).values())


def _of_constructor(args: ast.arguments, module: str) -> Iterator[Parameter]:
    defaults = [None] * (len(args.args) - len(args.defaults)) + args.defaults + args.kw_defaults
    for arg, default in zip(args.args + args.kwonlyargs, defaults, strict=True):
        yield Parameter(arg.arg, arg.annotation, default, module)


def _lineage(target: str) -> Iterator[Definition]:
    """A class and its ancestors, nearest first, as far as their sources are of this package or the user's own."""
    module, _, name = target.rpartition(".")
    found = _found(module, name)
    if not isinstance(found, Definition):
        raise UserError(f"_target_={target}: {module} has no class {name}")
    yield found
    for base in found.node.bases:
        ancestor = _found(found.module, ast.unparse(base))
        if isinstance(ancestor, Definition):
            yield from _lineage(ancestor.target)


def _found(module: str, name: str) -> Definition | ast.expr | None:
    """The class or the value that a module means by a name, which may be dotted; None for what lies elsewhere.

    Raises:
        UserError: if there is no such module.
    """
    names = _names(module)
    head, _, rest = name.partition(".")
    thing = names.get(head)
    if isinstance(thing, str):  # a dotted path, of a module or of something in it
        path = f"{thing}.{rest}" if rest else thing
        there, _, last = path.rpartition(".")
        return _found(there, last) if there and source(there) is not None else None
    return None if rest else thing


def _names(module: str) -> Mapping[str, Definition | ast.expr | str]:
    """The names of a module with what they stand for: classes, values, and dotted paths of what is imported."""
    file = source(module)
    if file is None:
        raise UserError(
            f"there is no module {module}: start where its file lies, or put it into the folder of --config-dir"
        )
    return _names_in(file, module)


@functools.cache
def _names_in(file: Path, module: str) -> Mapping[str, Definition | ast.expr | str]:
    body = ast.parse(file.read_text(encoding="utf-8")).body
    names: dict[str, Definition | ast.expr | str] = {}
    for node in (node for statement in body for node in ast.walk(statement)):  # also those for type checkers
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {each.asname or each.name: f"{node.module}.{each.name}" for each in node.names}
        elif isinstance(node, ast.Import):
            names |= {each.asname or each.name: each.name for each in node.names}
    classes = {node.name: Definition(module, node) for node in body if isinstance(node, ast.ClassDef)}
    return names | _assigned(body) | classes


def source(module: str) -> Path | None:
    """File of a module, found as Python would find it and not imported; None where there is none."""
    first, *rest = module.split(".")
    if first in _FOREIGN:
        return None
    if first == PACKAGE.name:
        places = [PACKAGE]
    else:
        spec = importlib.util.find_spec(first)
        if spec is None:
            return None
        if not rest and spec.origin is not None:
            return Path(spec.origin)
        places = [Path(place) for place in spec.submodule_search_locations or ()]
    files = (
        file
        for place in places
        for file in (place.joinpath(*rest).with_suffix(".py"), place.joinpath(*rest, "__init__.py"))
    )
    return next((file for file in files if file.is_file()), None)


def _assigned(body: list[ast.stmt]) -> dict[str, ast.expr]:
    assigned: dict[str, ast.expr] = {}
    for node in body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(target, ast.Name) and node.value is not None:
            assigned[target.id] = node.value
    return assigned


# --------------------------------------------------------------------------------------------------------------- types

_WORDS: dict[str, Any] = {
    **{"Literal": Literal, "Optional": Optional, "Union": Union, "Path": str, "Sequence": list},
    **{"bool": bool, "int": int, "float": float, "str": str, "list": list, "tuple": tuple, "dict": dict},
}


class _Aliases(dict[str, Any]):
    """Names in annotations: the words above, and Literals that the module names itself or imports."""

    def __init__(self, module: str):
        super().__init__(_WORDS)
        self.module = module

    def __missing__(self, name: str) -> Any:
        value = _found(self.module, name)
        if isinstance(value, ast.Subscript) and ast.unparse(value.value) == "Literal":
            return eval(ast.unparse(value), {"Literal": Literal})
        raise NameError(name)


def _hint(parameter: Parameter) -> Any:
    """Type of a setting, by its default where it has no annotation; None for what code gives."""
    if parameter.annotation is None:
        value = _default(parameter)
        return type(value) if type(value) in (bool, int, float, str) and value != MISSING else None
    try:
        return eval(ast.unparse(parameter.annotation), {"__builtins__": {}}, _Aliases(parameter.module))
    except (NameError, AttributeError):
        return None


def _default(parameter: Parameter) -> Any:
    if parameter.default is None:
        return MISSING
    try:
        return _literal(parameter.default, parameter.module)
    except ValueError:
        return MISSING


def _literal(value: ast.expr, module: str) -> Any:
    """Value of a literal, or of the name of one."""
    if isinstance(value, ast.Name | ast.Attribute):
        named = _found(module, ast.unparse(value))
        value = named if isinstance(named, ast.expr) else value
    return ast.literal_eval(value)


def _plain(hint: Any) -> Any:
    """The type in words that OmegaConf knows."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return type(args[0])
    if origin in (Union, UnionType):
        if any(get_origin(arg) in (list, tuple, dict) for arg in args):
            return Any  # OmegaConf has no unions with containers
        return Union[tuple(_plain(arg) for arg in args)]  # noqa: UP007 - the members are computed
    return list[_plain(args[0])] if origin in (list, tuple) else hint


def _choices(hint: Any) -> tuple[Any, ...]:
    """Values that the Literals in a type allow."""
    args = get_args(hint)
    return args if get_origin(hint) is Literal else tuple(choice for arg in args for choice in _choices(arg))
