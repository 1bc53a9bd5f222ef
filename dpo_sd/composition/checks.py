"""Checks of what was composed, before anything heavy is imported."""

from __future__ import annotations

import math
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from dpo_sd.composition.messages import (
    KINDS,
    explain_value,
    nearest,
    no_value,
    settings_of,
    unknown_setting,
    written,
)
from dpo_sd.composition.options import chosen, options, targets
from dpo_sd.composition.schema import CONF_DIR, class_attribute
from dpo_sd.errors import UserError, check_range
from dpo_sd.files.texts import is_text
from dpo_sd.training.cluster import launched
from dpo_sd.training.hardware import accumulation

_LARGEST = 3.4e38  # of single precision
_LONGEST_NAME = 128  # bytes; file systems take 255 with what is added


def check_composition(cfg: DictConfig) -> None:
    """Refuse a training that cannot run, before anything heavy is imported.

    Args:
        cfg: composed from train.yaml.

    Raises:
        UserError: if `check_settings` refuses it, a value is out of range, a loss needs pairs where there are none,
            images are framed that cannot be, or pairs_per_update does not divide into micro-batches.
    """
    check_settings(cfg)
    _check_names(cfg)
    _check_seed(cfg.seed)
    _check_trainer(cfg.trainer)
    if cfg.trainer.max_hours is not None and "checkpoint" not in cfg.callbacks:
        raise UserError("trainer.max_hours ends a run by saving it, for which the checkpoint callback is: leave it in")
    _check_best(cfg)
    _check_data(cfg)
    _check_cache(cfg)
    if cfg.optimizer.get("text_encoder_lr") is not None and not cfg.lora.get("text_encoder"):
        raise UserError(
            "optimizer.text_encoder_lr is given, but no text encoder is trained: add lora.text_encoder=true"
        )
    if cfg.trainer.ema_decay is not None and class_attribute(cfg.optimizer._target_, "averages"):
        raise UserError(
            f"trainer.ema_decay: {chosen('optimizer', cfg)} has an average of its own: leave one of the two out"
        )
    if cfg.lora.get("dora") and cfg.hardware.weights in ("int8", "nf4"):
        raise UserError(
            f"lora.dora=true needs the base's own weights, and not hardware.weights={cfg.hardware.weights}: "
            "use hardware.weights=bfloat16"
        )
    if cfg.lora.get("dora") and cfg.hardware.compile:
        raise UserError("lora.dora=true cannot be compiled: use hardware.compile=false")
    check_range("pairs_per_update", cfg.pairs_per_update, 1, 10**6)
    processes = cfg.trainer.devices * cfg.trainer.num_nodes
    _check_processes(cfg.trainer.num_nodes, processes)
    accumulation(cfg.pairs_per_update, cfg.hardware.micro_batch, processes)


def _check_names(cfg: DictConfig) -> None:
    if not cfg.cache_dir:
        raise UserError("cache_dir is empty: name a folder, or leave it out")
    if cfg.name.strip() in ("", ".", "..") or "/" in cfg.name or "\\" in cfg.name:
        raise UserError(f"name must be the name of a folder, got {written(cfg.name)}")
    if len(cfg.name.encode()) > _LONGEST_NAME:
        raise UserError(
            f"name must have at most {_LONGEST_NAME} bytes, got {len(cfg.name.encode())}: it names files too"
        )


def _check_trainer(trainer: DictConfig) -> None:
    for key in ("max_steps", "validate_every", "log_every", "devices", "num_nodes"):
        check_range(f"trainer.{key}", trainer[key], 1, 2**31)
    if trainer.max_hours is not None and not 0 < trainer.max_hours < math.inf:
        raise UserError(f"trainer.max_hours must be positive, or null for no limit, got {trainer.max_hours}")
    if trainer.max_epochs is not None and not 0 < trainer.max_epochs <= 10**6:
        raise UserError(f"trainer.max_epochs must be above 0 and at most 10^6, got {trainer.max_epochs}")
    if trainer.ema_decay is not None and not 0 < trainer.ema_decay < 1:
        raise UserError(f"trainer.ema_decay must be in (0, 1), or null for no average, got {trainer.ema_decay}")
    if trainer.gradient_clip is not None and not trainer.gradient_clip > 0:
        raise UserError(f"trainer.gradient_clip must be positive, or null for none, got {trainer.gradient_clip}")


def with_epochs(cfg: DictConfig, samples: int | None) -> DictConfig:
    """The settings with the updates that `trainer.max_epochs` passes over the data take, where it is given.

    Args:
        samples: in the training data.

    Raises:
        UserError: if nobody knows how many there are.
    """
    epochs = cfg.trainer.max_epochs
    if epochs is None:
        return cfg
    if samples is None:
        raise UserError("trainer.max_epochs: how large this data is is not known yet: give trainer.max_steps instead")
    steps = max(1, math.ceil(round(epochs * samples / cfg.pairs_per_update, 6)))  # 1.1 times 100 is a little above 110
    return OmegaConf.merge(cfg, {"trainer": {"max_steps": steps}})  # type: ignore[return-value]


