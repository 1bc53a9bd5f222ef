"""Says before a training what it takes: `python -m dpo_sd.plan experiment=pickapic_dpo model=sdxl hardware=1x8gb`."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.utils import instantiate
from omegaconf import DictConfig

from dpo_sd.composition.application import entry_point
from dpo_sd.composition.checks import composes, with_epochs
from dpo_sd.composition.presets import preset, say_choice
from dpo_sd.data.cache import Cache
from dpo_sd.data.source import Found
from dpo_sd.forecast.units import MIB, counted

if TYPE_CHECKING:
    from dpo_sd.forecast.phases import Forecast
    from dpo_sd.forecast.workload import Workload
    from dpo_sd.models.stable_diffusion import StableDiffusion


@entry_point("plan")
def main(cfg: DictConfig) -> None:
    """Prints memory by phase, settings that fit where these do not, and what happens to the data."""
    from dpo_sd.forecast.disk import disk_line
    from dpo_sd.forecast.memory import advice, memory_lines
    from dpo_sd.forecast.phases import Forecast

    say_choice()
    base = instantiate(cfg.model)
    base.check_tensors()
    for note in base.notes:
        print(f"model    {note}")
    forecast = Forecast(workload(cfg))
    if cfg.measure:
        forecast.workload.hardware.check(preset=preset())
    for line in memory_lines(forecast, cfg.pairs_per_update):
        print(line)
    if not forecast.fits():
        print(advice(forecast, partial(composes, cfg)))
    if cfg.measure:
        print(comparison(forecast))
    print()
    # a mistake in the data ends the plan, when all else is said
    try:
        mistake, found = None, foreseen(cfg, forecast.card.model)
    except Exception as error:  # raised again below
        mistake, found = error, Found(None, 0, 0, 0, [])
    if mistake is None:
        cfg = with_epochs(cfg, found.train)
    for line in (*found.report, *truncation(cfg, found)):
        print(f"data     {line}")
    for line in (*passes(cfg, found), *duration(cfg, forecast, found)):
        print(line)
    if mistake is not None:
        raise mistake
    if found.train is not None:
        print(disk_line(forecast.workload, forecast.card.model, found, cfg.cache_dir))


def workload(cfg: DictConfig) -> Workload:
    """The settings of a composition that decide what it takes of a card.

    Raises:
        UserError: if the warm-up of the optimiser is as long as the training.
    """
    from dpo_sd.forecast.workload import of_composition
    from dpo_sd.models.families import FAMILIES

    parts = {group: instantiate(cfg[group]) for group in ("lora", "loss", "optimizer", "hardware", "sampler")}
    if cfg.trainer.max_epochs is None:
        parts["optimizer"].check_schedule(cfg.trainer.max_steps)
    return of_composition(cfg, instantiate(cfg.framing).resolution or FAMILIES[cfg.model.name].resolution, **parts)


def comparison(forecast: Forecast) -> str:
    """Line of the plan on its peak over the measured one; runs an update."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler of `measured` talks
    from dpo_sd.forecast.measuring import measured

    device = forecast.workload.hardware.device
    really = measured(forecast.workload, device)
    share = forecast.peak_of_update / really
    return f"measured {really / MIB:.1f} MiB in an update on {device}, planned {share:.3f} of it"


def foreseen(cfg: DictConfig, model: StableDiffusion) -> Found:
    """The samples of the data, as far as they are known before anything is fetched or drawn.

    Raises:
        UserError: if a training could not use the data.
    """
    source = instantiate(cfg.data)
    source.check(model)
    return source.find(Cache(Path(cfg.cache_dir).expanduser()), fetch=False)


def truncation(cfg: DictConfig, found: Found) -> Iterator[str]:
    from dpo_sd.forecast.truncation import truncation_line

    if not isinstance(found.prompts, int):
        yield truncation_line(instantiate(cfg.model), found.prompts)


def passes(cfg: DictConfig, found: Found) -> Iterator[str]:
    if found.train is not None:
        over = counted(f"{cfg.pairs_per_update * cfg.trainer.max_steps / found.train:.3g}", "pass")
        each = counted(math.ceil(found.train / cfg.pairs_per_update), "update")
        yield f"run      {counted(cfg.trainer.max_steps, 'update')}: {over} over {found.train}, {each} each"


def duration(cfg: DictConfig, forecast: Forecast, found: Found) -> Iterator[str]:
    from dpo_sd.forecast.operations import Budget
    from dpo_sd.forecast.time import at_rate, time_lines

    visits, trainer = cfg.pairs_per_update * cfg.trainer.max_steps, cfg.trainer
    if cfg.rate is not None:
        return iter([at_rate(cfg.rate, visits, forecast.workload.sample)])
    budget = Budget(trainer.max_steps, visits, trainer.validate_every, trainer.devices * trainer.num_nodes)
    return time_lines(forecast, found, budget)


if __name__ == "__main__":
    main()
