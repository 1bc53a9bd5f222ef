"""What only a card can show: peaks of the presets' phases under their caps, and what each setting brings in speed.

Every measurement has a process of its own, so that none finds memory, compiled code or settings of another.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from dpo_sd.forecast.units import GIB
from dpo_sd.training.hardware import ENOUGH, PRESETS

Compose = Callable[[Sequence[str]], DictConfig]  # the composition of the benchmark with further settings
SINGLE = ("hardware.precision=32-true", "hardware.weights=float32")


class Change(NamedTuple):
    """A setting whose effect on the speed of updates is measured.

    Args:
        settings: of the changed side.
        common: settings of both sides.
        prepare: key of `PREPARED`, for what no setting changes.
    """

    settings: tuple[str, ...] = ()
    common: tuple[str, ...] = ()
    prepare: str | None = None


CHANGES = {
    "bfloat16": Change(("hardware.weights=bfloat16",)),
    "int8": Change(("hardware.weights=int8",)),
    "nf4": Change(("hardware.weights=nf4",)),
    "compiled": Change(("hardware.compile=true",)),
    "checkpointing": Change(
        ("hardware.gradient_checkpointing=true",), common=("hardware.gradient_checkpointing=false",)
    ),
    "not deterministic": Change(("trainer.deterministic=false",)),
    "channels_last": Change(prepare="channels_last"),
    "TF32": Change(common=SINGLE, prepare="TF32"),
}


def measurements(
    compose: Compose, presets: Sequence[str], families: Sequence[str], case: tuple[int, int]
) -> Iterator[tuple[str, str, Any]]:
    """Peaks of every preset and family, then the speed of every change: each as "peaks" or "speeds", a name, a result.

    A result is the reason, a text, where there is no other.

    Args:
        compose: composes the benchmark with further settings.
        presets: options of the group `hardware`, the largest last: with that one speeds are measured.
        families: options of the group `model`.
        case: updates of a round, and rounds.
    """
    for preset, family in itertools.product(presets, families):
        result = _apart(peaks_of, compose([f"hardware={preset}", f"model={family}"]))
        yield "peaks", f"{family}, {preset}", result
    for family, (name, change) in itertools.product(families, CHANGES.items()):
        common = [f"hardware={presets[-1]}", f"model={family}", *change.common]
        sides = compose(common), compose([*common, *change.settings])
        yield "speeds", f"{family}, {name}", _apart(speed_of, *sides, change.prepare, case)


def held_presets(total_memory: int) -> list[str]:
    """The presets that a card of so many bytes holds, the largest last."""
    return [name for gib, name in sorted(PRESETS.items()) if total_memory / GIB >= ENOUGH * gib]


def _apart(work: Callable[..., Any], *arguments: Any) -> Any:
    """Result of a function of this module in a new process; the reason, a text, where it ends without one."""
    plain = [OmegaConf.to_container(each, resolve=True) if OmegaConf.is_config(each) else each for each in arguments]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        try:
            return process.submit(_told, work, *plain).result()
        except BrokenProcessPool:  # killed, for want of memory as a rule
            return "its process was killed"


def _told(work: Callable[..., Any], *arguments: Any) -> Any:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler of `peak` talks
    try:
        return work(*arguments)
    except Exception as error:  # one measurement that fails leaves the others
        reason = error.__cause__ or error
        return f"{type(reason).__name__}: {reason}".partition("\n")[0]


# --------------------------------------------------------------------------------------------------- in a new process


def peaks_of(settings: dict[str, Any]) -> dict[str, Any]:
    """GiB of each phase, planned and measured, and what the card holds beside PyTorch's tensors."""
    import torch
    from hydra.utils import instantiate

    from dpo_sd.forecast.measuring import measured_phases
    from dpo_sd.forecast.phases import Forecast
    from dpo_sd.forecast.workload import of_composition
    from dpo_sd.models.families import FAMILIES

    cfg = OmegaConf.create(settings)
    parts = {group: instantiate(cfg[group]) for group in ("lora", "loss", "optimizer", "hardware", "sampler")}
    hardware = parts["hardware"]
    hardware.check()
    workload = of_composition(cfg, FAMILIES[cfg.model.name].resolution, **parts)
    forecast = Forecast(workload)
    planned: dict[str, Any] = {}
    for phase in forecast.phases:
        name = "update" if phase.name in ("update: forward", "update: backward") else phase.name
        planned[name] = max(planned.get(name, phase), phase, key=lambda each: each.peak)
    rows = {}
    for name, peak in measured_phases(workload, hardware.device):
        rows[name] = {"planned": planned[name].peak / GIB, "passes": planned[name].passes / GIB}
        rows[name] |= {kind: bytes / GIB for kind, bytes in peak._asdict().items()} if peak else {"allocated": None}
    context = None
    if hardware.accelerator == "cuda":
        free, total = torch.cuda.mem_get_info(hardware.device)
        context = (total - free - torch.cuda.memory_reserved(hardware.device)) / GIB
    return {"phases": rows, "context": context, "owned": owned(hardware)}


def owned(hardware: Any) -> float | None:
    """Share of a card's nominal memory that it shows its programs; None for a card that no preset is sold as."""
    import torch

    if hardware.accelerator != "cuda":
        return None
    shown = torch.cuda.get_device_properties(hardware.device).total_memory / GIB
    return next((shown / gib for gib in PRESETS if ENOUGH <= shown / gib <= 1), None)


