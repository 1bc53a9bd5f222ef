"""Says before a training what it takes: `python -m dpo_sd.plan experiment=pickapic_dpo model=sdxl hardware=1x8gb`."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from dpo_sd.composition.application import entry_point
from dpo_sd.composition.checks import check_composition
from dpo_sd.data.cache import Cache
from dpo_sd.data.source import Found
from dpo_sd.errors import UserError

if TYPE_CHECKING:
    from dpo_sd.forecast.workload import Workload

# GiB, and TFLOP/s in dense 16-bit tensor arithmetic with 32-bit sums: NVIDIA's data sheets and architecture papers
CARDS = {
    "RTX 3070": (8, 40.6),
    "RTX 4070": (12, 58.3),
    "RTX 4080": (16, 97.5),
    "RTX 3090": (24, 71.2),
    "RTX 4090": (24, 165.2),
    "A100 80GB": (80, 312.0),
    "H100 SXM": (80, 989.4),
}
# invoke-training's guide names 1.4 s for 8 pairs on an RTX 4090 where 58 TFLOP are done: 25 % of that card's figure
REACHED = 0.25


@entry_point("plan")
def main(cfg: DictConfig) -> None:
    """Memory by phase, what does fit where this does not, and what happens to the data."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler of `measured` talks otherwise
    training = composed(cfg)
    if cfg.measure:
        training.hardware.check(preset=HydraConfig.get().runtime.choices.get("hardware"))
    for line in memory_lines(cfg, training):
        print(line)
    if cfg.measure:
        compare(training)
    print()
    # what is wrong with the data ends the plan, when all else is said
    try:
        mistake, amount = None, foreseen(cfg, training)
    except Exception as error:  # raised again below
        mistake, amount = error, Found(None, 0, 0, 0, [])
    for line in amount.report:
        print(f"data     {line}")
    if amount.train is not None:
        passes = _counted(f"{cfg.pairs_per_update * cfg.trainer.max_steps / amount.train:.3g}", "pass")
        each = _counted(math.ceil(amount.train / cfg.pairs_per_update), "update")
        print(f"run      {_counted(cfg.trainer.max_steps, 'update')}: {passes} over {amount.train}, {each} each")
    for line in time_lines(cfg, training, amount):
        print(line)
    if mistake is not None:
        raise mistake
    if amount.train is not None:
        print(f"disk     {kept(cfg, training, amount)}")


def memory_lines(cfg: DictConfig, training: Workload) -> Iterator[str]:
    """What is on the card, phase by phase, and whether the card has room for it."""
    from dpo_sd.forecast.counting import CONTEXT, OWNED, SPARE

    hardware, kind = training.hardware, _kind(training)
    checkpointing = ", gradient checkpointing" if hardware.gradient_checkpointing else ""
    yield f"model    {training.family} at {training.resolution} pixels, {hardware.weights}, {hardware.precision}"
    compiled = ", planned as if it were not compiled" if hardware.compile else ""
    yield f"update   {_counted(cfg.pairs_per_update, kind)}, {hardware.micro_batch} at a time{checkpointing}{compiled}"
    parts = {name: sum(tensor.untyped_storage().nbytes() for tensor in part) for name, part in training.state.items()}
    yield "stays    " + ", ".join(f"{name} {_size(size)}" for name, size in parts.items() if size)
    yield ""
    no_card = hardware.accelerator == "cpu" and training.limit is None
    columns = ("stays", "passes", "peak", "needs")[: 3 if no_card else 4]
    yield f"{'GiB':<20} " + " ".join(f"{column:>7}" for column in columns)
    for phase in training.phases:
        yield f"{phase.name:<20} " + " ".join(f"{_gib(getattr(phase, column)):>7}" for column in columns)
    yield ""
    worst = training.worst
    if no_card:
        yield f"peak     {_gib(worst.peak)} GiB in {worst.name}, beside what Python and PyTorch take for themselves"
        return
    yield (
        f"needs    the peak, {SPARE:.0%} of what passes for gaps and workspaces, {_gib(CONTEXT)} GiB for CUDA: "
        "allowances, not measured"
    )
    most = f"{worst.name} needs {_gib(worst.needs)}"
    if training.limit is None:
        yield f"fits?    {most} GiB; hardware.memory_gib, the card's, is not given"
        return
    card = f"{most} of {_gib(training.limit)} GiB, {OWNED:.0%} of the card's {hardware.memory_gib:g}"
    yield f"fits?    {'yes' if training.fits() else 'no'}: {card}"
    if not training.fits():
        yield advice(cfg, training)