def _check_best(cfg: DictConfig) -> None:
    """Refuses a best checkpoint where some checkpoints have no validation to be compared by."""
    checkpoint = cfg.callbacks.get("checkpoint")
    if OmegaConf.is_config(checkpoint) and checkpoint.get("best") and checkpoint.every % cfg.trainer.validate_every:
        raise UserError(
            f"callbacks.checkpoint.best compares validations: callbacks.checkpoint.every={checkpoint.every} must be a "
            f"multiple of trainer.validate_every={cfg.trainer.validate_every}"
        )


def _check_data(cfg: DictConfig) -> None:
    """Refuses data without the pairs that the loss needs, and frames that its images cannot have."""
    if class_attribute(cfg.loss._target_, "needs_pairs") and not class_attribute(cfg.data._target_, "has_pairs"):
        fitting = [*_having("data", "has_pairs", True), *_having("loss", "needs_pairs", False)]
        raise UserError(
            f"{chosen('loss', cfg)} needs pairs, but {chosen('data', cfg)} has single images: "
            f"use {' or '.join(fitting)}"
        )
    if cfg.data.get("masks") is not None and any(
        class_attribute(cfg.loss._target_, name) for name in ("needs_pairs", "needs_reference", "needs_residuals")
    ):
        raise UserError(f"data.masks weighs the pixels of the plain error, not of {chosen('loss', cfg)}: use loss=sft")
    framing, fixed = cfg.framing, class_attribute(cfg.data._target_, "fixed_resolution")
    if fixed and (framing.flip or framing.random_crop or framing.resolution not in (None, fixed)):
        raise UserError(
            f"{chosen('data', cfg)} has pictures of {fixed} pixels whose places matter: leave out "
            "framing.resolution, framing.flip and framing.random_crop"
        )


def _check_processes(num_nodes: int, processes: int) -> None:
    """Refuses several machines without a launcher, and several processes in a sweep."""
    if num_nodes > 1 and not launched():
        raise UserError(
            f"trainer.num_nodes={num_nodes} needs a launcher that starts the other machines: "
            "srun in a Slurm job, or torchrun on each of them; on this machine alone use trainer.num_nodes=1"
        )
    if processes > 1 and sweeping():
        raise UserError(
            f"a sweep trains on one device, got {processes}: the processes of DDP start by repeating the command line, "
            "which here is the whole sweep; use trainer.devices=1, or one command for each run"
        )


def _check_cache(cfg: DictConfig) -> None:
    """Refuses a cache of what changes from visit to visit."""
    if cfg.framing.random_crop and cfg.cache != "off":
        raise UserError("framing.random_crop cuts another part at every visit, which no cache can hold: add cache=off")
    if cfg.lora.get("text_encoder") and cfg.cache == "all":
        raise UserError(
            "lora.text_encoder changes what prompts become, which the cache would not notice: add cache=latents"
        )
    if cfg.data.get("shuffle_tags") and cfg.cache == "all":
        raise UserError(
            "data.shuffle_tags makes another text at every visit, which the cache cannot hold: add cache=latents"
        )


def composes(cfg: DictConfig, overrides: str) -> bool:
    """Whether a training may have these settings too: several key=value, with spaces between them."""
    try:
        check_composition(OmegaConf.merge(cfg, OmegaConf.from_dotlist(overrides.split())))  # type: ignore[arg-type]
    except UserError:
        return False
    return True


def check_plan(cfg: DictConfig) -> None:
    """Refuse what a training would refuse, and a rate that is none.

    Raises:
        UserError: as `check_composition`.
    """
    check_composition(cfg)
    if cfg.rate is not None and not cfg.rate > 0:
        raise UserError(f"rate must be positive, in pairs a second, or null, got {cfg.rate}")


def check_generation(cfg: DictConfig) -> None:
    """Refuse a drawing that cannot run.

    Raises:
        UserError: if `check_settings` refuses it or a value is out of range.
    """
    check_settings(cfg)
    _check_seed(cfg.seed)
    if not cfg.out.strip():
        raise UserError("out is empty: name the folder to draw into")
    check_range("set_size", cfg.set_size, 2, 64)
    check_range("num_sets", cfg.num_sets, 1, 10_000)
    if not (isinstance(cfg.prompts, str) or (isinstance(cfg.prompts, ListConfig) and len(cfg.prompts))):
        raise UserError(f"prompts must be a text file, a list of prompts, or shapes, got {written(cfg.prompts)}")
    if not isinstance(cfg.loras, str | ListConfig) or not all(isinstance(lora, str) for lora in cfg.loras):
        raise UserError(f"loras must be a file or a run folder, or a list of them, got {written(cfg.loras)}")


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise UserError(f"seed must be at least 0 and below 2^32, got {seed}")


