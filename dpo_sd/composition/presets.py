"""The preset of the hardware that a job was composed with, which `hardware=auto` takes by the machine."""

from __future__ import annotations

from hydra.core.hydra_config import HydraConfig

from dpo_sd.training.cluster import first_process
from dpo_sd.training.hardware import AUTO, Choice, auto


def say_choice() -> None:
    """Says what `hardware=auto` has taken for this job, if it was to choose; the first line of a command's output."""
    taken = _automatic()
    if taken and first_process():
        print(f"hardware {taken.preset} ({taken.why})", flush=True)


def preset() -> str | None:
    """Name of this job's preset; None where its settings are those of a record, or it has none."""
    taken = _automatic()
    return taken.preset if taken else HydraConfig.get().runtime.choices.get("hardware")


def overrides() -> list[str]:
    """The settings of this job's command line, with the preset that `hardware=auto` has taken."""
    given, taken = list(HydraConfig.get().overrides.task), _automatic()
    if taken is None:
        return given
    return [*(setting for setting in given if not setting.startswith("hardware=")), f"hardware={taken.preset}"]


def _automatic() -> Choice | None:
    choices = HydraConfig.get().runtime.choices
    return auto(choices["model"]) if choices.get("hardware") == AUTO else None
