"""Says before a training what it takes: `python -m dpo_sd.plan experiment=pickapic_dpo model=sdxl hardware=1x8gb`."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from dpo_sd.config import check_composition, entry_point
from dpo_sd.data.source import Cache
from dpo_sd.errors import UserError

if TYPE_CHECKING:
    from dpo_sd.memory import Training

# GiB, and TFLOP/s in dense 16-bit tensor arithmetic with 32-bit sums: NVIDIA's data sheets
CARDS = {
    "RTX 3070": (8, 40.6),
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
    from dpo_sd.memory import CONTEXT, GIB, OWNED, SPARE

    training = composed(cfg)
    hardware = training.hardware
    if cfg.measure:
        hardware.check(preset=HydraConfig.get().runtime.choices.get("hardware"))
    kind = "pair" if training.loss.needs_pairs else "picture"
    checkpointing = ", gradient checkpointing" if hardware.gradient_checkpointing else ""
    print(
        f"model    {training.family} at {training.resolution} pixels, {hardware.weights}, {hardware.precision}\n"
        f"update   {_counted(cfg.pairs_per_update, kind)}, {hardware.micro_batch} at a time{checkpointing}\n"
        "stays    "
        + ", ".join(f"{name} {_gib(_bytes(part))}" for name, part in training.state.items() if part)
        + " GiB\n"
    )
    print(f"{'GiB':<20} {'stays':>7} {'passes':>7} {'peak':>7} {'needs':>7}")
    for phase in training.phases:
        columns = (phase.stays, phase.passes, phase.peak, phase.needs)
        print(f"{phase.name:<20} " + " ".join(f"{_gib(column):>7}" for column in columns))
    print(
        f"\nneeds    the peak, {SPARE:.0%} of what passes for gaps and workspaces, {_gib(CONTEXT)} GiB for CUDA: "
        "allowances, not measured"
    )
    worst = training.worst
    if training.limit is None:
        print(f"card     none named: it needs {_gib(worst.needs)} GiB ({worst.name}); hardware=1x8gb, for example")
    else:
        card = f"{_gib(training.limit)} GiB, {OWNED:.0%} of the card's {hardware.memory_gib:g}"
        print(f"card     {card}; most is needed by {worst.name}: {_gib(worst.needs)}")
        print("fits" if training.fits() else f"does not fit: {advice(cfg, training)}")
    if cfg.measure:
        compare(training)
    print()
    # the data last: what is wrong with it ends the plan
    for line in itertools.chain(time_lines(cfg, training, worst.needs / GIB), data_lines(cfg, training)):
        print(line)


def composed(cfg: DictConfig) -> Training:
    """What decides the memory of a composition."""
    from dpo_sd.loaders import on_meta
    from dpo_sd.memory import Training

    parts = {group: instantiate(cfg[group]) for group in ("lora", "loss", "optimizer", "hardware", "sampler")}
    return Training(
        family=cfg.model.name,
        **parts,
        resolution=cfg.framing.resolution or on_meta(cfg.model.name).resolution,
        cache=cfg.cache,
        pairs=cfg.pairs_per_update // (cfg.trainer.devices * cfg.trainer.num_nodes),
        draws=not cfg.callbacks.keys().isdisjoint(("samples", "verdict")),
    )


def advice(cfg: DictConfig, training: Training) -> str:
    """The nearest settings that fit, one a line; the smallest card that does where none do."""
    from dpo_sd.memory import GIB, OWNED

    found = [f"\n  {overrides}" for other in training.nearest() if composes(cfg, overrides := other.overrides)]
    if found:
        return "the nearest that does, the cheapest first" + "".join(found)
    card = math.ceil(training.worst.needs / (OWNED * GIB))
    return f"no setting is known that does; the smallest card for it has {card} GiB"


def composes(cfg: DictConfig, overrides: str) -> bool:
    """Whether a training may have these settings too."""
    try:
        check_composition(OmegaConf.merge(cfg, OmegaConf.from_dotlist(overrides.split())))  # type: ignore[arg-type]
    except UserError:
        return False
    return True


def compare(training: Training) -> None:
    """Runs the update and prints planned over measured."""
    from dpo_sd.memory import measured

    planned = max(phase.peak for phase in training.phases if phase.name.startswith("update"))
    really = measured(training, training.hardware.device)
    where = f"{really / 2**20:.1f} MiB in an update on {training.hardware.device}"
    print(f"measured {where}, planned {planned / really:.3f} of it")


# ------------------------------------------------------------------------------------------------------- data and time


def data_lines(cfg: DictConfig, training: Training) -> Iterator[str]:
    """Samples, what is left out, truncated prompts, passes, and the size of the cache.

    Raises:
        UserError: when a training could not use the data.
    """
    source = instantiate(cfg.data)
    if hasattr(source, "check"):
        source.check(training.model)
    if hasattr(source, "foreseen"):
        found = source.foreseen(Cache(Path(cfg.cache_dir).expanduser()))
    else:
        found = getattr(source, "found", None)
    if found is None:
        settings = ("n_pairs", "n_pictures", "max_pairs", "max_images")
        limit = next((getattr(source, name) for name in settings if hasattr(source, name)), None)
        fetched = hasattr(source, "fetch")
        number = "all there are" if limit is None else _counted(limit, "pair" if source.has_pairs else "picture")
        yield (
            f"data     {'at most ' if fetched and limit else ''}{number}: to be {'fetched' if fetched else 'drawn'}"
            + (", so ties are not known yet" if source.has_pairs else "")
        )
        if limit is None:
            return
        n = texts = whole = limit
    else:
        yield from (f"data     {line}" for line in found.report)
        prompts = sorted({*found.train.prompts, *found.validation.prompts})
        yield truncated(cfg, prompts)
        n, texts, whole = len(found.train), len(prompts), len(found.train) + len(found.validation)
    passes = _counted(f"{cfg.pairs_per_update * cfg.trainer.max_steps / n:.3g}", "pass")
    each = _counted(math.ceil(n / cfg.pairs_per_update), "update")
    yield f"update   {cfg.trainer.max_steps} of {cfg.pairs_per_update}, which is {passes} over {n}, {each} each"
    yield cache_line(cfg, training, whole, texts)


def truncated(cfg: DictConfig, texts: list[str]) -> str:
    """How many prompts are longer than the text encoder reads, where its vocabulary is on this computer."""
    folder = vocabulary(instantiate(cfg.model))
    if folder is None:
        return "data     prompts cut at the text encoder's limit: not known before the vocabulary is downloaded"
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder)
    long = [text for text in texts if len(tokenizer(text).input_ids) > tokenizer.model_max_length]
    named = f": {', '.join(repr(text[:60]) for text in long[:3])}" if long else ""
    are = "is" if len(long) == 1 else "are"
    return f"data     {len(long)} of {_counted(len(texts), 'prompt')} {are} cut at the text encoder's limit{named}"


def vocabulary(model: Any) -> Path | None:
    """The folder of a model's tokenizer, if it is on this computer."""
    from huggingface_hub import try_to_load_from_cache

    local = Path(model.path).expanduser() / "tokenizer"
    if local.is_dir():
        return local
    where = model.path if "/" in model.path and not Path(model.path).exists() else model.config
    cached = try_to_load_from_cache(where, "tokenizer/vocab.json") if where and not Path(where).exists() else None
    return Path(cached).parent if isinstance(cached, str) else None