def composed(cfg: DictConfig) -> Workload:
    """What decides the memory of a composition."""
    from dpo_sd.forecast.workload import Workload
    from dpo_sd.models.skeletons import on_meta

    parts = {group: instantiate(cfg[group]) for group in ("lora", "loss", "optimizer", "hardware", "sampler")}
    parts["optimizer"].check_schedule(cfg.trainer.max_steps)
    return Workload(
        family=cfg.model.name,
        **parts,
        resolution=instantiate(cfg.framing).resolution or on_meta(cfg.model.name).resolution,
        cache=cfg.cache,
        pairs=cfg.pairs_per_update // (cfg.trainer.devices * cfg.trainer.num_nodes),
        draws=not cfg.callbacks.keys().isdisjoint(("samples", "verdict")),
    )


def advice(cfg: DictConfig, training: Workload) -> str:
    """The nearest settings that fit, one a line; the smallest card that does where none do."""
    from dpo_sd.forecast.counting import GIB, OWNED

    found = [f"\n  {overrides}" for other in training.nearest() if composes(cfg, overrides := other.overrides)]
    if found:
        return "does not fit: the nearest that does, the cheapest first" + "".join(found)
    card = math.ceil(training.worst.needs / (OWNED * GIB))
    return (
        f"does not fit: no setting is known that does (a smaller lora.rank or optimizer=adamw8bit may); "
        f"the smallest card for it has {card} GiB"
    )


def composes(cfg: DictConfig, overrides: str) -> bool:
    """Whether a training may have these settings too."""
    try:
        check_composition(OmegaConf.merge(cfg, OmegaConf.from_dotlist(overrides.split())))  # type: ignore[arg-type]
    except UserError:
        return False
    return True


def compare(training: Workload) -> None:
    """Runs the update and prints planned over measured."""
    from dpo_sd.forecast.measuring import measured

    planned = training.peak_of_update
    really = measured(training, training.hardware.device)
    where = f"{really / 2**20:.1f} MiB in an update on {training.hardware.device}"
    print(f"measured {where}, planned {planned / really:.3f} of it")


# ------------------------------------------------------------------------------------------------------- data and time


def foreseen(cfg: DictConfig, training: Workload) -> Found:
    """The samples of the data, what is left out, and truncated prompts; nothing is fetched.

    Raises:
        UserError: if a training could not use the data.
    """
    source = instantiate(cfg.data)
    source.check(training.model)
    found = source.find(Cache(Path(cfg.cache_dir).expanduser()), fetch=False)
    if isinstance(found.prompts, int):
        return found
    return replace(found, report=[*found.report, truncated(cfg, list(found.prompts))])


def truncated(cfg: DictConfig, texts: list[str]) -> str:
    """How many prompts are longer than the text encoder reads, where its vocabulary is on this computer."""
    folder = vocabulary(instantiate(cfg.model))
    if folder is None:
        return "prompts cut at the text encoder's limit: not known before the vocabulary is downloaded"
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder)
    long = [text for text in texts if len(tokenizer(text).input_ids) > tokenizer.model_max_length]
    named = f": {', '.join(repr(text[:60]) for text in long[:3])}" if long else ""
    are = "is" if len(long) == 1 else "are"
    return f"{len(long)} of {_counted(len(texts), 'prompt')} {are} cut at the text encoder's limit{named}"


def vocabulary(model: Any) -> Path | None:
    """The folder of a model's tokenizer, if it is on this computer."""
    from huggingface_hub import try_to_load_from_cache

    local = Path(model.path).expanduser() / "tokenizer"
    if local.is_dir():
        return local
    where = model.path if "/" in model.path and not Path(model.path).exists() else model.config
    cached = try_to_load_from_cache(where, "tokenizer/vocab.json") if where and not Path(where).exists() else None
    return Path(cached).parent if isinstance(cached, str) else None


