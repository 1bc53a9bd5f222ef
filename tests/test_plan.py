"""What the plan says of a composition, and that every preset serves every model with one effective batch."""

from __future__ import annotations

import importlib.util
import io
import itertools
import re
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from dpo_sd.composition.checks import check_composition, composes
from dpo_sd.composition.messages import options
from dpo_sd.composition.schema import CONF_DIR
from dpo_sd.data.cache import Cache
from dpo_sd.data.pickapic import PickAPic
from dpo_sd.forecast import memory
from dpo_sd.forecast.fitting import using
from dpo_sd.forecast.phases import Forecast
from dpo_sd.forecast.units import GIB
from dpo_sd.models.families import FAMILIES
from dpo_sd.plan import workload
from dpo_sd.training.hardware import PRESETS, accumulation


@pytest.fixture
def config():
    """`config(*overrides)`: the composition of a plan."""
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        yield lambda *overrides: compose("plan", list(overrides))


@pytest.fixture(scope="module")
def plan(command):
    """`plan(*arguments)`: the command in a fork of this process, which has counted the operations of a plan once."""
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        _ = Forecast(workload(compose("plan"))).phases
    return lambda *arguments, **how: command(*arguments, program="plan", **how)


def test_every_card_has_a_preset_of_its_name():
    assert sorted(["auto", "cpu", *PRESETS.values()]) == options("hardware")


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
    + [pytest.param("sdxl", preset, marks=pytest.mark.slow) for preset in ("1x12gb", "1x16gb", "1x24gb", "1x80gb")],
)
def test_every_preset_fits_its_card_and_its_comment_holds_the_planned_peak(config, model, preset):
    forecast = Forecast(workload(config(f"model={model}", f"hardware={preset}")))
    assert forecast.fits()
    comment = (CONF_DIR / "hardware" / f"{preset}.yaml").read_text()
    written = re.search(rf"{model} at {forecast.workload.resolution}: ([\d.]+) in an update", comment)
    assert written is not None and float(written[1]) == pytest.approx(forecast.peak_of_update / GIB, abs=0.051)


EXPERIMENTS = {  # by what they take of a card; quickstart is made for pictures of the tiny model's size
    "quickstart": [],
    "pickapic_dpo": [],
    "style_dpo": ["data.pairs=pairs"],
    "style_sft": ["data=captions", "data.path=photos"],
}

HALF = {("style_sft", "sd15"), ("style_sft", "sd21")}  # of what style_dpo takes with the same LoRA


def test_every_experiment_is_planned():
    assert sorted(EXPERIMENTS) == options("experiment")


@pytest.mark.parametrize(
    ("experiment", "model"),
    [
        pytest.param(experiment, model, marks=[pytest.mark.slow] * (model == "sdxl" or (experiment, model) in HALF))
        for experiment, model in itertools.product(EXPERIMENTS, FAMILIES)
        if experiment != "quickstart" or model == "tiny"
    ],
)
def test_every_experiment_fits_every_preset(config, experiment, model):
    """Presets with the same step are counted once: one forecast goes on from preset to preset."""
    forecast = None
    for preset in PRESETS.values():
        given = (f"experiment={experiment}", f"model={model}", f"hardware={preset}", *EXPERIMENTS[experiment])
        wanted = workload(config(*given))
        hardware, step = wanted.hardware, ("micro_batch", "gradient_checkpointing", "weights")
        settings = {name: getattr(hardware, name) for name in step} | {"batch_size": wanted.sampler.batch_size}
        forecast = using(forecast or Forecast(wanted), **settings)
        assert max(phase.needs for phase in forecast.phases) <= (wanted.limit or 0), (preset, forecast.worst)


def test_the_plan_knows_all_models_that_can_be_trained():
    assert sorted(FAMILIES) == options("model")


def test_the_plan_says_peaks_data_cache_and_time_without_writing_anything(plan, tmp_path):
    ended = plan("experiment=quickstart", "rate=16", f"hydra.run.dir={tmp_path}")
    assert ended.code == 0, ended.err
    assert re.search(r"^update: backward +\d", ended.out, re.MULTILINE)
    assert "256 pairs: to be drawn, so ties are not known yet" in ended.out
    assert "run      300 updates: 18.8 passes over 256, 16 updates each" in ended.out
    assert "5 minutes for 4800 pairs at 16 a second" in ended.out
    assert list(tmp_path.iterdir()) == []  # no log, no record


