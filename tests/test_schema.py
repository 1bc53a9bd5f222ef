"""Schemas read from source."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, ValidationError

from dpo_sd.composition.schema import CONF_DIR, class_attribute, is_a, schema, typed
from dpo_sd.errors import UserError

SOURCE = """
import torch
from typing import ClassVar, Literal

Colour = Literal["red", "green"]
NAMES = ["a", "b"]
COMPUTED = list("ab")


class Base:
    needs_pairs = True
    has_pairs: ClassVar[bool] = False

    def __init__(self, network: torch.nn.Module, rate: float, steps: int = 3, gamma: float | None = None,
                 betas: tuple[float, float] = (0.9, 0.99), names: list[str] = NAMES, odd: list[str] = COMPUTED,
                 colour: Colour = "red", colours: list[Colour] = ["red"], folder: Path | None = None,
                 limits: dict[str, int] = {}, *, flag: bool = True, untyped=None): ...


class Child(Base):
    needs_pairs = False


@dataclass
class Data:
    steps: int
    rate: float = 0.5
    network: torch.nn.Module = None
"""


OTHER = """
import own_module as there
from own_module import NAMES as WORDS, Base, Colour


class Further(there.Child):
    RATE = 3

    def __init__(self, depth: int = 2, colour: Colour = "green", words: list[str] = WORDS, plain=0.5, **common): ...


class Closed(Base):
    def __init__(self, depth: int): ...
"""


@pytest.fixture(autouse=True)
def module(monkeypatch, tmp_path: Path):
    """Modules of a user, which would fail if they were imported."""
    (tmp_path / "own_module.py").write_text("raise RuntimeError\n" + SOURCE)
    (tmp_path / "own_other.py").write_text("raise RuntimeError\n" + OTHER)
    monkeypatch.syspath_prepend(tmp_path)


def test_defaults_and_target_are_the_constructors():
    assert OmegaConf.to_container(OmegaConf.structured(schema("own_module.Base"))) == {
        "_target_": "own_module.Base",
        "rate": MISSING,
        "steps": 3,
        "gamma": None,
        "betas": [0.9, 0.99],
        "names": ["a", "b"],
        "odd": MISSING,
        "colour": "red",
        "colours": ["red"],
        "folder": None,
        "limits": {},
        "flag": True,
    }


def test_parameters_that_configuration_cannot_write_are_no_settings():
    names = {each.name for each in fields(schema("own_module.Base"))}
    assert names.isdisjoint({"self", "network", "untyped"})


def test_a_class_without_constructor_has_its_parents_settings():
    assert OmegaConf.structured(schema("own_module.Child")).steps == 3


def test_a_dataclass_has_its_fields_as_settings():
    assert OmegaConf.to_container(OmegaConf.structured(schema("own_module.Data"))) == {
        "_target_": "own_module.Data",
        "steps": MISSING,
        "rate": 0.5,
    }


@pytest.mark.parametrize(
    ("key", "value"), [("rate", "high"), ("steps", 1.5), ("betas", ["x"]), ("flag", "maybe"), ("steps", None)]
)
def test_a_value_of_another_type_is_refused(key, value):
    with pytest.raises(ValidationError):
        OmegaConf.merge(schema("own_module.Base"), {key: value})


def test_an_unknown_key_is_refused():
    with pytest.raises(ConfigKeyError):
        OmegaConf.merge(schema("own_module.Base"), {"stepps": 1})


def test_an_optional_setting_takes_none_and_its_type():
    assert OmegaConf.merge(schema("own_module.Base"), {"gamma": 5}).gamma == 5.0
    assert OmegaConf.merge(schema("own_module.Base"), {"gamma": None}).gamma is None


def test_the_choices_of_a_literal_are_kept():
    choices = {each.name: each.metadata.get("choices") for each in fields(schema("own_module.Base"))}
    assert choices["colour"] == choices["colours"] == ("red", "green")
    assert choices["steps"] == ()


def test_defaults_are_not_shared_between_compositions():
    first, second = (OmegaConf.structured(schema("own_module.Base")) for _ in range(2))
    first.names.append("c")
    assert second.names == ["a", "b"]


def test_class_attributes_are_read_and_inherited():
    assert class_attribute("own_module.Base", "needs_pairs") is True
    assert class_attribute("own_module.Child", "needs_pairs") is False
    assert class_attribute("own_module.Child", "has_pairs") is False
    assert class_attribute("own_module.Child", "nothing") is None


def test_shipped_schemas_agree_with_the_classes_they_describe(monkeypatch):
    import inspect

    from hydra.utils import get_class

    monkeypatch.undo()
    composed = "".join(path.read_text() for path in CONF_DIR.rglob("*.yaml"))
    for target in (
        "dpo_sd.losses.DiffusionDPOLoss",
        "dpo_sd.training.hardware.Hardware",
        "dpo_sd.training.optimizers.AdamW",
        "dpo_sd.models.base.Base",
        "dpo_sd.data.frames.Framing",
        "dpo_sd.models.sampling.Sampler",
    ):
        assert target in composed
        described = OmegaConf.to_container(OmegaConf.structured(schema(target)))
        parameters = inspect.signature(get_class(target)).parameters.values()
        expected = {p.name: list(p.default) if isinstance(p.default, tuple) else p.default for p in parameters}
        assert described == {"_target_": target, **expected}


def test_a_class_that_takes_anything_has_the_settings_of_its_base_class_too():
    settings = OmegaConf.structured(schema("own_other.Further"))
    assert isinstance(settings, DictConfig)
    assert settings["_target_"] == "own_other.Further"
    assert (settings["depth"], settings["colour"], settings["words"]) == (2, "green", ["a", "b"])
    assert (settings["plain"], settings["steps"]) == (0.5, 3)
    assert OmegaConf.is_missing(settings, "rate")
    assert "steps" not in {each.name for each in fields(schema("own_other.Closed"))}


def test_ancestors_are_found_in_other_modules():
    assert class_attribute("own_other.Further", "needs_pairs") is False
    assert class_attribute("own_other.Further", "RATE") == 3
    assert is_a("own_other.Further", "own_module.Base")
    assert not is_a("own_module.Data", "own_module.Base")


def test_a_setting_without_annotation_has_the_type_of_its_default():
    with pytest.raises(ValidationError):
        OmegaConf.structured(schema("own_other.Further")).plain = "high"


@pytest.mark.parametrize("target", ["own_nowhere.Base", "own_module.Bsae", "own_module.nothing.Base"])
def test_a_class_that_is_not_there_is_one_message(target):
    with pytest.raises(UserError, match=r"no module own_|has no class Bsae"):
        schema(target)


def test_nodes_get_the_types_of_their_class_wherever_they_stand():
    node = OmegaConf.create({"a": {"b": {"_target_": "own_module.Base", "rate": 2}}, "c": {"_target_": "os.system"}})
    made = typed(OmegaConf.create({"a": node.a}), "own_module.Base")
    assert (made.a.b.rate, made.a.b.steps) == (2, 3)
    assert typed(node).c == {"_target_": "os.system"}  # nobody has said what it must be
    with pytest.raises(UserError, match=r"_target_=own_module.Data cannot be used here.*base class Base of own_module"):
        typed(OmegaConf.create({"_target_": "own_module.Data"}), "own_module.Base")