def cache_line(cfg: DictConfig, training: Training, samples: int, texts: int) -> str:
    """What latents, prompts and kept errors of the reference take on disk."""
    model, half = training.model, 4 if training.hardware.weights == "float32" else 2
    pictures = samples * (2 if training.loss.needs_pairs else 1) * (2 if cfg.framing.flip else 1)
    latents = pictures * 4 * (training.resolution // model.factor) ** 2 * half if cfg.cache != "off" else 0
    width = int(model.unet.config["cross_attention_dim"])
    prompts = (texts + 1) * (77 * width + (1280 if model.is_xl else 0)) * half if cfg.cache == "all" else 0
    errors = samples * 8 * (cfg.loss.get("draws_per_pair") or 0) if cfg.loss.get("reference") == "cached" else 0
    parts = {"latents": latents, "prompts": prompts, "the reference's errors": errors}
    named = ", ".join(f"{name} {_size(size)}" for name, size in parts.items() if size)
    return f"cache    {named or 'nothing'} under {cfg.cache_dir}"


def time_lines(cfg: DictConfig, training: Training, gib: float) -> list[str]:
    """How long the updates take: from a rate, or on cards that are large enough."""
    n, kind = cfg.pairs_per_update * cfg.trainer.max_steps, "pair" if training.loss.needs_pairs else "picture"
    if cfg.rate is not None:
        return [f"time     {_duration(n / cfg.rate)} for {_counted(n, kind)} at {cfg.rate:g} a second"]
    tera = training.flops / 1e12
    lines = [
        f"time     {tera:.3g} TFLOP for each of {_counted(n, kind)}; at {REACHED:.0%} of a card's figure, not measured:"
    ]
    for name, (memory, speed) in CARDS.items():
        if memory * 0.95 >= gib:
            lines.append(f"           {name:<10} {_duration(n * tera / (speed * REACHED))}")
    return lines


def _bytes(tensors: list[Any]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def _counted(n: int | str, what: str) -> str:
    several = "es" if what.endswith("s") else "s"
    return f"{n} {what}" + ("" if str(n) == "1" else several)


def _size(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    unit, length = next(((u, n) for u, n in (("hour", 3600), ("minute", 60)) if seconds >= 2 * n), ("second", 1))
    number = seconds / length
    return _counted(f"{number:.0f}" if number >= 10 else f"{number:.2g}", unit)


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


if __name__ == "__main__":
    main()