def speed_of(
    settings: dict[str, Any], changed: dict[str, Any], prepare: str | None, case: tuple[int, int]
) -> dict[str, Any]:
    """Seconds of an update as it is and changed, measured in turns, and their ratio: above 1 is faster changed."""
    from hydra.utils import instantiate

    from dpo_sd.forecast.side_by_side import Case, bench, in_turns, ratio, spread
    from dpo_sd.models.families import FAMILIES

    sides = {}
    for name, side in {"as_it_is": settings, "changed": changed}.items():
        cfg = OmegaConf.create(side)
        instantiate(cfg.hardware).check()
        size = Case(cfg.model.name, FAMILIES[cfg.model.name].resolution, cfg.hardware.micro_batch, *case)
        sides[name] = bench(cfg, size)

    def changed_way() -> list[float]:
        with nullcontext() if prepare is None else PREPARED[prepare](sides["changed"].model.unet):
            return sides["changed"].ours()

    ways = {"as_it_is": sides["as_it_is"].ours, "changed": changed_way}
    in_turns(ways, 1)  # warms up, and compiles
    seconds = in_turns(ways, case[1])
    rows = {name: spread(values) for name, values in seconds.items()}
    return rows | {"speedup": ratio(seconds["as_it_is"], seconds["changed"])}


@contextmanager
def channels_last(unet: Any) -> Iterator[None]:
    import torch

    unet.to(memory_format=torch.channels_last)
    yield


@contextmanager
def tf32(_: Any) -> Iterator[None]:
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


PREPARED = {"channels_last": channels_last, "TF32": tf32}

# --------------------------------------------------------------------------------------------------------- the results


def fitted(results: Iterable[Any]) -> dict[str, float | None]:
    """What the plan's assumed constants should be after these peaks; None where no card has shown it.

    `CONTEXT` in GiB is the largest that was seen, `SPARE` the largest share of what a phase passes that the allocator
    held beside its tensors, `OWNED` the share of the nominal memory that programs get.
    """
    results = [result for result in results if isinstance(result, Mapping)]
    spares = [
        (row["reserved"] - row["allocated"]) / row["passes"]
        for result in results
        for row in result["phases"].values()
        if result["context"] is not None and row["allocated"] is not None and row["passes"] > 0.1
    ]

    def most(values: Iterable[float | None], choose: Callable[..., float] = max) -> float | None:
        return choose((value for value in values if value is not None), default=None)

    return {
        "CONTEXT": most(result["context"] for result in results),
        "SPARE": most(spares),
        "OWNED": most((result["owned"] for result in results), min),
    }


def lines(kind: str, name: str, result: Any) -> Iterator[str]:
    """Lines for people on one of `measurements`."""
    if kind == "speeds" or not isinstance(result, Mapping):
        yield f"{name}: {speed_words(result)}"
        return
    yield name
    for phase, row in result["phases"].items():
        if row["allocated"] is None:
            yield f"  {phase:<20} {row['planned']:6.2f} GiB planned, runs out of memory"
        else:
            share = row["planned"] / row["allocated"]
            yield f"  {phase:<20} {row['planned']:6.2f} GiB planned, {row['allocated']:.2f} measured: {share:.3f} of it"


def speed_words(speed: Any) -> str:
    if not isinstance(speed, Mapping):
        return speed
    if speed["speedup"] is None:
        return "runs out of memory"
    return "{median:.3f} times as fast [{low:.3f}, {high:.3f}]".format(**speed["speedup"])


def page(command: str, results: Mapping[str, Any]) -> str:
    """The results as a record: README.md of a folder under experiments/."""
    from dpo_sd.forecast.counting import CONTEXT, OWNED, SPARE

    peaks = [
        f"| {name} | {phase} | {row['planned']:.2f} | {_gib(row['allocated'])} | {_gib(row.get('reserved'))} |"
        for name, result in results["peaks"].items()
        if isinstance(result, Mapping)
        for phase, row in result["phases"].items()
    ]
    refused = [f"- {name}: {told}" for name, told in results["peaks"].items() if not isinstance(told, Mapping)]
    speeds = [f"| {name} | {speed_words(speed)} |" for name, speed in results["speeds"].items()]
    assumed = {"CONTEXT": CONTEXT / GIB, "SPARE": SPARE, "OWNED": OWNED}
    constants = [f"| {name} | {assumed[name]:.3f} | {_gib(value, 3)} |" for name, value in results["fitted"].items()]
    parts = [
        f"# {results['device']}: memory and speed, measured",
        f"`{command}` (dpo_sd {results['version']}, commit {results['commit']}, torch {results['packages']['torch']})",
        "Networks of real shapes with random weights; each line a process of its own, capped at its preset's card.",
        "## Peaks in GiB",
        "\n".join(["| preset | phase | planned | measured | with gaps |", "|---|---|---:|---:|---:|", *peaks]),
        *(["\n".join(refused)] if refused else []),
        "## Speed of an update, changed over as it is, in turns",
        "\n".join(["| changed | median [lowest, highest] |", "|---|---|", *speeds]),
        "## Constants of the plan (dpo_sd/forecast/counting.py)",
        "\n".join(["| constant | assumed | measured |", "|---|---:|---:|", *constants]),
    ]
    return "\n\n".join(parts) + "\n"


def _gib(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
