"""Composition, its checks, and what a user reads who made a mistake."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

from dpo_sd.composition.application import entry_point
from dpo_sd.composition.checks import check_composition, check_plan, with_epochs
from dpo_sd.composition.messages import settings_of
from dpo_sd.composition.options import targets
from dpo_sd.composition.presets import overrides, preset, say_choice
from dpo_sd.composition.roots import Train
from dpo_sd.composition.schema import CONF_DIR, PACKAGE
from dpo_sd.errors import UserError
from dpo_sd.training.hardware import accumulation


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))


GROUPS = sorted({path.name for path in CONF_DIR.iterdir() if path.is_dir()} - {"annotator"})  # those of train


def composed(*overrides: str, program: str = "train") -> DictConfig:
    """train.yaml, or that of another program, as a job sees it."""
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose(program, list(overrides), return_hydra_config=True)
    cfg.hydra.runtime.output_dir = "outputs/test"
    HydraConfig.instance().set_config(cfg)  # the loggers' folders point into it
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


@pytest.fixture(autouse=True)
def no_job_left():
    yield
    HydraConfig.instance().cfg = None


@entry_point("train", resumable=True)
def application(cfg: DictConfig) -> None:
    """Stands for the training: builds the loss, and leaves what a run leaves."""
    instantiate(cfg.loss)
    if cfg.name == "bug":
        raise ZeroDivisionError("a real bug")
    if cfg.name == "interrupted":
        raise KeyboardInterrupt
    folder = Path(HydraConfig.get().runtime.output_dir)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
    (folder / "run.json").write_text(json.dumps({"overrides": list(HydraConfig.get().overrides.task)}))
    summary = {"verdict": None, "metrics": {"train/loss": 0.5}, "wall_time_s": 1}
    (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Call `application` with a command line in an empty folder: exit code and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # given back at the end; the entry point sets it
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["app", *arguments])
        GlobalHydra.instance().clear()
        code = 0
        try:
            application()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, capsys.readouterr().err

    yield call
    root.handlers[:] = handlers
    root.setLevel(level)


# ---- what composes


NEEDS = {  # what an option asks for beside itself
    "trainer=ddp": ["hardware.micro_batch=8"],  # 16 pairs on two devices
    "data=pairs": ["data.pairs=folder"],
    "data=captions": ["data.path=folder", "loss=sft"],
    "data=renders": ["loss=sft"],
    "experiment=style_dpo": ["data.pairs=folder"],
}


@pytest.mark.parametrize("choice", [f"{group}={option}" for group in GROUPS for option in options(group)])
def test_every_option_of_every_group_composes(choice):
    check_composition(composed(choice, *NEEDS.get(choice, [])))


@pytest.mark.parametrize("experiment", options("experiment"))
def test_every_experiment_has_one_effective_batch_on_every_hardware(experiment):
    needs = NEEDS.get(f"experiment={experiment}", [])
    for hardware in options("hardware"):
        cfg = composed(f"experiment={experiment}", f"hardware={hardware}", *needs)
        steps = accumulation(cfg.pairs_per_update, cfg.hardware.micro_batch)
        assert steps * cfg.hardware.micro_batch == composed(f"experiment={experiment}", *needs).pairs_per_update


def test_the_root_type_names_what_train_yaml_composes():
    assert {each.name for each in fields(Train)} == set(composed())


def test_every_shipped_class_has_a_schema_that_knows_its_target():
    cfg = composed()
    nodes = [cfg.model, cfg.lora, cfg.data, cfg.loss, cfg.optimizer, cfg.hardware, *cfg.callbacks.values()]
    assert {node._target_ for node in nodes} <= set(targets().values())
    for node in [*nodes, cfg.sampler, cfg.framing]:
        assert settings_of(OmegaConf.get_type(node))["_target_"].default == node._target_


@pytest.mark.parametrize(("model", "steps", "guidance"), [("tiny", 12, 4.0), ("sd15", 30, 7.5), ("sdxl", 30, 5.0)])
@pytest.mark.parametrize("program", ["generate", "train"])
def test_a_family_is_drawn_with_steps_and_guidance_of_its_own(program, model, steps, guidance):
    sampler = composed(f"model={model}", program=program).sampler
    assert (sampler.steps, sampler.guidance) == (steps, guidance)
    sampler = composed(f"model={model}", "sampler.steps=7", "sampler.guidance=2", program=program).sampler
    assert (sampler.steps, sampler.guidance) == (7, 2)


def test_the_command_line_beats_the_experiment_which_beats_the_group():
    assert composed().loss.beta == 5000
    assert composed("experiment=quickstart").loss.beta == 2000
    assert composed("experiment=quickstart", "loss.beta=7").loss.beta == 7


def test_an_experiment_beats_the_hardware_which_beats_the_class(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nhardware: {micro_batch: 4}\n")
    searched = f"hydra.searchpath=[file://{tmp_path}]"
    assert composed().hardware.micro_batch == 16
    assert composed(searched, "experiment=mine").hardware.micro_batch == 4
    assert composed(searched, "experiment=mine", "hardware.micro_batch=2").hardware.micro_batch == 2


@pytest.mark.parametrize("experiment", options("experiment"))
def test_an_experiments_rate_and_schedule_are_those_of_adamw(experiment):
    recipe_of = [f"experiment={experiment}", *NEEDS.get(f"experiment={experiment}", [])]

    def rate(*given: str) -> float:
        return composed(*recipe_of, *given).optimizer.lr

    # another one needs a line here
    assert set(options("optimizer")) == {"adafactor", "adamw", "adamw8bit", "lion", "prodigy", "schedulefree"}
    recipe = rate()
    assert 1e-6 < recipe < 1e-2
    assert rate("optimizer=adamw") == rate("optimizer=adamw8bit") == rate("optimizer=adafactor") == recipe
    assert rate("optimizer=lion") == pytest.approx(recipe / 5)
    assert rate("optimizer=prodigy") == 1
    assert composed(*recipe_of, "optimizer=lion").optimizer.schedule == "cosine"
    assert composed(*recipe_of, "optimizer=schedulefree").optimizer.schedule == "constant"
    for optimizer in options("optimizer"):
        assert rate(f"optimizer={optimizer}", "optimizer.lr=0.5") == 0.5


@pytest.fixture
def one_gpu(monkeypatch):
    """`one_gpu(memory_gib)`: makes torch see one."""

    def see(memory_gib: float) -> None:
        properties = SimpleNamespace(name="Some GPU", total_memory=int(memory_gib * 2**30))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    return see


@pytest.mark.parametrize("program", ["train", "plan", "generate"])
def test_without_a_preset_the_gpu_chooses_it_but_for_the_tiny_model(one_gpu, program):
    def memory(*given: str) -> float | None:
        return composed(*given, program=program).hardware.memory_gib

    needs = ["out=folder"] if program == "generate" else []
    assert memory("model=sd15", *needs) is None
    one_gpu(23.6)
    assert memory("model=sd15", *needs) == memory("model=sdxl", "hardware=auto", *needs) == 24
    assert memory(*needs) is None
    assert memory("model=sd15", "hardware=cpu", *needs) is None
    assert memory("hardware=1x8gb", *needs) == 8
    one_gpu(7.8)
    assert memory("model=sd15", *needs) == 8


def test_the_choice_knows_the_experiments_model_and_leaves_its_preset_alone(one_gpu, tmp_path):
    one_gpu(79)
    assert composed("experiment=pickapic_dpo").hardware.memory_gib == 80
    assert composed("experiment=pickapic_dpo", "model=tiny").hardware.memory_gib is None
    (tmp_path / "experiment").mkdir()
    file = tmp_path / "experiment" / "mine.yaml"
    searched = f"hydra.searchpath=[file://{tmp_path}]"
    file.write_text("# @package _global_\ndefaults: [override /model: sd15, override /hardware: 1x12gb]\n")
    assert composed(searched, "experiment=mine").hardware.memory_gib == 12
    file.write_text("# @package _global_\ndefaults: [override /model: sd15]\nhardware: {micro_batch: 1}\n")
    cfg = composed(searched, "experiment=mine")
    assert (cfg.hardware.memory_gib, cfg.hardware.micro_batch) == (80, 1)


def test_the_preset_that_was_chosen_is_said_and_stands_among_the_overrides(one_gpu, capsys):
    one_gpu(23.6)
    for given, name, listed, said in (
        (["model=sd15"], "1x24gb", ["model=sd15", "hardware=1x24gb"], "hardware 1x24gb (Some GPU, 23.6 GiB)\n"),
        (["hardware=auto", "seed=1"], "cpu", ["seed=1", "hardware=cpu"], "hardware cpu (model=tiny needs no GPU)\n"),
        (["hardware=1x8gb"], "1x8gb", ["hardware=1x8gb"], ""),
    ):
        composed(*given)
        say_choice()
        assert (preset(), overrides(), capsys.readouterr().out) == (name, listed, said)


def test_a_callback_can_be_left_out():
    assert "samples" not in composed("~callbacks.samples").callbacks


def test_two_loggers_compose():
    assert set(composed("logger=[tensorboard,wandb]").logger) == {"tensorboard", "wandb"}


def test_wandb_is_offline_unless_logged_in(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert composed("logger=wandb").logger.wandb.offline is True
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert composed("logger=wandb").logger.wandb.offline is False


# ---- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["loss.betta=1"],
            "loss.betta: no such setting; did you mean loss.beta? "
            "(loss=dpo has: beta, label_smoothing, min_snr_gamma, reference, draws_per_pair, beta_convention, huber_c, "
            "huber_schedule)",
        ),
        (
            ["lora.ranks.mid_block=3"],
            "lora.ranks.mid_block: lora.ranks is given as a whole, lora.ranks={mid_block:...}",
        ),
        (["max_steps=3"], "max_steps: no such setting; did you mean trainer.max_steps?"),
        (["losss=dpo"], "losss: no such setting; did you mean loss?"),
        (["experimnt=quickstart"], "experimnt: no such setting; did you mean experiment?"),
        (["loss=dpoo"], "loss=dpoo: no such option; did you mean dpo? (loss has: dpo, sft)"),
        (
            ["hydra/launcher=joblib", "-m"],
            "hydra/launcher=joblib needs a package that is not installed: run pip install -e '.[sweep]'",
        ),
        (
            ["loss=sft", "loss.beta=3"],
            "loss.beta: no such setting; it belongs to loss=dpo (loss=sft has: min_snr_gamma, huber_c, huber_schedule)",
        ),
        (["loss.beta=high"], "loss.beta must be a number, got 'high'"),
        (["loss.beta=null"], "loss.beta must be a number, got null"),
        (["loss.min_snr_gamma=x"], "loss.min_snr_gamma must be a number or null, got 'x'"),
        (["lora.rank=2.5"], "lora.rank must be a whole number, got 2.5"),
        (["lora.target_modules=to_q"], "lora.target_modules must be a list, got 'to_q'"),
        (["optimizer.betas=[0.9,x]"], "optimizer.betas[1] must be a number, got 'x'"),
        (["trainer.deterministic=maybe"], "trainer.deterministic must be true or false, got 'maybe'"),
        (["seed=abc"], "seed must be a whole number, got 'abc'"),
        (["loss=null"], "Config group override must be a string or a list. Got NoneType"),
        (
            ["quickstart"],
            "cannot read quickstart: write key=value, and a value with special characters as key=\"'a=b'\"",
        ),
    ],
)
def test_a_mistake_is_one_message_before_anything_is_written(run, tmp_path, arguments, message):
    assert run(*arguments) == (1, f"error: {message}\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["loss.beta=-1"], "loss: beta must be positive and finite, got -1.0"),
        (
            ["optimizer.schedule=cosin"],
            "optimizer.schedule must be one of constant, cosine, linear, cosine_with_restarts, polynomial, "
            "piecewise_constant, got 'cosin'; did you mean cosine?",
        ),
        (["trainer.strategy=dpp"], "trainer.strategy must be one of auto, ddp, got 'dpp'; did you mean ddp?"),
        (
            ["pairs_per_update=17"],
            "pairs_per_update=17 does not divide into 16 pairs at a time "
            "(hardware.micro_batch=16 on each of 1 devices): "
            "use pairs_per_update=16 or 32, or another hardware.micro_batch",
        ),
        (["trainer.max_steps=0"], "trainer.max_steps must be at least 1, got 0"),
        (["trainer.ema_decay=1"], "trainer.ema_decay must be in (0, 1), or null for no average, got 1.0"),
        (
            ["trainer.ema_decay=0.9", "optimizer=schedulefree"],
            "trainer.ema_decay: optimizer=schedulefree has an average of its own: leave one of the two out",
        ),
        (
            ["lora.dora=true", "hardware.weights=int8", "hardware.precision=bf16-mixed"],
            "lora.dora=true needs the base's own weights, and not hardware.weights=int8: use hardware.weights=bfloat16",
        ),
        (
            ["lora.dora=true", "hardware.compile=true"],
            "lora.dora=true cannot be compiled: use hardware.compile=false",
        ),
        (["trainer.max_epochs=0"], "trainer.max_epochs must be above 0 and at most 10^6, got 0.0"),
        (["trainer.max_hours=0"], "trainer.max_hours must be positive, or null for no limit, got 0.0"),
        (
            ["trainer.max_hours=1", "~callbacks.checkpoint"],
            "trainer.max_hours ends a run by saving it, for which the checkpoint callback is: leave it in",
        ),
        (
            ["callbacks.checkpoint.best=val/loss", "callbacks.checkpoint.every=30"],
            "callbacks.checkpoint.best compares validations: callbacks.checkpoint.every=30 must be a multiple of "
            "trainer.validate_every=50",
        ),
        (["seed=-1"], "seed must be at least 0 and below 2^32, got -1"),
        (
            ["logger=wandb", "logger.wandb.offline=no"],
            "logger.wandb.offline must be true or false, got 'no'",
        ),
        (["~lora"], "lora has no value: give lora=attention|full|transformer"),
        (
            ["optimizer.text_encoder_lr=1e-5"],
            "optimizer.text_encoder_lr is given, but no text encoder is trained: add lora.text_encoder=true",
        ),
        (["callbacks.samples=null"], "callbacks.samples is null: leave it out with ~callbacks.samples"),
        (["+foo=1"], "foo: no such setting"),
        (
            ["+callbacks.sampels.every=3"],
            "callbacks.sampels: no such setting; did you mean callbacks.samples? "
            "(callbacks has: checkpoint, default, export, health, progress, samples, verdict)",
        ),
        (["cache=of"], "cache must be one of all, latents, off, got 'of'; did you mean off?"),
        (
            ["model.prediction_type=velocity"],
            "model.prediction_type must be one of epsilon, v_prediction, got 'velocity'",
        ),
        (
            ["loss.reference=cached"],
            "loss: reference=cached needs draws that come again: add loss.draws_per_pair=4, for example",
        ),
        (
            ["loss.draws_per_pair=0"],
            "loss: draws_per_pair must be between 1 and 1000, or null for a new one at each visit, got 0",
        ),
        (["cache_dir='${nowhere}'"], "cache_dir: Interpolation key 'nowhere' not found"),
    ],
)
def test_a_mistake_that_composes_is_one_message_and_leaves_nothing(run, tmp_path, arguments, message):
    assert run(*arguments) == (1, f"error: {message}\n")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("asked", "add"),
    [
        (["data=pairs", "data.pairs=folder", "framing.random_crop=true"], "cache=off"),
        (["data=pairs", "data.pairs=folder", "framing.random_crop=true", "cache=latents"], "cache=off"),
        (["lora.text_encoder=true"], "cache=latents"),
        (["data=captions", "loss=sft", "data.path=photos", "data.shuffle_tags=true"], "cache=latents"),
    ],
)
def test_a_cache_that_cannot_hold_what_changes_at_every_visit_is_refused_with_the_one_that_can(asked, add):
    with pytest.raises(UserError, match=f"add {add}$"):
        check_composition(composed(*asked))
    check_composition(composed(*asked, add))
    if add == "cache=latents":
        check_composition(composed(*asked, "cache=off"))


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_a_model_group_is_its_family_and_takes_any_file_of_it(family):
    settings = {"name": family, "path": "/models/mine.safetensors", "variant": "fp16", "vae": "some/vae"}
    model = composed(f"model={family}", *(f"model.{key}={value}" for key, value in settings.items())).model
    assert {key: model[key] for key in settings} == settings
    assert composed(f"model={family}").model.path is None


def test_a_mistake_in_an_experiment_file_names_the_file(run, tmp_path):
    folder = tmp_path / "mine" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("# @package _global_\nloss: {betta: 1}\n")
    code, message = run("--config-dir", str(tmp_path / "mine"), "experiment=mine")
    assert code == 1
    assert message.startswith("error: in experiment/mine.yaml: loss.betta: no such setting; did you mean loss.beta?")


def test_an_option_written_as_a_value_in_a_file_is_refused(run, tmp_path):
    folder = tmp_path / "mine" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("# @package _global_\nloss: sft\n")
    code, message = run("--config-dir", str(tmp_path / "mine"), "experiment=mine")
    assert code == 1
    assert message.startswith("error: in experiment/mine.yaml: ")
    assert message.endswith("value: sft; choose an option with override /<group>: <option> under defaults\n")


def test_an_output_folder_that_cannot_be_made_is_named_with_the_reason(run, tmp_path):
    (tmp_path / "file").write_text("")
    code, message = run("hydra.run.dir=file/run")
    assert code == 1
    assert message.startswith("error: cannot write file/run: Not a directory; hydra.run.dir=<folder> and ")


def test_a_real_bug_keeps_its_traceback_on_the_console_and_in_the_log(run, tmp_path):
    code, message = run("name=bug")
    assert code == 1
    assert "Traceback" in message and "ZeroDivisionError: a real bug" in message
    assert "ZeroDivisionError: a real bug" in next(tmp_path.rglob("train.log")).read_text()


def test_ctrl_c_ends_with_130_and_no_traceback(run):
    assert run("name=interrupted") == (130, "")


@pytest.mark.parametrize(("program", "check"), [("train", check_composition), ("plan", check_plan)])
@pytest.mark.parametrize("data", [["data=captions", "data.path=photos"], ["data=renders"]])
def test_a_loss_on_pairs_is_refused_on_single_images(program, check, data):
    message = rf"loss=dpo needs pairs, but {data[0]} has single images: use data=.*data=shapes.* or loss=sft"
    with pytest.raises(UserError, match=message):
        check(composed(*data, program=program))


@pytest.mark.parametrize("check", [check_composition, check_plan])
@pytest.mark.parametrize("data", [["data=shapes"], ["data=renders", "loss=sft"]])
@pytest.mark.parametrize("framing", ["resolution=128", "flip=true", "random_crop=true"])
def test_the_shapes_world_refuses_other_sizes_crops_and_flips(check, data, framing):
    cfg = composed(*data, f"framing.{framing}", "cache=off", program="plan")
    with pytest.raises(UserError, match=rf"^{data[0]} has pictures of 64 pixels .* leave out framing\.resolution"):
        check(cfg)
    check(composed(*data, "framing.resolution=64", program="plan"))


def program(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run an entry point in a process of its own."""
    path = tmp_path / "app.py"
    path.write_text(
        "import sys\n"
        "from dpo_sd.composition.application import entry_point\n"
        "@entry_point('train')\n"
        "def main(cfg): print('heavy:', {'torch', 'lightning', 'diffusers'} & set(sys.modules))\n"
        "main()\n"
    )
    command = [sys.executable, str(path), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    return subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_a_mistake_ends_the_process_with_code_1_and_one_line(tmp_path):
    ended = program(tmp_path, "loss.betta=1")
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (1, "", 1)


def test_composing_and_checking_imports_nothing_heavy(tmp_path):
    assert program(tmp_path, "experiment=quickstart").stdout == "heavy: set()\n"


def test_help_lists_groups_and_examples(tmp_path):
    ended = program(tmp_path, "--help")
    assert ended.returncode == 0
    assert "python -m dpo_sd.train experiment=quickstart" in ended.stdout
    assert "  loss       dpo, sft\n" in ended.stdout
    assert "schema" not in ended.stdout


# ---- sweeps


def test_a_sweep_ends_in_one_table(run, tmp_path):
    assert run("-m", "loss.beta=500,2000", "name=grid")[0] == 0
    table = next(tmp_path.rglob("sweep.md")).read_text()
    assert "| 0   | loss.beta=500  | 0.5  | 1 s  |" in table
    assert "name=grid" not in table  # all jobs share it


def test_a_failed_job_of_a_sweep_is_told_at_once_and_the_others_run(run, tmp_path):
    code, message = run("-m", "loss.beta=500,-1,2000")
    assert code == 1
    assert message == "error: loss: beta must be positive and finite, got -1.0\n"
    assert len(list(tmp_path.rglob("summary.json"))) == 2
    assert "loss: beta must be positive" in next(tmp_path.rglob("sweep.csv")).read_text()


def test_a_wrong_type_in_a_sweep_is_found_before_the_first_job(run, tmp_path):
    assert run("-m", "loss.beta=500,high") == (1, "error: loss.beta must be a number, got 'high'\n")
    assert not list(tmp_path.rglob("summary.json"))


def test_a_sweep_over_several_devices_is_refused(run):
    code, message = run("-m", "seed=1", "trainer=ddp", "hardware.micro_batch=8")
    assert code == 1
    assert message.startswith("error: a sweep trains on one device, got 2:")


def test_a_resumed_run_has_the_old_settings_the_new_ones_and_its_folder(run, tmp_path):
    assert run("experiment=quickstart", "~callbacks.samples", "loss.beta=700", "hydra.run.dir=a b") == (0, "")
    assert run("resume=a b", "trainer.max_steps=400") == (0, "")
    cfg = OmegaConf.load(tmp_path / "a b" / "config.yaml")
    assert (cfg.name, cfg.loss.beta, cfg.trainer.max_steps, cfg.resume) == ("quickstart", 700, 400, "a b")
    assert "samples" not in cfg.callbacks


def test_a_mistake_leaves_no_folder_behind_and_spares_what_was_there(train, tmp_path):
    mistake = "lora.init_from=nowhere.safetensors"
    assert train(tmp_path / "one", mistake).code == 1
    assert not (tmp_path / "one").exists()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").touch()
    assert train(tmp_path / "used", mistake).code == 1
    assert (tmp_path / "used" / "notes.txt").exists()


@pytest.mark.parametrize(("epochs", "samples", "updates"), [(1, 100, 10), (1.1, 100, 11), (2, 101, 21), (0.01, 5, 1)])
def test_passes_over_the_data_become_updates(epochs, samples, updates):
    cfg = composed(f"trainer.max_epochs={epochs}", "pairs_per_update=10", "hardware.micro_batch=5")
    assert with_epochs(cfg, samples).trainer.max_steps == updates


def test_passes_over_data_of_unknown_size_are_refused():
    with pytest.raises(UserError, match=r"how large this data is is not known yet: give trainer\.max_steps instead"):
        with_epochs(composed("trainer.max_epochs=1"), None)
