"""Composition: the types of train.yaml, checks of what was composed, and the entry points' Hydra application.

Nothing heavy is imported here, so that `--help` and mistakes are answered before torch is loaded.
"""

from __future__ import annotations

import functools
import logging
import netrc
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from dpo_sd.cluster import launched, run_id
from dpo_sd.errors import UserError
from dpo_sd.hardware import accumulation
from dpo_sd.mistakes import (
    KINDS,
    chosen,
    explain,
    explain_value,
    nearest,
    no_value,
    options,
    settings_of,
    unknown_setting,
    written,
)
from dpo_sd.resume import resume_arguments
from dpo_sd.schema import CONF_DIR, SCHEMAS, class_attribute, schema
from dpo_sd.shapes.scenes import RESOLUTION


@dataclass
class Train:
    """Types of the top level of train.yaml, which holds the values; the groups bring types of their own."""

    name: str = MISSING
    seed: int = MISSING
    pairs_per_update: int = MISSING
    resume: str | None = MISSING
    cache: str = field(default=MISSING, metadata={"choices": ("all", "latents", "off")})
    cache_dir: str = MISSING
    model: Any = MISSING
    lora: Any = MISSING
    data: Any = MISSING
    loss: Any = MISSING
    optimizer: Any = MISSING
    trainer: Any = MISSING
    callbacks: Any = field(default_factory=dict)
    logger: Any = field(default_factory=dict)
    sampler: Any = MISSING
    framing: Any = MISSING
    hardware: Any = MISSING


@dataclass
class Plan(Train):
    """Types of the top level of plan.yaml."""

    rate: float | None = MISSING
    measure: bool = MISSING


@dataclass
class Generate:
    """Types of the top level of generate.yaml."""

    out: str = MISSING
    prompts: Any = field(default=MISSING, metadata={"choices": ()})  # no group: text or a list
    loras: Any = field(default=MISSING, metadata={"choices": ()})
    set_size: int = MISSING
    num_sets: int = MISSING
    seed: int = MISSING
    model: Any = MISSING
    sampler: Any = MISSING
    hardware: Any = MISSING


@dataclass
class Annotate:
    """Types of the top level of annotate.yaml."""

    pairs: str = MISSING
    merge: list[str] = field(default_factory=list)
    export: str | None = MISSING
    annotator: Any = MISSING


@dataclass
class Export:
    """Types of the top level of export.yaml."""

    lora: Any = MISSING
    format: str = field(default=MISSING, metadata={"choices": ("kohya", "diffusers", "peft", "merged")})
    out: str = MISSING
    model: Any = MISSING


@dataclass
class Trainer:
    """Types of the trainer group, whose values conf/trainer holds and the entry point reads."""

    max_steps: int = MISSING
    validate_every: int = MISSING
    log_every: int = MISSING
    devices: int = MISSING
    num_nodes: int = MISSING
    strategy: str = field(default=MISSING, metadata={"choices": ("auto", "ddp")})
    gradient_clip: float | None = MISSING
    deterministic: bool = MISSING


