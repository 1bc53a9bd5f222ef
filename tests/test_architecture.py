"""The house: imports go down only, and what must start quickly imports nothing heavy. Read from the sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import dpo_sd

PACKAGE = Path(dpo_sd.__file__).parent

FLOORS = (  # packages from top to bottom; above them stand the commands, below them mathematics
    "composition", "forecast", "callbacks", "evaluation", "training", "data", "annotation", "judges", "lora", "models",
    "preferences", "shapes", "files",
)  # fmt: skip
COMMANDS = {"train", "generate", "annotate", "export", "plan", "benchmark"}
MATHEMATICS = {"losses", "noise", "statistics", "errors"}
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
    return {name.removeprefix("dpo_sd.") for name in names if name.startswith("dpo_sd.")} & set(MODULES)


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


def room(name: str) -> str:
    """The package that a module lies in, or the module itself where it lies in none."""
    return name.partition(".")[0]


def test_the_listing_is_the_floor_plan():
    packages = {name.partition(".")[0] for name in MODULES if "." in name}
    modules = {name for name in MODULES if "." not in name}
    assert packages == set(FLOORS) & packages and packages <= set(FLOORS)
    assert modules == COMMANDS | MATHEMATICS
    assert len(modules) <= 14


def test_imports_lead_down_or_stay_in_their_room():
    above = {name: set(FLOORS[: FLOORS.index(name)]) for name in FLOORS} | {name: set(FLOORS) for name in MATHEMATICS}
    up = [
        f"{name} imports {other}"
        for name in MODULES
        for other in ours(everything(name))
        if room(other) in above.get(room(name), set()) | COMMANDS
    ]
    assert up == []


def test_imports_go_in_no_circle():
    """Those for type checkers and inside functions included."""
    list(TopologicalSorter({name: ours(everything(name)) - {name} for name in MODULES}).static_order())


def test_only_a_source_a_judge_and_an_annotator_know_the_laboratory():
    knowing = {name for name in MODULES if any(room(other) == "shapes" for other in ours(everything(name)))}
    assert {room(name) for name in knowing} <= {"shapes", "data", "judges", "annotation"}


def test_mathematics_votes_and_files_know_neither_lightning_nor_diffusers():
    for name in MODULES:
        if room(name) in MATHEMATICS | {"preferences", "shapes", "files"}:
            known = {each.partition(".")[0] for each in everything(name)}
            assert not known & {"lightning", "diffusers", "transformers", "peft", "streamlit"}, name


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) in ("preferences", "statistics", "noise")])
def test_votes_and_numbers_are_worked_out_without_torch(name):
    assert "torch" not in {each.partition(".")[0] for each in everything(name)} | loaded_with(name)


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) == "composition"] + ["train", "plan"])
def test_composing_imports_nothing_heavy(name):
    assert not loaded_with(name) & HEAVY


@pytest.mark.parametrize(
    "name",
    [
        *("losses", "models.base", "models.sampling", "models.ready", "lora.attaching", "lora.finding"),
        *("training.optimizers", "training.hardware", "data.shapes", "data.pairs", "data.pickapic", "data.captions"),
    ],
)
def test_what_can_fail_before_weights_load_costs_no_more_than_torch(name):
    assert not loaded_with(name) & (HEAVY - {"torch"})


def test_only_the_app_knows_streamlit():
    knowing = {name for name in MODULES if "streamlit" in {each.partition(".")[0] for each in everything(name)}}
    assert {room(name) for name in knowing} == {"annotation"}


def test_only_the_step_and_what_watches_it_know_lightning():
    knowing = {name for name in MODULES if "lightning" in {each.partition(".")[0] for each in everything(name)}}
    below = FLOORS[FLOORS.index("training") + 1 :]
    assert {name for name in knowing if room(name) in below} <= {"data.datamodule"}
    assert "training.step" in knowing