def test_a_kept_reference_and_a_second_card_shorten_the_updates_and_fewer_validations_the_validation(plan):
    def operations(*settings: str) -> tuple[float, float]:
        out = plan("experiment=quickstart", "hardware=1x8gb", *settings).out
        updates, validation = re.findall(r"(?:updates|validation) ([\d.]+ [GT]FLOP)", out)
        assert re.search(r"^ +RTX 3070 +[\d.]+ seconds?$", out, re.MULTILINE)
        tera = [float(value[:-6]) * (1 if value[-5] == "T" else 1e-3) for value in (updates, validation)]
        return tera[0], tera[1]

    updates, validation = operations()
    cached, same = operations("loss.reference=cached", "loss.draws_per_pair=4")
    # of 4800 visits to 256 pairs 1024 ask the reference, whose pass is a quarter of the work to a third
    assert 0.7 < cached / updates < 0.85 and same == validation
    assert operations("trainer.devices=2", "trainer.strategy=ddp", "hardware.micro_batch=8")[0] == pytest.approx(
        updates / 2, rel=0.01
    )
    assert operations("trainer.validate_every=300")[1] == pytest.approx(validation * 3 / 8, rel=0.02)


def test_a_composition_that_does_not_fit_ends_in_overrides_that_do(plan):
    ended = plan("model=sd15", "hardware=1x8gb", "hardware.micro_batch=16", "data=pickapic")
    assert "does not fit: the nearest that does, the cheapest first\n  hardware.micro_batch=8" in ended.out


@pytest.mark.parametrize(
    ("tags", "says"),
    [
        ("false", "the nearest that does, the cheapest first\n  cache=all"),
        ("true", "no setting is known that does (a smaller lora.rank or optimizer=adamw8bit may); "),
    ],
)
def test_overrides_that_no_training_may_have_are_not_advised(config, tags, says, monkeypatch):
    data = ("data=captions", "loss=sft", "data.path=photos", f"data.shuffle_tags={tags}", "cache=latents")
    cfg = config(*data, "hardware.memory_gib=1")
    forecast = Forecast(workload(cfg))
    monkeypatch.setattr(memory, "nearest", lambda start: [using(start, cache="all")])
    assert memory.advice(forecast, partial(composes, cfg)).startswith(f"does not fit: {says}")


def test_the_plan_measures_on_request(plan):
    ended = plan("model=tiny", "measure=true", "hardware.micro_batch=2", "data.n_pairs=16")
    found = re.search(r"measured [\d.]+ MiB in an update on cpu, planned ([\d.]+) of it", ended.out)
    assert found is not None and 0.9 < float(found[1]) < 1.1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine can measure it")
def test_a_gpu_that_is_not_there_measures_nothing(plan):
    ended = plan("model=sd15", "data=pickapic", "hardware=1x8gb", "measure=true")
    assert ended.code == 1 and "hardware=1x8gb needs a CUDA GPU" in ended.err and not ended.out


def test_pictures_of_another_size_than_the_model_draws_end_a_plan_as_a_mistake(plan):
    ended = plan("model=sd15", "hardware=1x24gb")
    assert ended.code == 1 and "have 64 pixels, but sd15 draws 512" in ended.err and "fits" in ended.out


def test_data_that_cannot_be_used_ends_a_plan_that_has_said_all_else_as_a_mistake(plan):
    ended = plan("experiment=style_dpo", "data.pairs=nowhere", "rate=16")
    assert ended.code == 1 and re.fullmatch(r"error: no folder nowhere.*\n", ended.err)
    assert "update: backward" in ended.out and "pairs at 16 a second" in ended.out


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["framing.resolution=8"], "resolution must be at least 64, got 8"),
        (["optimizer.warmup_steps=9999"], "optimizer.warmup_steps must be below trainer.max_steps=300, got 9999"),
        (["data.max_pairs=20", "data.validation=11"], "validation=11 holds back more than half of 20: use at most 10"),
    ],
)
def test_what_a_training_would_refuse_is_not_planned(plan, settings, says):
    ended = plan("model=sd15", "data=pickapic", *settings)
    assert ended.code == 1 and says in ended.err and "Traceback" not in ended.err


def test_both_mirror_images_are_encoded_and_pictures_that_serve_twice_once(plan, tmp_path):
    def encoding(*settings: str) -> float:
        out = plan("data=captions", "loss=sft", f"data.path={tmp_path}", *settings).out
        return float(re.findall(r"encoding ([\d.]+) GFLOP", out)[0])

    for n in range(6):
        Image.new("RGB", (64, 64), (n, 0, 0)).save(tmp_path / f"{n}.png")
        (tmp_path / f"{n}.txt").write_text("a caption")
    assert encoding("data.validation=0") == encoding("data.validation=1")
    assert encoding("framing.flip=true") == pytest.approx(2 * encoding(), rel=0.01)