def check_composition(cfg: DictConfig) -> None:
    """Refuse a training that cannot run, before anything heavy is imported.

    Args:
        cfg: composed from train.yaml.

    Raises:
        UserError: when `check_settings` refuses it, when a value is out of range, when a loss needs pairs where there
            are none, when pictures are framed that cannot be, and when pairs_per_update does not divide into
            micro-batches.
    """
    check_settings(cfg)
    if not cfg.cache_dir:
        raise UserError("cache_dir is empty: name a folder, or leave it out")
    if cfg.name in ("", ".", "..") or "/" in cfg.name or "\\" in cfg.name:
        raise UserError(f"name must be the name of a folder, got {written(cfg.name)}")
    _check_seed(cfg.seed)
    for key in ("max_steps", "validate_every", "log_every", "devices", "num_nodes"):
        if cfg.trainer[key] < 1:
            raise UserError(f"trainer.{key} must be at least 1, got {cfg.trainer[key]}")
    if cfg.trainer.gradient_clip is not None and not cfg.trainer.gradient_clip > 0:
        raise UserError(f"trainer.gradient_clip must be positive, or null for none, got {cfg.trainer.gradient_clip}")
    if _says(cfg.loss._target_, "needs_pairs") and _says(cfg.data._target_, "has_pairs") is False:
        paired = [name for name, target in SCHEMAS.items() if _says(target, "has_pairs")]
        single = [name for name, target in SCHEMAS.items() if _says(target, "needs_pairs") is False]
        raise UserError(
            f"{chosen('loss', cfg)} needs pairs, but {chosen('data', cfg)} has single images: "
            f"use {' or '.join(paired + single).replace('/', '=')}"
        )
    framing = cfg.framing
    reframed = framing.flip or framing.random_crop or framing.resolution not in (None, RESOLUTION)
    if reframed and _says(cfg.data._target_, "can_be_framed") is False:
        raise UserError(
            f"{chosen('data', cfg)} has pictures of {RESOLUTION} pixels whose places matter: leave out "
            "framing.resolution, framing.flip and framing.random_crop"
        )
    _check_cache(cfg)
    if cfg.optimizer.get("text_encoder_lr") is not None and not cfg.lora.get("text_encoder"):
        raise UserError(
            "optimizer.text_encoder_lr is given, but no text encoder is trained: add lora.text_encoder=true"
        )
    processes = cfg.trainer.devices * cfg.trainer.num_nodes
    if cfg.trainer.num_nodes > 1 and not launched():
        raise UserError(
            f"trainer.num_nodes={cfg.trainer.num_nodes} needs a launcher that starts the other machines: "
            "srun in a Slurm job, or torchrun on each of them; on this machine alone use trainer.num_nodes=1"
        )
    if processes > 1 and _sweeping():
        raise UserError(
            f"a sweep trains on one device, got {processes}: the processes of DDP start by repeating the command line, "
            "which here is the whole sweep; use trainer.devices=1, or one command for each run"
        )
    accumulation(cfg.pairs_per_update, cfg.hardware.micro_batch, processes)


def _check_cache(cfg: DictConfig) -> None:
    """Nothing is kept that changes from visit to visit."""
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
        UserError: when `check_settings` refuses it, and when a value is out of range.
    """
    check_settings(cfg)
    _check_seed(cfg.seed)
    for key, least in (("set_size", 2), ("num_sets", 1)):
        if cfg[key] < least:
            raise UserError(f"{key} must be at least {least}, got {cfg[key]}")
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
        UserError: when a value is missing, an interpolation leads nowhere, nothing reads a key, or a value is none of
            its choices.
    """
    for key in sorted(OmegaConf.missing_keys(cfg)):
        raise UserError(no_value(key))
    try:
        OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(explain_value(error)) from error
    _check_typed(cfg)
    for group in ("callbacks", "logger"):
        for name, node in cfg.get(group, {}).items():
            if node is None:
                raise UserError(f"{group}.{name} is null: leave it out with ~{group}.{name}")
            if "_target_" not in node:
                raise UserError(unknown_setting(f"{group}.{name}", options(group), cfg))
    if "logger" in cfg:
        _check_kinds(cfg.logger, OmegaConf.merge(*map(OmegaConf.load, (CONF_DIR / "logger").glob("*.yaml"))))


def _says(target: str, attribute: str) -> bool | None:
    return class_attribute(target, attribute) if target in SCHEMAS.values() else None


def _check_typed(cfg: DictConfig) -> None:
    """No typed node holds a key beyond its settings, and every value is among its choices."""
    declared = settings_of(OmegaConf.get_type(cfg))
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
        if isinstance(value, DictConfig):
            _check_typed(value)
        elif declared and declared[key].type == "Any" and choices is None:  # a file wrote `loss: dpo`
            raise UserError(f"{key} must hold settings, got {written(value)}: write it as override /{key}: <option>")


def _check_kinds(cfg: DictConfig, shipped: Any) -> None:
    """A class that is not ours has no schema: its values keep the kind they have in the shipped file."""
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


