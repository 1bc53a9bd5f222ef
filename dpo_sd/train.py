"""Trains a LoRA: `python -m dpo_sd.train experiment=quickstart`."""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from dpo_sd.composition.application import entry_point
from dpo_sd.data.cache import Cache
from dpo_sd.errors import UserError
from dpo_sd.training import cluster
from dpo_sd.training.resume import check_same, check_same_run, newest_checkpoint

if TYPE_CHECKING:
    from dpo_sd.callbacks.run_record import RunRecord
    from dpo_sd.callbacks.watcher import Run, Watcher
    from dpo_sd.data.source import Source
    from dpo_sd.models.stable_diffusion import StableDiffusion
    from dpo_sd.training.reference_cache import ReferenceErrors

log = logging.getLogger(__name__)


@entry_point("train", resumable=True)
def main(cfg: DictConfig) -> float | None:
    """One run from its composition; returns the win rate of its verdict, for sweeps that search.

    What is cheap is built first, so that a mistake is met before any weights load.
    """
    run = Path(HydraConfig.get().runtime.output_dir)
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    choices = HydraConfig.get().runtime.choices

    hardware = instantiate(cfg.hardware)
    hardware.check(cfg.trainer.devices, preset=choices.get("hardware"))
    loss, lora, sampler, framing, optimizer, source, base = (
        instantiate(cfg[group]) for group in ("loss", "lora", "sampler", "framing", "optimizer", "data", "model")
    )
    judge = instantiate(cfg.judge) if cfg.judge else None
    lora.check()
    cache = Cache(Path(cfg.cache_dir).expanduser(), cfg.cache, half=hardware.weights != "float32")
    optimizer.check(cfg.trainer.max_steps)
    resume = resumed(cfg, run)
    world_size = cfg.trainer.devices * cfg.trainer.num_nodes
    accumulation = hardware.accumulation(cfg.pairs_per_update, world_size)
    checkpoint = newest_checkpoint(resume)
    if checkpoint is not None:
        check_same_run(checkpoint, settings)
    found = source.find(cache, fetch=True)  # data of no use is met before weights load

    import torch

    from dpo_sd.callbacks.metrics import Metrics
    from dpo_sd.callbacks.run_record import RunRecord
    from dpo_sd.callbacks.watcher import Run
    from dpo_sd.data.datamodule import DataModule
    from dpo_sd.forecast.explaining import explained
    from dpo_sd.forecast.workload import Workload
    from dpo_sd.models import compilation
    from dpo_sd.training.provenance import device_name
    from dpo_sd.training.step import DiffusionModule, needed_networks
    from dpo_sd.training.trainer import make_trainer

    record = RunRecord(run, settings, list(HydraConfig.get().overrides.task))
    metrics = Metrics(cfg.trainer.log_every, cfg.trainer.validate_every)
    watchers = [metrics, *composed_watchers(cfg.callbacks), record]
    trainer = make_trainer(cfg, hardware, run, accumulation, watchers)

    say(f"run     {run}")
    model = loaded(base, hardware, lora, cfg.seed)
    source.check(model)
    size = (sampler.width or model.resolution, sampler.height or model.resolution)
    for watcher in watchers:
        watcher.check(judge, size, found.held_out)
    if checkpoint is not None:
        check_same(checkpoint, "model", model.fingerprint)
    elif trainer.is_global_zero:
        record.begin()
    takes = Workload(
        model.name,
        lora,
        loss,
        optimizer,
        hardware,
        sampler,
        framing.resolution or model.resolution,
        cfg.cache,
        cfg.pairs_per_update // world_size,
    )
    with continuable(run), explained(takes, partial(going_on, run)):
        data = source.prepare(model, sampler, framing, cache)
    for line in [*data.report, *reference_notes(source, lora.init_from)]:
        say(f"data    {line}")
    if checkpoint is not None:
        check_same(checkpoint, "data", data.fingerprint)
        say(f"resume  {checkpoint}")
        if trainer.is_global_zero:
            record.begin()
    elif resume:
        say(f"resume  {resume} has no checkpoint yet: starting it again from its first update")
    micro = f"{accumulation} x {hardware.micro_batch}" + (f" on {world_size} devices" if world_size > 1 else "")
    passes = cfg.pairs_per_update * cfg.trainer.max_steps / len(data.train)
    each = f"{cfg.pairs_per_update} {'pairs' if source.has_pairs else 'pictures'} ({micro})"
    say(f"update  {each}, {cfg.trainer.max_steps} updates, which is {passes:.3g} passes over the data")
    if trainer.is_global_zero:
        record.add(
            device=device_name(hardware.accelerator),
            model={"name": model.name, "path": cfg.model.path, "fingerprint": model.fingerprint},
            data=data.fingerprint,
            parents=[lora.init_from] if lora.init_from else [],
        )

    if cfg.cache != "all" and hardware.half is not None:
        model.halve_text(hardware.half)
    encodes = needed_networks(model, cfg.cache)
    kept = reference_cache(cfg, hardware, model, loss, data, cache, trainer.global_rank, checkpoint is not None)
    module = DiffusionModule(model, loss, optimizer, cfg.trainer.max_steps, cfg.seed, encodes, kept)
    module.identity = {"settings": settings, "data": data.fingerprint, "model": model.fingerprint}
    datamodule = DataModule(
        data,
        source,
        sampler,
        pairs_per_update=cfg.pairs_per_update,
        micro_batch=hardware.micro_batch,
        seed=cfg.seed,
        num_train_timesteps=model.noise_scheduler.config["num_train_timesteps"],
        factor=model.factor,
        draws_per_pair=loss.draws_per_pair,
        num_workers=hardware.num_workers,
    )
    module.set_training(True)  # the adapters' dropout; the base has none
    watched = Run(trainer, module, datamodule, judge)
    for watcher in watchers:
        watcher.run = watched
        if promise := watcher.promise(watched):
            say(promise)
    with continuable(run), explained(takes, partial(going_on, run)):
        trainer.fit(module, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
    if kept is not None:
        counts = torch.tensor([kept.hits, kept.asked], device=trainer.strategy.root_device)
        hits, asked = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        say(f"loss    {hits} of {asked} errors of the reference were read and not computed")
    if hardware.compile:
        say(f"compile {compilation.graphs()} graphs for {compilation.blocks(model.unet)} blocks of the UNet")
    return conclude(watched, watchers, record)


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
        UserError: when the folder holds a run that nobody asked to continue.
    """
    if cfg.resume is not None or not (run / "run.json").exists():
        return cfg.resume
    if cluster.restarted():
        return str(run)
    if cluster.first_process():
        raise UserError(f"{run} holds a run already: continue it with resume={run}, or choose another hydra.run.dir")
    return None


def loaded(base: Any, hardware: Any, lora: Any, seed: int) -> StableDiffusion:
    """The model as the hardware is to have it, with its adapters."""
    from dpo_sd.models.ready import ready

    model = ready(base, hardware.device, hardware.weights, hardware.gradient_checkpointing, hardware.compile, say)
    say(f"lora    {lora.attach(model, seed)}")
    return model


def reference_cache(
    cfg: DictConfig, hardware: Any, model: Any, loss: Any, data: Any, cache: Cache, rank: int, resumed: bool
) -> ReferenceErrors | None:
    """Where the errors of the reference are kept, under all that they depend on but the pair and the draw."""
    if loss.reference == "live":
        return None
    from dpo_sd.files.tensors import content_key
    from dpo_sd.lora.adapters import adapter_key
    from dpo_sd.training.reference_cache import ReferenceErrors

    key = content_key(
        kind="reference errors 1",
        model=model.fingerprint,
        lora=adapter_key(model, "reference"),
        arithmetic=hardware.arithmetic,
        weighting=loss.min_snr_gamma,
        seed=cfg.seed,
        caption_dropout=cfg.data.get("caption_dropout"),
        framing=OmegaConf.to_container(cfg.framing, resolve=True),
        cache=[cache.keep, cache.half],
    )
    folder = cache.folder / "reference" / key
    images = 2 if loss.needs_pairs else 1
    kept = ReferenceErrors(folder, data.train.contents, loss.draws_per_pair, rank, resumed, images)
    others = sum(other != folder for other in folder.parent.glob("*"))
    unread = f"; {others} kept of another base, reference, seed, precision or framing: not read" if others else ""
    say(f"loss    {kept.filled:.0%} of the reference's errors are known from earlier runs{unread}")
    return kept


def reference_notes(source: Source, init_from: str | None) -> Iterator[str]:
    """What is to be said where pairs were drawn with another LoRA than the training starts from."""
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
        own_groups = [
            f"--config-dir {argument}" for flag, argument in itertools.pairwise(sys.argv) if flag == "--config-dir"
        ]
        say(f"stopped; continue with\n  {' '.join(['python -m dpo_sd.train', *own_groups, f'resume={run}'])}")
        raise KeyboardInterrupt from end


def going_on(run: Path, overrides: str) -> str:
    """What a run that ended early has kept, and the command that continues it."""
    checkpoint = newest_checkpoint(str(run))
    kept = "there is no checkpoint yet" if checkpoint is None else f"{checkpoint} is kept"
    return f"{kept}; go on with\n  python -m dpo_sd.train resume={run} {overrides}".rstrip()


def conclude(run: Run, watchers: Sequence[Watcher], record: RunRecord) -> float | None:
    """Writes the summary, says what the run has come to, and returns its win rate if there is one.

    Raises:
        Exception: if a watcher failed with one, after all that the run has come to is written and said.
    """
    if not run.is_global_zero:
        return None
    summary = record.finish(run, watchers)
    for watcher in watchers:
        if report := watcher.report():
            say(report)
    for sheet in sorted((run.folder / "samples").glob("step=*.png"))[-1:]:
        say(f"before/after  {sheet}")
    for file in sorted((run.folder / "lora").glob("*.safetensors")):
        say(f"lora          {file}")
    for watcher in watchers:
        if watcher.failure is not None:
            raise watcher.failure
    return summary["verdict"]["win_rate"] if summary["verdict"] else None


def say(text: str) -> None:
    """A line for the user and for the log."""
    from lightning.pytorch.utilities import rank_zero_only

    if rank_zero_only.rank == 0:  # every process of DDP has a log of its own
        print(text, flush=True)
    log.info(text)


if __name__ == "__main__":
    main()
