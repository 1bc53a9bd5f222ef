"""What the plan says of a composition, and that every preset serves every model with one effective batch."""

from __future__ import annotations

import itertools
import re

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from dpo_sd.config import check_composition
from dpo_sd.hardware import PRESETS, accumulation
from dpo_sd.memory import GIB
from dpo_sd.mistakes import options
from dpo_sd.models import REPOSITORIES
from dpo_sd.plan import composed
from dpo_sd.schema import CONF_DIR


@pytest.fixture
def config():
    """`config(*overrides)`: the composition of a plan."""
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        yield lambda *overrides: compose("plan", list(overrides))


@pytest.fixture
def plan(command):
    return lambda *arguments, **how: command(*arguments, program="plan", **how)


def test_every_card_has_a_preset_of_its_name():
    assert sorted(["cpu", *PRESETS.values()]) == options("hardware")


@pytest.mark.parametrize("experiment", options("experiment"))
def test_every_experiment_has_one_effective_batch_on_every_preset_and_for_every_model(config, experiment):
    for model, preset in itertools.product(options("model"), options("hardware")):
        given = [f"model={model}", f"hardware={preset}", f"experiment={experiment}"]
        try:
            cfg = config(*given)
            OmegaConf.resolve(cfg.hardware)
            pairs = cfg.pairs_per_update
        except Exception as error:
            assert "recipe has no values" in str(error)
            continue
        micro_batch = cfg.hardware.micro_batch
        assert accumulation(pairs, micro_batch) * micro_batch == pairs, (model, preset)
        if preset in PRESETS.values():
            assert cfg.hardware.memory_gib == next(gib for gib, name in PRESETS.items() if name == preset)


def test_a_preset_leaves_the_science_to_the_experiment(config):
    science = ["pairs_per_update", "loss", "optimizer", "lora", "trainer", "framing", "seed"]
    taken = [config("experiment=quickstart", f"hardware={preset}") for preset in options("hardware")]
    assert all(OmegaConf.masked_copy(cfg, science) == OmegaConf.masked_copy(taken[0], science) for cfg in taken)


def test_a_micro_batch_of_a_preset_divides_a_small_update_and_one_of_the_command_line_is_taken_at_its_word(config):
    assert config("model=sd15", "hardware=1x8gb", "pairs_per_update=6").hardware.micro_batch == 3
    cfg = config("model=tiny", "hardware=1x8gb", "pairs_per_update=6", "hardware.micro_batch=4")
    with pytest.raises(Exception, match="does not divide"):
        check_composition(cfg)


@pytest.mark.parametrize(
    ("model", "preset"),
    [*itertools.product(("sd15", "sd21"), PRESETS.values()), ("sdxl", "1x8gb")]
    + [pytest.param("sdxl", preset, marks=pytest.mark.slow) for preset in ("1x12gb", "1x24gb", "1x80gb")],
)
def test_every_preset_fits_its_card_and_its_comment_holds_the_planned_peak(config, model, preset):
    training = composed(config(f"model={model}", f"hardware={preset}"))
    assert training.fits()
    comment = (CONF_DIR / "hardware" / f"{preset}.yaml").read_text()
    written = re.search(rf"{model} at {training.resolution}: ([\d.]+) in an update", comment)
    planned = max(phase.peak for phase in training.phases if phase.name.startswith("update"))
    assert written is not None and float(written[1]) == pytest.approx(planned / GIB, abs=0.051)


def test_the_plan_knows_all_models_that_can_be_trained():
    assert sorted(["tiny", *REPOSITORIES]) == options("model")


def test_the_plan_says_peaks_data_cache_and_time_without_writing_anything(plan, tmp_path):
    ended = plan("experiment=quickstart", "rate=16", f"hydra.run.dir={tmp_path}")
    assert ended.code == 0, ended.err
    assert re.search(r"^update: backward +\d", ended.out, re.MULTILINE)
    assert "300 of 16, which is 18.8 passes over 256, 16 updates each" in ended.out
    assert "5 minutes for 4800 pairs at 16 a second" in ended.out
    assert list(tmp_path.iterdir()) == []  # no log, no record


def test_a_composition_that_does_not_fit_ends_in_overrides_that_do(plan):
    ended = plan("model=sd15", "hardware=1x8gb", "hardware.micro_batch=16", "data.n_pairs=16")
    assert "does not fit: the nearest that does, the cheapest first\n  hardware.micro_batch=8" in ended.out


def test_the_plan_measures_on_request(plan):
    ended = plan("model=tiny", "measure=true", "hardware.micro_batch=2", "data.n_pairs=16")
    found = re.search(r"measured [\d.]+ MiB in an update on cpu, planned ([\d.]+) of it", ended.out)
    assert found is not None and 0.9 < float(found[1]) < 1.1


def test_pairs_of_a_folder_are_counted_with_what_is_left_out(plan):
    ended = plan("experiment=style_dpo", "data.pairs=nowhere")
    assert ended.code == 0
    assert "data     cannot be counted: data: no folder nowhere" in ended.out


def test_a_number_of_pairs_that_is_only_a_limit_is_said_to_be_one(plan):
    ended = plan("data=pickapic", "data.max_pairs=40")
    assert "data     at most 40: to be drawn or fetched" in ended.out


@pytest.mark.parametrize("rate", ["0", "-2"])
def test_a_rate_that_is_none_is_refused(plan, rate):
    ended = plan(f"rate={rate}")
    assert (ended.code, "rate must be positive, in pairs a second, or null" in ended.err) == (1, True)


def test_a_setting_that_is_none_is_refused_with_the_nearest(plan):
    assert "did you mean rate?" in plan("+rates=3").err