def kept(cfg: DictConfig, training: Workload, amount: Found) -> str:
    """What pictures, latents, prompts and errors of the reference take in the cache folder."""
    from dpo_sd.forecast.workload import POOLED, hidden_shape

    assert amount.train is not None
    model, size = training.model, 4 if training.hardware.weights == "float32" else 2
    pictures = amount.both * (2 if training.loss.needs_pairs else 1)
    area, parts = training.resolution**2, {}
    if amount.cached:
        latents = pictures * (2 if cfg.framing.flip else 1) * 4 * area // model.factor**2
        numbers = math.prod(hidden_shape(model)) + (POOLED if model.is_xl else 0)
        parts["latents"] = latents * size if cfg.cache != "off" else 0
        texts = amount.prompts if isinstance(amount.prompts, int) else len(amount.prompts)
        parts["prompts"] = (texts + 1) * numbers * size if cfg.cache == "all" else 0
    else:
        parts["drawn pictures"] = amount.drawn * 3 * area
    if cfg.loss.get("reference") == "cached":
        parts["the reference's errors"] = amount.train * 8 * cfg.loss.draws_per_pair
    named = ", ".join(f"{name} {_size(part)}" for name, part in parts.items() if part)
    fetched = "; the pictures that are fetched not counted" if not amount.fetched else ""
    return f"{named or 'nothing'} under {cfg.cache_dir}{fetched}"


def time_lines(cfg: DictConfig, training: Workload, amount: Found) -> Iterator[str]:
    """How long it takes: from a rate, or on cards that are large enough."""
    from dpo_sd.data.datamodule import GRID
    from dpo_sd.forecast.counting import GIB, OWNED

    visits, steps = cfg.pairs_per_update * cfg.trainer.max_steps, cfg.trainer.max_steps
    if cfg.rate is not None:
        kind = _kind(training)
        yield f"time     {_duration(visits / cfg.rate)} for {_counted(visits, kind)} at {cfg.rate:g} a second"
        return
    operations, train = training.operations, amount.train
    first = visits  # that the reference computes
    if cfg.loss.get("reference") == "cached" and train is not None:
        first = min(visits, train * cfg.loss.draws_per_pair)
    once, each = (0.0, operations.encoding) if cfg.cache == "off" else (operations.encoding, 0.0)
    grid, validations = amount.validation * GRID, 1 + math.ceil(steps / cfg.trainer.validate_every)
    devices = cfg.trainer.devices * cfg.trainer.num_nodes
    parts = {
        "drawing": amount.drawn * training.drawing,
        "encoding": once * amount.both * (2 if cfg.framing.flip else 1),
        "updates": (visits * (operations.policy + each) + first * operations.reference) / devices,
        "validation": grid * (validations * (operations.forward + each) + operations.reference),
    }
    named = ", ".join(f"{name} {_flop(count)}" for name, count in parts.items() if count)
    counted = f"time     {named}{' on each device' if devices > 1 else ''}; samples and verdict not counted"
    if training.hardware.accelerator == "cpu":
        yield f"{counted}; rate=<pairs a second> turns it into hours"
        return
    yield counted
    cards = {name: speed for name, (memory, speed) in CARDS.items() if memory * OWNED * GIB >= training.worst.needs}
    yield (
        f"           at {REACHED:.0%} of a card's figure, not measured:"
        if cards
        else "           on no card that is listed"
    )
    for name, speed in cards.items():
        yield f"           {name:<10} {_duration(sum(parts.values()) / (speed * 1e12 * REACHED))}"


def _kind(training: Workload) -> str:
    return "pair" if training.loss.needs_pairs else "picture"


def _counted(n: int | str, what: str) -> str:
    several = "es" if what.endswith("s") else "s"
    return f"{n} {what}" + ("" if str(n) == "1" else several)


def _size(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    unit, length = next(((u, n) for u, n in (("hour", 3600), ("minute", 60)) if seconds >= 2 * n), ("second", 1))
    number = seconds / length
    return _counted(f"{number:.0f}" if number >= 10 else f"{number:.2g}", unit)


def _flop(count: float) -> str:
    unit, size = next(
        ((u, n) for u, n in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12)) if count >= n), ("GFLOP", 1e9)
    )
    return f"{count / size:.3g} {unit}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


if __name__ == "__main__":
    main()
