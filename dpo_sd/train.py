"""Trains a LoRA: `python -m dpo_sd.train experiment=quickstart`."""

from __future__ import annotations

import logging
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from dpo_sd.composition.application import entry_point
from dpo_sd.composition.checks import composes, with_epochs
from dpo_sd.composition.options import own_flags
from dpo_sd.composition.presets import overrides, preset, say_choice
from dpo_sd.data.cache import Cache
from dpo_sd.errors import UserError, in_shell
from dpo_sd.files.claims import held, in_turn
from dpo_sd.training import cluster
from dpo_sd.training.resume import check_same, check_same_run, newest_checkpoint

if TYPE_CHECKING:
    from dpo_sd.callbacks.run_record import RunRecord
    from dpo_sd.callbacks.watcher import Run, Watcher
    from dpo_sd.data.datamodule import DataModule
    from dpo_sd.data.frames import Framing
    from dpo_sd.data.source import Found, PreparedData, Source
    from dpo_sd.forecast.workload import Workload
    from dpo_sd.judges.judge import Judge
    from dpo_sd.lora.attaching import LoRA
    from dpo_sd.losses import Loss
    from dpo_sd.models.base import Base
    from dpo_sd.models.sampling import Sampler
    from dpo_sd.models.stable_diffusion import StableDiffusion
    from dpo_sd.noise import Noising
    from dpo_sd.training.hardware import Hardware
    from dpo_sd.training.optimizers import AdamW
    from dpo_sd.training.reference_cache import ReferenceErrors
    from dpo_sd.training.step import DiffusionModule

log = logging.getLogger(__name__)


class Parts(NamedTuple):
    """The objects of a composition, all of them light: values are checked, and nothing is loaded."""

    hardware: Hardware
    loss: Loss
    lora: LoRA
    sampler: Sampler
    framing: Framing
    noising: Noising
    optimizer: AdamW
    source: Source
    base: Base
    judge: Judge | None
    cache: Cache


@entry_point("train", resumable=True)
def main(cfg: DictConfig) -> float | None:
    """One run from its composition; returns the win rate of its verdict, for sweeps that search."""
    say_choice()
    folder = Path(HydraConfig.get().runtime.output_dir)
    with held(folder) if cluster.first_process() else nullcontext():
        return trained(cfg, folder)


