"""Measures what our claims on speed and memory are made of, side by side: `python -m dpo_sd.benchmark`."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from dpo_sd.composition.application import entry_point
from dpo_sd.composition.presets import overrides, preset, say_choice
from dpo_sd.errors import UserError

if TYPE_CHECKING:
    from dpo_sd.forecast.side_by_side import Case


@entry_point("benchmark")
def main(cfg: DictConfig) -> None:
    """Times our training, a bare loop and the way of the public scripts in turns, and writes benchmark.json.

    A card that the hardware names is a hard cap on what the process may take of a larger one.
    """
    from dpo_sd.forecast.side_by_side import Case

    say_choice()
    cases = {
        "cpu": [Case("tiny", 64, 16, 8, 6), Case("sd15", 256, 4, 1, 3)],
        "cuda": [Case("sd15", 512, 4, 5, 5), Case("sdxl", 1024, 1, 5, 5)],
    }
    check(cfg)
    if cfg.card:
        run_card(held_by_the_card(), ["sd15", "sd21", "sdxl"], (5, 5))
    else:
        run(cfg, cases[instantiate(cfg.hardware).accelerator])


def held_by_the_card() -> list[str]:
    """The presets that the card holds, the largest last.

    Raises:
        UserError: if there is no card, or it holds none.
    """
    import torch

    from dpo_sd.forecast.card import held_presets

    if not torch.cuda.is_available():
        raise UserError("card=true measures a CUDA GPU, and this machine has none: leave card out")
    gpu = torch.cuda.get_device_properties(0)
    presets = held_presets(gpu.total_memory)
    if not presets:
        raise UserError(f"card=true measures presets, and {gpu.name} is too small for all of them: leave card out")
    return presets


def run_card(presets: Sequence[str], families: Sequence[str], case: tuple[int, int]) -> None:
    """Measures the presets on this machine; benchmark.json in the run's folder grows, README.md there is the record.

    Args:
        presets, families, case: as in `dpo_sd.forecast.card.measurements`.
    """
    from dpo_sd.files.atomic import write_json, write_text
    from dpo_sd.forecast.card import fitted, lines, measurements, page
    from dpo_sd.training.provenance import device_name, versions

    given = [each for each in overrides() if not each.startswith(("hardware=", "model=", "card="))]
    folder = Path(HydraConfig.get().runtime.output_dir)
    machine = device_name("cpu" if "cpu" in presets else "cuda")
    results: dict[str, Any] = {**versions(), "overrides": given, "device": machine, "peaks": {}, "speeds": {}}
    for kind, name, result in measurements(partial(composed, given), presets, families, case):
        print("\n".join(lines(kind, name, result)), flush=True)
        results[kind][name] = result
        results["fitted"] = fitted(results["peaks"].values())
        write_json(folder / "benchmark.json", results)
    write_text(folder / "README.md", page(" ".join(["python -m dpo_sd.benchmark card=true", *given]), results))
    print(folder / "README.md")


def composed(given: Sequence[str], settings: Sequence[str]) -> DictConfig:
    """The benchmark with the settings of this command line and further ones."""
    return compose("benchmark", [*given, *settings])


def run(cfg: DictConfig, cases: Sequence[Case]) -> None:
    """Measures the cases, prints a table of each and writes benchmark.json into the run's folder.

    Args:
        cases: the claims are those of the last one; the cost of pairs, pixels and rank is shown on the first one.

    Raises:
        UserError: if the machine lacks what the composition asks for, or the loss is not that of Diffusion-DPO.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler of `measured` talks
    from dpo_sd.files.atomic import write_json
    from dpo_sd.forecast.side_by_side import CLAIMS, bench, loading_rate, table
    from dpo_sd.training.provenance import device_name, versions

    results: dict[str, Any] = {
        **versions(),
        "overrides": overrides(),
        "device": device_name(instantiate(cfg.hardware).accelerator),
        "lora": {"rank": cfg.lora.rank, "modules": instantiate(cfg.lora).target_modules},
    }
    for case in cases:
        each = bench(cfg, case)
        memory = each.memory()
        results[str(case)] = each.compare() | {"memory_gib": memory}
        print("\n".join(table(str(case), results[str(case)])), flush=True)
        del each  # before the next one takes its place
    results |= {name: results[str(cases[-1])][name] for name in CLAIMS}
    results["data loading, pairs/s"] = loading_rate(Path(cfg.cache_dir).expanduser())
    print(f"\ndata loading        {results['data loading, pairs/s']:.0f} pairs/s from disk, one process")
    results["cost"] = cost(cfg, cases[0])
    folder = Path(HydraConfig.get().runtime.output_dir)
    write_json(folder / "benchmark.json", results)
    print(folder / "benchmark.json")


def check(cfg: DictConfig) -> None:
    """Refuse what cannot be measured on this machine, before any network is built.

    Raises:
        UserError: as `run`.
    """
    from dpo_sd.losses import DiffusionDPOLoss

    instantiate(cfg.hardware).check(preset=preset())
    if not isinstance(instantiate(cfg.loss), DiffusionDPOLoss):
        raise UserError("the benchmark compares ways of Diffusion-DPO: use loss=dpo")
    instantiate(cfg.lora).check()
    instantiate(cfg.optimizer).check(1)


def cost(cfg: DictConfig, basis: Case) -> dict[str, float]:
    """Seconds per update of a case as one thing changes: pairs, resolution, rank."""
    from dpo_sd.forecast.side_by_side import bench

    rank = cfg.lora.rank
    changed: dict[str, tuple[Case, int]] = {
        f"{basis}, rank {rank}": (basis, rank),
        "a quarter of the pairs": (basis._replace(pairs=max(1, basis.pairs // 4)), rank),
        "twice the resolution": (basis._replace(resolution=2 * basis.resolution), rank),
        "eight times the rank": (basis, 8 * rank),
    }
    seconds = {}
    for name, (case, rank) in changed.items():
        each = bench(OmegaConf.merge(cfg, {"lora": {"rank": rank, "alpha": float(rank)}}), case)  # type: ignore[arg-type]
        each.ours()  # warms up
        seconds[name] = statistics.median(each.ours())
        print(f"{name:<44}{seconds[name]:8.3f} s an update", flush=True)
    return seconds


if __name__ == "__main__":
    main()