def check_settings(cfg: DictConfig) -> None:
    """Refuse what composition alone lets pass.

    Raises:
        UserError: if a value is missing, an interpolation leads nowhere, nothing reads a key, or a value is none of its
            choices.
    """
    for key in sorted(OmegaConf.missing_keys(cfg)):
        raise UserError(no_value(key))
    try:
        values = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(explain_value(error)) from error
    _check_representable(values, "")
    _check_typed(cfg)
    for group in ("callbacks", "logger"):
        for name, node in cfg.get(group, {}).items():
            if node is None:
                raise UserError(f"{group}.{name} is null: leave it out with ~{group}.{name}")
            if not isinstance(node, DictConfig) or "_target_" not in node:
                raise UserError(unknown_setting(f"{group}.{name}", options(group), cfg))
    if "logger" in cfg:
        _check_kinds(cfg.logger, OmegaConf.merge(*map(OmegaConf.load, (CONF_DIR / "logger").glob("*.yaml"))))


def _having(group: str, attribute: str, value: bool) -> list[str]:
    """The options of a group whose classes have an attribute of that value, as they are written: "data=pairs"."""
    return [
        name.replace("/", "=")
        for name, target in targets().items()
        if name.startswith(f"{group}/") and class_attribute(target, attribute) is value
    ]


def _check_representable(value: Any, key: str) -> None:
    """Refuses numbers that no tensor holds, and text that no file can be written with or be named by."""
    if isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _check_representable(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, float) and not abs(value) <= _LARGEST:
        raise UserError(f"{key} must be a finite number of single precision, got {value}")
    elif isinstance(value, int) and not abs(value) < 2**63:
        raise UserError(f"{key} must be below 2^63, got {value}")
    elif isinstance(value, str) and (not is_text(value) or "\0" in value):
        raise UserError(f"{key} holds characters that UTF-8 has not, or a null byte: {written(value)}")


def _check_typed(cfg: DictConfig) -> None:
    """Refuses a key beyond the settings of a typed node, and a value that is none of its choices."""
    declared = settings_of(OmegaConf.get_type(cfg))
    if "_target_" in declared and cfg._target_ != declared["_target_"].default:
        key = str(cfg._get_full_key("_target_"))
        group = key.partition(".")[0]
        raise UserError(
            f"{key}: the class comes with the option {group}=<option>, of conf/{group} or of --config-dir: choose that"
        )
    for key, value in ((str(key), value) for key, value in cfg.items()):
        full_key = cfg._get_full_key(key)
        if declared and key not in declared:  # `+key=value` can add one
            raise UserError(unknown_setting(full_key, declared, cfg._get_root()))
        choices = declared[key].metadata.get("choices") if declared else None
        for item in value if isinstance(value, ListConfig) else [value]:
            if choices and item is not None and item not in choices:
                raise UserError(
                    f"{full_key} must be one of {', '.join(map(str, choices))}, got {written(item)}"
                    + nearest(item, choices)
                )
        if isinstance(value, ListConfig) and value._metadata.element_type is str:
            for item in value:
                if not isinstance(item, str):
                    raise UserError(f"{full_key} must be a list of texts, got {written(item)} in it")
        if isinstance(value, DictConfig):
            several = key in ("callbacks", "logger")  # nodes by names of their own
            untyped = declared and declared[key].type == "Any" and not settings_of(OmegaConf.get_type(value))
            if value and untyped and not several and "_target_" not in value:
                raise UserError(no_value(full_key))  # an experiment sets something of a group that was left out
            _check_typed(value)
        elif declared and declared[key].type == "Any" and choices is None:  # a file wrote `loss: dpo`
            raise UserError(f"{key} must hold settings, got {written(value)}: write it as override /{key}: <option>")


def _check_kinds(cfg: DictConfig, shipped: Any) -> None:
    """Refuses values of another kind than the shipped file's, for classes that are not ours and have no schema."""
    for key in [str(key) for key in cfg if key in shipped]:
        new = cfg[key]
        try:
            old = shipped[key]
        except InterpolationResolutionError:  # it needs the rest of the composition, or a running job
            continue
        if isinstance(old, DictConfig) and isinstance(new, DictConfig):
            _check_kinds(new, old)
        fits = new is None or type(new) is type(old) or (type(new) is int and type(old) is float)
        if isinstance(old, int | float) and not fits:
            raise UserError(f"{cfg._get_full_key(key)} must be {KINDS[type(old)]}, got {written(new)}")


CHECKS = {"train": check_composition, "benchmark": check_composition, "plan": check_plan, "generate": check_generation}


def sweeping() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