def test_one_is_no_plural(plan):
    ended = plan("data=renders", "loss=sft", "data.n_pictures=1", "pairs_per_update=1", "rate=1", "trainer.max_steps=1")
    assert "update   1 picture, 1 at a time" in ended.out
    assert "data     1 picture: to be drawn\n" in ended.out
    assert "run      1 update: 1 pass over 1, 1 update each" in ended.out
    assert "1 second for 1 picture at 1 a second" in ended.out


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            ["data=pickapic", "data.max_pairs=40"],
            "at most 40 pairs, 4 of them held back: to be fetched, so ties are not known yet",
        ),
        (["data=pickapic", "data.max_pairs=null"], "all there are: to be fetched, so ties are not known yet"),
        (
            ["data=captions", "loss=sft", "data.path=owner/set", "data.max_images=40"],
            "at most 40 pictures, 4 of them held back: to be fetched",
        ),
    ],
)
def test_what_is_not_fetched_yet_is_said_to_be_a_limit(plan, settings, says, tmp_path):
    ended = plan(*settings, f"cache_dir={tmp_path / 'cache'}")
    assert (ended.code, f"data     {says}\n" in ended.out) == (0, True)
    assert not (tmp_path / "cache").exists()


def test_a_local_dataset_is_bounded_by_its_rows_and_counted_as_a_training_would_once_it_was_read(plan, tmp_path):
    """Of 24 rows 4 are tied and 4 without a label; 16 pairs are left, each with a prompt of its own."""

    def png(n: int) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (64, 64), (n, 0, 0)).save(buffer, "PNG")
        return buffer.getvalue()

    rows = [
        {"caption": f"prompt {n}", "jpg_0": png(2 * n), "jpg_1": png(2 * n + 1)}
        | {"label_0": [1.0, 0.0, 1.0, 0.0, 0.5, None][n % 6]}
        for n in range(24)
    ]
    file, cache = tmp_path / "set.parquet", tmp_path / "cache"
    pq.write_table(pa.Table.from_pylist(rows), file)
    before = sorted(tmp_path.rglob("*"))
    ended = plan("data=pickapic", f"data.path={file}", f"cache_dir={cache}")
    assert ended.code == 0, ended.err
    assert "data     at most 24 rows, 2 of them held back: to be read, so ties are not known yet" in ended.out
    assert "run      300 updates: 218 passes over 22, 2 updates each" in ended.out
    assert "latents" in ended.out and sorted(tmp_path.rglob("*")) == before

    PickAPic(str(file)).find(Cache(cache), fetch=True)
    before = sorted(tmp_path.rglob("*"))
    ended = plan("data=pickapic", f"data.path={file}", f"cache_dir={cache}")
    assert ended.code == 0, ended.err
    assert "set.parquet, train: 24 rows read; left out: 4 tied, 4 without a label" in ended.out
    assert "data     training: 15 pairs on 15 prompts; validation: 1 on 1 others" in ended.out
    assert "data     0 of 16 prompts are cut" in ended.out
    assert "run      300 updates: 320 passes over 15, 1 update each" in ended.out
    assert "latents" in ended.out and sorted(tmp_path.rglob("*")) == before


def test_a_local_dataset_that_no_training_could_use_is_a_mistake(plan, tmp_path):
    row = {"caption": "a prompt", "jpg_0": b"0", "jpg_1": b"1", "label_0": 1.0}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "set.parquet")
    ended = plan("data=pickapic", f"data.path={tmp_path / 'set.parquet'}")
    assert ended.code == 1 and "set.parquet has fewer than two rows, and validation needs a prompt" in ended.err


@pytest.mark.parametrize(("optimizer", "package"), [("adamw8bit", "bitsandbytes"), ("prodigy", "prodigyopt")])
def test_an_optimiser_is_planned_without_its_package(plan, optimizer, package, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == package else find(name, *more))
    ended = plan(f"optimizer={optimizer}")
    assert ended.code == 0, ended.err


@pytest.mark.parametrize("rate", ["0", "-2"])
def test_a_rate_that_is_none_is_refused(plan, rate):
    ended = plan(f"rate={rate}")
    assert (ended.code, "rate must be positive, in pairs a second, or null" in ended.err) == (1, True)


def test_a_setting_that_is_none_is_refused_with_the_nearest(plan):
    assert "did you mean rate?" in plan("+rates=3").err