def entry_point(
    config_name: str, resumable: bool = False
) -> Callable[[Callable[[DictConfig], Any]], Callable[..., Any]]:
    """Decorator that makes `main(cfg)` a Hydra application on `conf/<config_name>.yaml`.

    The composition is checked before main begins. A mistake of the user's ends in one message and exit code 1, Ctrl-C
    in exit code 130; other exceptions keep their traceback. Called with a configuration, `main(cfg)` only runs.

    Args:
        config_name: of the file in conf/, without its ending; `CHECKS` has its check, `check_settings` serves the
            others.
        resumable: understands `resume=<run>`, see `dpo_sd.resume`.
    """

    def decorate(main: Callable[[DictConfig], Any]) -> Callable[..., Any]:
        @functools.wraps(main)
        def job(cfg: DictConfig) -> Any:
            try:
                CHECKS.get(config_name, check_settings)(cfg)
                return main(cfg)
            except Exception as error:
                message = explain(error)
                logging.getLogger("dpo_sd.failure").error(message or "failed", exc_info=message is None)
                _report(error)
                if not _sweeping():
                    if message:
                        _remove_empty_folder()
                    sys.exit(1)
                if message:
                    raise UserError(message) from error
                raise  # Hydra notes it and starts the next job

        application = hydra.main(config_path=str(CONF_DIR), config_name=config_name, version_base="1.3")(job)

        @functools.wraps(main)
        def run(cfg: DictConfig | None = None) -> Any:
            if cfg is not None:
                return main(cfg)
            os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come out of Hydra as they are
            try:
                if resumable:
                    sys.argv[1:] = resume_arguments(sys.argv[1:])
                application()
            except KeyboardInterrupt:
                sys.exit(130)
            except ValueError as error:  # a plain one is Hydra's own, about its flags and groups
                _report(error if explain(error) else UserError(error))
                sys.exit(1)
            except Exception as error:
                _report(error)
                sys.exit(1)

        return run

    return decorate


def _remove_empty_folder() -> None:
    """Takes away the folder of a job that a mistake ended before there was anything but its log."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    log = folder / f"{HydraConfig.get().job.name}.log"
    with suppress(OSError):
        if list(folder.iterdir()) == [log]:
            log.unlink()
            folder.rmdir()


def _sweeping() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def _report(error: BaseException) -> None:
    message = explain(error)
    if message is None:
        traceback.print_exception(error)
    else:
        print(f"error: {message}", file=sys.stderr)


def _groups(*names: str) -> str:
    """Groups of conf/ and their options, for `--help`; all of them where none is named."""
    groups = names or sorted(path.name for path in CONF_DIR.iterdir() if path.is_dir() and path.name != "annotator")
    return "\n".join(f"  {group:<11}{', '.join(options(group))}" for group in groups)


def _wandb_logged_out() -> bool:
    if "WANDB_API_KEY" in os.environ:
        return False
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is None
    except (OSError, netrc.NetrcParseError):
        return True


def _for_model(name: str, values: Any) -> Any:
    """The value for a family of models: `${for_model:${model.name},{tiny:1e-3,sd15:1e-4}}`."""
    if name not in values:
        raise UserError(f"this recipe has no values for model={name}, only for {', '.join(map(str, values))}")
    return values[name]


def _micro_batch(most: Any, _root_: DictConfig) -> int:
    """The most pairs that a preset allows the model and that divide an update: `${micro_batch:{tiny:16,sd15:4}}`."""
    allowed, pairs = most[_root_.model.name], _root_.get("pairs_per_update")  # drawing pictures knows no updates
    if not isinstance(pairs, int) or pairs < 1:
        return allowed
    share = max(1, pairs // max(1, _root_.trainer.devices * _root_.trainer.num_nodes))
    found = max(n for n in range(1, allowed + 1) if share % n == 0)
    return found if 2 * found >= min(allowed, share) else allowed  # 17 one by one would be slow: that is refused


def _register() -> None:
    store = ConfigStore.instance()
    store.store(group="schema", name="train", node=Train)
    store.store(group="schema", name="plan", node=Plan)
    store.store(group="schema", name="generate", node=Generate)
    store.store(group="schema", name="annotate", node=Annotate)
    store.store(group="schema", name="export", node=Export)
    store.store(group="schema", name="trainer", node=Trainer)
    for name, target in SCHEMAS.items():
        group, _, option = f"schema/{name}".rpartition("/")
        store.store(group=group, name=option, node=schema(target))
    OmegaConf.register_new_resolver("config_groups", _groups, replace=True)
    OmegaConf.register_new_resolver("run_id", lambda otherwise: run_id() or otherwise, replace=True)
    OmegaConf.register_new_resolver("micro_batch", _micro_batch, replace=True)
    OmegaConf.register_new_resolver("for_model", _for_model, replace=True)
    OmegaConf.register_new_resolver("wandb_logged_out", _wandb_logged_out, replace=True)


_register()
