"""Schemas read from source."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import ConfigKeyError, ValidationError

from dpo_sd.composition import schema as schema_module
from dpo_sd.composition.schema import SCHEMAS, class_attribute, schema

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


@pytest.fixture(autouse=True)
def package(monkeypatch, tmp_path: Path):
    """A package of one module, which would fail if it were imported."""
    (tmp_path / "module.py").write_text("raise RuntimeError\n" + SOURCE)
    monkeypatch.setattr(schema_module, "PACKAGE", tmp_path)
    schema_module._module.cache_clear()
    yield
    schema_module._module.cache_clear()


def test_defaults_and_target_are_the_constructors():
    assert OmegaConf.to_container(OmegaConf.structured(schema("dpo_sd.module.Base"))) == {
        "_target_": "dpo_sd.module.Base",
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
    names = {each.name for each in fields(schema("dpo_sd.module.Base"))}
    assert names.isdisjoint({"self", "network", "untyped"})


def test_a_class_without_constructor_has_its_parents_settings():
    assert OmegaConf.structured(schema("dpo_sd.module.Child")).steps == 3


def test_a_dataclass_has_its_fields_as_settings():
    assert OmegaConf.to_container(OmegaConf.structured(schema("dpo_sd.module.Data"))) == {
        "_target_": "dpo_sd.module.Data",
        "steps": MISSING,
        "rate": 0.5,
    }


@pytest.mark.parametrize(
    ("key", "value"), [("rate", "high"), ("steps", 1.5), ("betas", ["x"]), ("flag", "maybe"), ("steps", None)]
)
def test_a_value_of_another_type_is_refused(key, value):
    with pytest.raises(ValidationError):
        OmegaConf.merge(schema("dpo_sd.module.Base"), {key: value})


def test_an_unknown_key_is_refused():
    with pytest.raises(ConfigKeyError):
        OmegaConf.merge(schema("dpo_sd.module.Base"), {"stepps": 1})


def test_an_optional_setting_takes_none_and_its_type():
    assert OmegaConf.merge(schema("dpo_sd.module.Base"), {"gamma": 5}).gamma == 5.0
    assert OmegaConf.merge(schema("dpo_sd.module.Base"), {"gamma": None}).gamma is None


def test_the_choices_of_a_literal_are_kept():
    choices = {each.name: each.metadata.get("choices") for each in fields(schema("dpo_sd.module.Base"))}
    assert choices["colour"] == choices["colours"] == ("red", "green")
    assert choices["steps"] == ()


def test_defaults_are_not_shared_between_compositions():
    first, second = (OmegaConf.structured(schema("dpo_sd.module.Base")) for _ in range(2))
    first.names.append("c")
    assert second.names == ["a", "b"]


def test_class_attributes_are_read_and_inherited():
    assert class_attribute("dpo_sd.module.Base", "needs_pairs") is True
    assert class_attribute("dpo_sd.module.Child", "needs_pairs") is False
    assert class_attribute("dpo_sd.module.Child", "has_pairs") is False
    assert class_attribute("dpo_sd.module.Child", "nothing") is None


def test_shipped_schemas_agree_with_the_classes_they_describe(monkeypatch):
    import inspect

    from hydra.utils import get_class

    monkeypatch.undo()
    for target in (
        "dpo_sd.losses.DiffusionDPOLoss",
        "dpo_sd.training.hardware.Hardware",
        "dpo_sd.training.optimizers.AdamW",
        "dpo_sd.models.base.Base",
        "dpo_sd.data.frames.Framing",
        "dpo_sd.models.sampling.Sampler",
    ):
        assert target in SCHEMAS.values()
        described = OmegaConf.to_container(OmegaConf.structured(schema(target)))
        parameters = inspect.signature(get_class(target)).parameters.values()
        expected = {p.name: list(p.default) if isinstance(p.default, tuple) else p.default for p in parameters}
        assert described == {"_target_": target, **expected}