def trained(cfg: DictConfig, folder: Path) -> float | None:
    """Trains in a folder that no other process has; cheap parts come first: a mistake is met before weights load."""
    parts = composed(cfg)
    accumulation = parts.hardware.accumulation(cfg.pairs_per_update, processes(cfg))
    resume = resumed(cfg, folder)
    checkpoint = newest_checkpoint(resume)
    if checkpoint is not None and cfg.trainer.max_epochs is None:  # otherwise the data says how many updates there are
        check_same_run(checkpoint, plain(cfg))
    check_card(cfg, parts, resume)
    for line in parts.base.to_fetch():
        say(f"model   {line}")
    found = parts.source.find(parts.cache, fetch=True)  # data of no use is met before weights load
    cfg = with_epochs(cfg, found.train)
    parts.optimizer.check(cfg.trainer.max_steps)
    settings = plain(cfg)
    if checkpoint is not None and cfg.trainer.max_epochs is not None:
        check_same_run(checkpoint, settings)

    from dpo_sd.callbacks.metrics import Metrics
    from dpo_sd.callbacks.run_record import RunRecord
    from dpo_sd.callbacks.watcher import Run
    from dpo_sd.forecast.explaining import explained
    from dpo_sd.training.trainer import make_trainer

    record = RunRecord(folder, settings, overrides())
    metrics = Metrics(cfg.trainer.log_every, cfg.trainer.validate_every)
    watchers = [metrics, *composed_watchers(cfg.callbacks), record]
    trainer = make_trainer(cfg, parts.hardware, folder, accumulation, watchers)
    say(f"run     {folder}")
    model = loaded(parts, cfg.seed)
    check_model(parts, model, found, watchers)
    with continuable(folder), explained(workload(cfg, parts, model.resolution), partial(going_on, folder)):
        data = prepared(parts, model, record, resume, checkpoint, trainer.is_global_zero)
        say(update_line(cfg, parts, accumulation, len(data.train)))
        if trainer.is_global_zero:
            record.add(**identity(cfg, parts, model, data))
        module, datamodule = step(cfg, parts, model, data, trainer.global_rank, checkpoint is not None)
        module.identity = {"settings": settings, "data": data.fingerprint, "model": model.fingerprint}
        run = Run(trainer, module, datamodule, parts.judge)
        for watcher in watchers:
            watcher.run = run
            if promise := watcher.promise(run):
                say(promise)
        trainer.fit(module, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
    return conclude(run, watchers, record)


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The settings as dictionaries and lists, without interpolations."""
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    return settings


def composed(cfg: DictConfig) -> Parts:
    """The parts of a training, checked as far as that is cheap.

    Raises:
        UserError: if a value is out of range, the machine, a LoRA file or the optimiser's package is not there, or the
            base is not one that can be trained.
    """
    hardware = instantiate(cfg.hardware)
    hardware.check(cfg.trainer.devices, preset=preset())
    groups = ("loss", "lora", "sampler", "framing", "noising", "optimizer", "data", "model")
    judge = instantiate(cfg.judge) if cfg.judge else None
    cache = Cache(Path(cfg.cache_dir).expanduser(), cfg.cache, half=hardware.weights != "float32")
    parts = Parts._make([hardware, *(instantiate(cfg[group]) for group in groups), judge, cache])
    parts.base.check()
    parts.lora.check()
    if cfg.trainer.max_epochs is None:
        parts.optimizer.check(cfg.trainer.max_steps)
    return parts


def processes(cfg: DictConfig) -> int:
    """How many processes train together, one on each device."""
    return cfg.trainer.devices * cfg.trainer.num_nodes


def check_model(parts: Parts, model: StableDiffusion, found: Found, watchers: Sequence[Watcher]) -> None:
    """Refuses a model that the data, or a watcher such as the verdict with its judge, can do nothing with.

    Raises:
        UserError: if it cannot be used.
    """
    parts.source.check(model)
    size = (parts.sampler.width or model.resolution, parts.sampler.height or model.resolution)
    for watcher in watchers:
        watcher.check(parts.judge, size, found.held_out)


def prepared(
    parts: Parts, model: StableDiffusion, record: RunRecord, resume: str | None, checkpoint: Path | None, first: bool
) -> PreparedData:
    """The encoded data, said line by line; with a checkpoint, it and the model are those of the checkpoint.

    The record begins once nothing can be refused any more; `first` says whether this process writes it.
    """
    if checkpoint is not None:
        check_same(checkpoint, "model", model.fingerprint)
    elif first:
        record.begin()
    # of processes that a launcher starts together, the first prepares what the others then find
    turn = in_turn(parts.cache.folder / ".preparing") if cluster.launched() else nullcontext()
    with turn:
        data = parts.source.prepare(model, parts.sampler, parts.framing, parts.cache)
    for line in [*data.report, *reference_notes(parts.source, parts.lora.init_from)]:
        say(f"data    {line}")
    if checkpoint is not None:
        check_same(checkpoint, "data", data.fingerprint)
        say(f"resume  {checkpoint}")
        if first:
            record.begin()
    elif resume:
        say(f"resume  {resume} has no checkpoint yet: starting it again from its first update")
    return data


def check_card(cfg: DictConfig, parts: Parts, resume: str | None) -> None:
    """Refuses a run that by its plan the GPU does not hold, before anything is fetched, loaded or encoded.

    Raises:
        UserError: if it does not fit, with overrides that do.
    """
    hardware = parts.hardware
    if hardware.accelerator == "cpu" or hardware.memory_gib is None:
        return
    import torch

    from dpo_sd.forecast.memory import advice, needs
    from dpo_sd.forecast.phases import Forecast
    from dpo_sd.forecast.units import gib

    def allowed(overrides: str) -> bool:
        """Whether this run may have them; one that goes on cannot change what is learnt."""
        changes = {override.partition(".")[0] for override in overrides.split()}
        return composes(cfg, overrides) and (resume is None or changes <= {"hardware", "sampler"})

    gpu = torch.cuda.get_device_properties(hardware.device)
    planned = workload(cfg, parts, parts.base.family.resolution)
    forecast = Forecast(replace(planned, card=gpu.total_memory))
    if not forecast.fits():
        raise UserError(
            f"{needs(forecast.worst)} GiB of the {gib(gpu.total_memory)} of {gpu.name}, as it is planned: "
            f"hardware.memory_gib=null tries it nevertheless; it {advice(forecast, allowed)}"
        )


def workload(cfg: DictConfig, parts: Parts, resolution: int) -> Workload:
    """Settings of the run that decide what it takes of a card.

    Args:
        resolution: side of the images that the model was trained on, in pixels.
    """
    from dpo_sd.forecast.workload import of_composition

    named = {name: parts._asdict()[name] for name in ("lora", "loss", "optimizer", "hardware", "sampler")}
    return of_composition(cfg, parts.framing.resolution or resolution, **named)


def update_line(cfg: DictConfig, parts: Parts, accumulation: int, n: int) -> str:
    """Line on the updates of a run: their micro-batches and passes over n training samples."""
    on = f" on {processes(cfg)} devices" if processes(cfg) > 1 else ""
    micro = f"{accumulation} x {parts.hardware.micro_batch}{on}"
    passes = cfg.pairs_per_update * cfg.trainer.max_steps / n
    each = f"{cfg.pairs_per_update} {'pairs' if parts.source.has_pairs else 'pictures'} ({micro})"
    return f"update  {each}, {cfg.trainer.max_steps} updates, which is {passes:.3g} passes over the data"


def identity(cfg: DictConfig, parts: Parts, model: StableDiffusion, data: PreparedData) -> dict[str, Any]:
    """Entries of run.json that tell on what and from what a run learns."""
    from dpo_sd.training.provenance import device_name

    return {
        "device": device_name(parts.hardware.accelerator),
        "model": {"name": model.name, "path": cfg.model.path, "fingerprint": model.fingerprint},
        "model_commit": parts.base.commit,
        "data": data.fingerprint,
        "data_commit": parts.source.commit,
        "parents": [parts.lora.init_from] if parts.lora.init_from else [],
    }


def step(
    cfg: DictConfig, parts: Parts, model: StableDiffusion, data: PreparedData, rank: int, resumed: bool
) -> tuple[DiffusionModule, DataModule]:
    """The training step, and the batches that it takes."""
    from dpo_sd.data.datamodule import DataModule
    from dpo_sd.training.step import DiffusionModule, needed_networks

    if parts.hardware.compile and data.train.sizes is not None:
        from dpo_sd.models import compilation

        compilation.compile_blocks(model.unet, sizes=len(set(data.train.sizes.tolist())))
    if cfg.cache != "all" and parts.hardware.half is not None:
        model.halve_text(parts.hardware.half)
    encodes = needed_networks(model, cfg.cache)
    kept = reference_cache(cfg, parts, model, data, rank, resumed)
    taught = (parts.loss, parts.optimizer, cfg.trainer.max_steps, cfg.seed, encodes, kept)
    module = DiffusionModule(model, *taught, ema_decay=cfg.trainer.ema_decay)
    module.set_training(True)  # the adapters' dropout; the base has none
    return module, DataModule(
        data,
        parts.source,
        parts.sampler,
        pairs_per_update=cfg.pairs_per_update,
        micro_batch=parts.hardware.micro_batch,
        seed=cfg.seed,
        num_train_timesteps=model.noise_scheduler.config["num_train_timesteps"],
        factor=model.factor,
        draws_per_pair=parts.loss.draws_per_pair,
        num_workers=parts.hardware.num_workers,
        noising=parts.noising,
    )


def composed_watchers(callbacks: DictConfig) -> list[Watcher]:
    """The watchers of the group `callbacks`, in the order in which they act.

    Raises:
        UserError: if a class is no watcher.
    """
    from dpo_sd.callbacks.watcher import Watcher

    watchers = {name: instantiate(node) for name, node in callbacks.items()}
    for name, watcher in watchers.items():
        if not isinstance(watcher, Watcher):
            raise UserError(f"callbacks.{name}: its class must have the base class Watcher of dpo_sd.callbacks.watcher")
    return sorted(watchers.values(), key=lambda watcher: watcher.acts_last)


def resumed(cfg: DictConfig, run: Path) -> str | None:
    """The run to continue: the one that is named, or this job's own where a scheduler starts it again.

    Raises:
        UserError: if the folder holds a run that nobody asked to continue.
    """
    if cfg.resume is not None or not (run / "run.json").exists():
        return cfg.resume
    if cluster.restarted():
        return str(run)
    if cluster.first_process():
        raise UserError(
            f"{run} holds a run already: continue it with {in_shell('resume', run)}, or choose another hydra.run.dir"
        )
    return None


def loaded(parts: Parts, seed: int) -> StableDiffusion:
    """The model as the hardware is to have it, with its adapters."""
    from dpo_sd.lora.adapters import weights_of
    from dpo_sd.models.ready import ready

    hardware = parts.hardware
    model = ready(parts.base, hardware.device, hardware.weights, hardware.gradient_checkpointing, hardware.compile, say)
    say(f"lora    {parts.lora.attach(model, seed)}")
    if hardware.compile and weights_of(model).dora:
        raise UserError(f"{parts.lora.init_from} is a DoRA, which cannot be compiled: use hardware.compile=false")
    return model


def reference_cache(
    cfg: DictConfig, parts: Parts, model: StableDiffusion, data: PreparedData, rank: int, resumed: bool
) -> ReferenceErrors | None:
    """The errors of the reference, kept under all that they depend on but the pair and the draw."""
    if parts.loss.reference == "live" or parts.loss.draws_per_pair is None:
        return None
    from dpo_sd.files.tensors import content_key
    from dpo_sd.lora.adapters import adapter_key
    from dpo_sd.noise import Noising
    from dpo_sd.training.reference_cache import ReferenceErrors

    # absent where they are as ever, so that errors of runs that knew no other are read
    further: dict[str, Any] = {} if vars(parts.noising) == vars(Noising()) else {"noising": vars(parts.noising)}
    if parts.loss.huber_c is not None:
        further["huber_c"] = parts.loss.huber_c
        if parts.loss.huber_schedule != "constant":
            further["huber_schedule"] = parts.loss.huber_schedule
    key = content_key(
        kind="reference errors 1",
        model=model.fingerprint,
        lora=adapter_key(model, "reference"),
        arithmetic=parts.hardware.arithmetic,
        weighting=parts.loss.min_snr_gamma,
        seed=cfg.seed,
        caption_dropout=parts.source.caption_dropout,
        framing=OmegaConf.to_container(cfg.framing, resolve=True),
        cache=[parts.cache.keep, parts.cache.half],
        **further,
        # errors from before SDXL was told the mirrored place of a crop are not read
        **({"texts": repr(data.train.vary)} if data.train.vary is not None else {}),
        **({"crop_place": "mirrored"} if model.family.pooled and parts.framing.flip else {}),
    )
    folder = parts.cache.folder / "reference" / key
    images = 2 if parts.loss.needs_pairs else 1
    kept = ReferenceErrors(folder, data.train.contents, parts.loss.draws_per_pair, rank, resumed, images)
    others = sum(other != folder for other in folder.parent.glob("*"))
    of = "base, reference, seed, precision, noise or framing"
    unread = f"; {others} kept of another {of}: not read" if others else ""
    say(f"loss    {kept.filled:.0%} of the reference's errors are known from earlier runs{unread}")
    return kept


def reference_notes(source: Source, init_from: str | None) -> Iterator[str]:
    """Note for pairs that were drawn with another LoRA than the training starts from."""
    from dpo_sd.lora.finding import lora_digest

    drawn_with = source.drawn_with()
    if drawn_with is None:
        return
    named = " + ".join(f"{lora['path']}:{lora['weight']:g}" for lora in drawn_with) or "the base alone"
    start = [] if init_from is None else [(lora_digest(init_from), 1.0)]
    if start != [(lora["sha256"], lora["weight"]) for lora in drawn_with]:
        yield (
            f"these pairs were drawn with {named}, and training starts from {init_from or 'the base'}: "
            "give lora.init_from=<that LoRA> to refine the LoRA that drew them"
        )


@contextmanager
def continuable(run: Path) -> Iterator[None]:
    """Ctrl-C inside ends the run and says how to go on."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as end:  # Lightning makes the one the other
        own = [shlex.join(flag) for flag in own_flags(sys.argv[1:]).items() if flag[0] == "--config-dir"]
        say(f"stopped; continue with\n  {' '.join(['python -m dpo_sd.train', *own, in_shell('resume', run)])}")
        raise KeyboardInterrupt from end


def going_on(run: Path, overrides: str) -> str:
    """Words on the checkpoint that a run has kept which ended early, and on the command that continues it."""
    checkpoint = newest_checkpoint(str(run))
    kept = "there is no checkpoint yet" if checkpoint is None else f"{checkpoint} is kept"
    return f"{kept}; go on with\n  python -m dpo_sd.train {in_shell('resume', run)} {overrides}".rstrip()


def conclude(run: Run, watchers: Sequence[Watcher], record: RunRecord) -> float | None:
    """Writes the summary, says what the run has come to, and returns its win rate if there is one.

    Raises:
        Exception: if a watcher failed with one, after all that the run has come to is written and said.
    """
    say_counts(run)
    if not run.is_global_zero:
        return None
    summary = record.finish(run, watchers)
    for watcher in watchers:
        if report := watcher.report():
            say(report)
    for sheet in sorted((run.folder / "samples").glob("step=*.png"))[-1:]:
        say(f"before/after  {sheet}")
    for file in sorted((run.folder / "lora").glob("*.safetensors")):
        if not re.search(r"-\d{6,}$", file.stem):  # of a checkpoint
            say(f"lora          {file}")
    for watcher in watchers:
        if watcher.failure is not None:
            raise watcher.failure
    return summary["verdict"]["win_rate"] if summary["verdict"] else None


def say_counts(run: Run) -> None:
    """Says what was left out, read and not computed, or compiled, and how often; all processes call."""
    import torch

    from dpo_sd.models import compilation

    if run.module.skipped:
        say(f"update  {run.module.skipped} of {run.step} were left out: their gradients overflowed float16")
    kept, strategy = run.module.reference_cache, run.trainer.strategy
    if kept is not None:
        counts = torch.tensor([kept.hits, kept.asked], device=strategy.root_device)
        hits, asked = strategy.reduce(counts, reduce_op="sum").tolist()
        say(f"loss    {hits} of {asked} errors of the reference were read and not computed")
    if graphs := compilation.graphs():
        say(f"compile {graphs} graphs for {compilation.blocks(run.module.unet)} blocks of the UNet")


def say(text: str) -> None:
    """A line for the user and for the log."""
    from lightning.pytorch.utilities import rank_zero_only

    if rank_zero_only.rank == 0:  # every process of DDP has a log of its own
        print(text, flush=True)
    log.info(text)


if __name__ == "__main__":
    main()
