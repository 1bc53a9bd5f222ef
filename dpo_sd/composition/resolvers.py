"""The resolvers that conf/ uses, and the schemas that it draws in."""

from __future__ import annotations

from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from dpo_sd.composition.messages import settings_of
from dpo_sd.composition.options import groups, options, register_files
from dpo_sd.composition.roots import Annotate, Benchmark, Export, Generate, Plan, Train, Trainer
from dpo_sd.composition.schema import class_attribute, schema
from dpo_sd.errors import UserError
from dpo_sd.models.families import FAMILIES, SHIPPED
from dpo_sd.training.cluster import run_id
from dpo_sd.training.hardware import AUTO, auto


def _groups(*names: str) -> str:
    """Groups of conf/ and their options, for `--help`; all of them where none is named."""
    named = names or [group for group in groups() if group != "annotator"]
    return "\n".join(f"  {group:<11}{', '.join(options(group))}" for group in named)


def _wandb_logged_out() -> bool:
    from dpo_sd.training.wandb_mode import logged_out

    return logged_out()


def _for_model(name: str, values: Any) -> Any:
    """The value for a family of models: `${for_model:${model.name},{tiny:1e-3,sd15:1e-4}}`."""
    if name not in values:
        raise UserError(f"this recipe has no values for model={name}, only for {', '.join(map(str, values))}")
    return values[name]


def _adamw_rate(rate: float, _root_: DictConfig) -> Any:
    """A recipe's learning rate for AdamW as the optimiser's own: `${adamw_rate:1e-3}`."""
    target = _root_.optimizer._target_
    factor = class_attribute(target, "rate_to_adamws")
    return rate * factor if factor else settings_of(schema(target))["lr"].default


def _adamw_schedule(schedule: str, _root_: DictConfig) -> str:
    """A recipe's schedule for AdamW, unless the optimiser's own average takes its place: `${adamw_schedule:cosine}`."""
    return "constant" if class_attribute(_root_.optimizer._target_, "averages") else schedule


def _preset_of_auto(_root_: DictConfig) -> str:
    """The file that a defaults list takes in beside the option of the group `hardware`, by what else it chooses."""
    return f"hardware/{auto(_root_.get('model', SHIPPED)).preset if _root_.get('hardware') == AUTO else AUTO}"


def _drawn_with(setting: str, _root_: DictConfig) -> Any:
    """The value of a setting of the sampler that the model's family is drawn with: `${drawn_with:steps}`."""
    if (name := _root_.model.name) not in FAMILIES:
        raise UserError(f"model.name must be one of {', '.join(FAMILIES)}, got {name}")
    return getattr(FAMILIES[name], setting)


def _micro_batch(most: Any, _root_: DictConfig) -> int:
    """The most pairs that a preset allows the model and that divide an update: `${micro_batch:{tiny:16,sd15:4}}`."""
    allowed, pairs = most[_root_.model.name], _root_.get("pairs_per_update")  # drawing pictures knows no updates
    if not isinstance(pairs, int) or pairs < 1:
        return allowed
    share = max(1, pairs // max(1, _root_.trainer.devices * _root_.trainer.num_nodes))
    found = max(n for n in range(1, allowed + 1) if share % n == 0)
    return found if 2 * found >= min(allowed, share) else allowed  # 17 one by one would be slow: that is refused


def register() -> None:
    """Makes the types of the top levels, the resolvers of conf/ and the way to read its files known to Hydra."""
    register_files()
    store = ConfigStore.instance()
    store.store(group="schema", name="train", node=Train)
    store.store(group="schema", name="plan", node=Plan)
    store.store(group="schema", name="benchmark", node=Benchmark)
    store.store(group="schema", name="generate", node=Generate)
    store.store(group="schema", name="annotate", node=Annotate)
    store.store(group="schema", name="export", node=Export)
    store.store(group="schema", name="trainer", node=Trainer)
    OmegaConf.register_new_resolver("config_groups", _groups, replace=True)
    OmegaConf.register_new_resolver("run_id", lambda otherwise: run_id() or otherwise, replace=True)
    OmegaConf.register_new_resolver("micro_batch", _micro_batch, replace=True)
    OmegaConf.register_new_resolver("adamw_rate", _adamw_rate, replace=True)
    OmegaConf.register_new_resolver("adamw_schedule", _adamw_schedule, replace=True)
    OmegaConf.register_new_resolver("preset_of_auto", _preset_of_auto, replace=True)
    OmegaConf.register_new_resolver("for_model", _for_model, replace=True)
    OmegaConf.register_new_resolver("drawn_with", _drawn_with, replace=True)
    OmegaConf.register_new_resolver("wandb_logged_out", _wandb_logged_out, replace=True)
