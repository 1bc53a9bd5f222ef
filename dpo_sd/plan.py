"""Says before a training what it takes: `python -m dpo_sd.plan model=sdxl hardware=1x8gb`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig

from dpo_sd.config import entry_point
from dpo_sd.errors import UserError
from dpo_sd.mistakes import explain

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
    from dpo_sd.memory import CONTEXT, GIB, OWNED, SPARE

    training = composed(cfg)
    hardware = training.hardware
    kind = "pairs" if training.loss.needs_pairs else "pictures"
    checkpointing = ", gradient checkpointing" if hardware.gradient_checkpointing else ""
    print(
        f"model    {training.family} at {training.resolution} pixels, {hardware.weights}, {hardware.precision}\n"
        f"update   {cfg.pairs_per_update} {kind}, {hardware.micro_batch} at a time{checkpointing}\n"
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
    worst = max(training.phases, key=lambda phase: phase.needs)
    if training.limit is None:
        print(f"card     none named: it needs {_gib(worst.needs)} GiB ({worst.name}); hardware=1x8gb, for example")
    else:
        card = f"{_gib(training.limit)} GiB, {OWNED:.0%} of the card's {hardware.memory_gib:g}"
        print(f"card     {card}; most is needed by {worst.name}: {_gib(worst.needs)}")
        print("fits" if training.fits() else f"does not fit: {advice(training)}")
    if cfg.measure:
        compare(training)
    print()
    for line in [*data_lines(cfg, training), *time_lines(cfg, training, worst.needs / GIB)]:
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


def advice(training: Training) -> str:
    """The nearest settings that fit, one a line; the smallest card that does where none do."""
    found = [f"\n  {other.overrides}" for other in training.nearest()]
    if found:
        return "the nearest that does, the cheapest first" + "".join(found)
    card = math.ceil(max(phase.needs for phase in training.phases) / (0.95 * 2**30))
    return f"no setting is known that does; the smallest card for it has {card} GiB"


def compare(training: Training) -> None:
    """Runs the update and prints planned over measured."""
    from dpo_sd.memory import measured

    planned = max(phase.peak for phase in training.phases if phase.name.startswith("update"))
    really = measured(training, training.hardware.device)
    where = f"{really / 2**20:.1f} MiB in an update on {training.hardware.device}"
    print(f"measured {where}, planned {planned / really:.3f} of it")


# ------------------------------------------------------------------------------------------------------- data and time


def data_lines(cfg: DictConfig, training: Training) -> list[str]:
    """Pairs, what is left out, truncated prompts, passes, and the size of the cache."""
    try:
        source = instantiate(cfg.data)
    except (UserError, InstantiationException) as error:
        return [f"data     cannot be counted: {explain(error) or error}"]
    found = getattr(source, "found", None)
    if callable(found) or found is None:  # to be drawn, or to be fetched
        n = next(
            (getattr(source, name) for name in ("n_pairs", "n_pictures", "max_pairs") if hasattr(source, name)), None
        )
        number = "all there are" if n is None else f"at most {n}" if callable(getattr(source, "fetch", None)) else n
        lines = [f"data     {number}: to be drawn or fetched, so ties are not known yet"]
        texts, whole = None, n
    else:
        n, texts = len(found.train), sorted({*found.train.prompts, *found.validation.prompts})
        whole = n + len(found.validation)
        lines = [f"data     {line}" for line in found.report]
        lines.append(truncated(cfg, texts))
    if n is None:
        return lines
    passes = cfg.pairs_per_update * cfg.trainer.max_steps / n
    lines.append(
        f"update   {cfg.trainer.max_steps} of {cfg.pairs_per_update}, which is {passes:.3g} passes over {n}, "
        f"{math.ceil(n / cfg.pairs_per_update)} updates each"
    )
    return [*lines, cache_line(cfg, training, whole or n, n if texts is None else len(texts))]


def truncated(cfg: DictConfig, texts: list[str]) -> str:
    """How many prompts are longer than the text encoder reads, where its vocabulary is on this computer."""
    folder = vocabulary(instantiate(cfg.model))
    if folder is None:
        return "data     prompts cut at the text encoder's limit: not known before the vocabulary is downloaded"
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder)
    long = [text for text in texts if len(tokenizer(text).input_ids) > tokenizer.model_max_length]
    named = f": {', '.join(repr(text[:60]) for text in long[:3])}" if long else ""
    return f"data     {len(long)} of {len(texts)} prompts are cut at the text encoder's limit{named}"


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
    pairs = cfg.pairs_per_update * cfg.trainer.max_steps
    if cfg.rate is not None:
        return [f"time     {_duration(pairs / cfg.rate)} for {pairs} pairs at {cfg.rate:g} a second"]
    tera = training.flops / 1e12
    lines = [f"time     {tera:.3g} TFLOP for each of {pairs} pairs; at {REACHED:.0%} of a card's figure, not measured:"]
    for name, (memory, speed) in CARDS.items():
        if memory * 0.95 >= gib:
            lines.append(f"           {name:<10} {_duration(pairs * tera / (speed * REACHED))}")
    return lines


def _bytes(tensors: list[Any]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def _size(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    unit, length = next(((u, n) for u, n in (("hours", 3600), ("minutes", 60)) if seconds >= 2 * n), ("seconds", 1))
    number = seconds / length
    return f"{number:.0f} {unit}" if number >= 10 else f"{number:.2g} {unit}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


if __name__ == "__main__":
    main()
