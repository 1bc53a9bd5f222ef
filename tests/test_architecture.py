"""The house: imports go down only, and what must start quickly imports nothing heavy. Read from the sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import dpo_sd

PACKAGE = Path(dpo_sd.__file__).parent

FLOORS = {  # a folder stands for all that is in it
    "errors": 0, "files": 0, "cluster": 0, "remembered": 0, "images": 0,
    "losses": 0, "noise": 0, "statistics": 0, "pictures": 0,
    "pairs": 0, "preferences": 0, "annotator": 0, "pickapic": 0,
    "shapes.scenes": 0, "shapes.render": 0, "shapes.captions": 0, "shapes.oracle": 0,
    "hardware": 1, "quantization": 1, "models": 1, "sampling": 1, "optimization": 1, "data": 1, "annotation": 1,
    "lora": 1, "lora_files": 1, "loaders": 1, "compilation": 1,
    "module": 2, "memory": 2, "shapes.card": 2,
    "callbacks": 3,
    "schema": 4, "mistakes": 4, "config": 4, "resume": 4, "trainer": 4,
    "train": 5, "generate": 5, "annotate": 5, "export": 5, "benchmark": 5, "plan": 5, "shapes.pretrain": 5,
}  # fmt: skip
HEAVY = {"torch", "lightning", "diffusers", "transformers", "peft", "accelerate", "scipy"}


def modules() -> dict[str, ast.Module]:
    """Sources by name, "shapes.render" for dpo_sd/shapes/render.py; the folders' own files only hold docstrings."""
    files = sorted(file for file in PACKAGE.rglob("*.py") if file.name != "__init__.py")
    names = [".".join(file.relative_to(PACKAGE).with_suffix("").parts) for file in files]
    return {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in zip(names, files, strict=True)}


MODULES = modules()


def imported(nodes: Iterator[ast.AST]) -> set[str]:
    """Dotted names that import statements ask for."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they lead"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(names: set[str]) -> set[str]:
    """The modules of this package among dotted names."""
    return {name.removeprefix("dpo_sd.") for name in names} & set(MODULES)


def at_once(node: ast.AST) -> Iterator[ast.AST]:
    """What is executed by importing a module: not its functions, nor what only type checkers read."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            continue
        yield child
        yield from at_once(child)


def everything(name: str) -> set[str]:
    return imported(ast.walk(MODULES[name]))


def loaded_with(name: str) -> set[str]:
    """Top-level packages that come with importing a module of ours, through others of ours too."""
    seen, waiting, packages = set(), {name}, set()
    while waiting:
        current = waiting.pop()
        seen.add(current)
        names = imported(at_once(MODULES[current]))
        packages |= {each.partition(".")[0] for each in names}
        waiting |= ours(names) - seen
    return packages


def floor(name: str) -> int:
    return FLOORS[name] if name in FLOORS else FLOORS[name.partition(".")[0]]


def test_every_module_has_a_floor():
    assert [name for name in MODULES if name not in FLOORS and name.partition(".")[0] not in FLOORS] == []
    assert [name for name in FLOORS if name not in MODULES and not (PACKAGE / name).is_dir()] == []


def test_imports_lead_down_or_stay_on_their_floor():
    up = [
        f"{name} imports {other}" for name in MODULES for other in ours(everything(name)) if floor(other) > floor(name)
    ]
    assert up == []


def test_imports_go_in_no_circle():
    """Those for type checkers and inside functions included."""
    list(TopologicalSorter({name: ours(everything(name)) - {name} for name in MODULES}).static_order())


def test_nobody_imports_an_entry_point():
    found = [f"{name} imports {other}" for name in MODULES for other in ours(everything(name)) if floor(other) == 5]
    assert found == []


def test_mathematics_and_records_know_neither_lightning_nor_diffusers():
    for name in MODULES:
        if floor(name) == 0:
            known = {each.partition(".")[0] for each in everything(name)}
            assert not known & {"lightning", "diffusers", "transformers", "peft", "streamlit"}, name


@pytest.mark.parametrize("name", ["pairs", "preferences", "pickapic", "annotator", "statistics", "noise"])
def test_numbers_are_worked_out_without_torch(name):
    assert "torch" not in {each.partition(".")[0] for each in everything(name)} | loaded_with(name)


@pytest.mark.parametrize("name", ["config", "schema", "mistakes", "train"])
def test_composing_imports_nothing_heavy(name):
    assert not loaded_with(name) & HEAVY


@pytest.mark.parametrize(
    "name",
    ["models", "sampling", "lora", "lora_files", "optimization", "losses", "data.shapes", "data.pairs", "hardware"],
)
def test_what_can_fail_before_weights_load_costs_no_more_than_torch(name):
    assert not loaded_with(name) & (HEAVY - {"torch"})


def test_only_the_app_knows_streamlit():
    knowing = {name for name in MODULES if "streamlit" in {each.partition(".")[0] for each in everything(name)}}
    assert {name.partition(".")[0] for name in knowing} == {"annotation"}


def test_only_the_step_and_what_watches_it_know_lightning():
    knowing = {name for name in MODULES if "lightning" in {each.partition(".")[0] for each in everything(name)}}
    assert all(floor(name) >= 2 or name == "data.datamodule" for name in knowing)
    assert "module" in knowing
