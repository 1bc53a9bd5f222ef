"""Whole runs: what they leave, that killing them loses nothing, and how they end when something is wrong."""

from __future__ import annotations

import csv
import errno
import importlib
import itertools
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file

from dpo_sd.files.checksums import seal

# runs that are compared with each other: every kind of randomness is in use, and both schedules are in motion
RANDOM = (
    "hardware.micro_batch=2",
    "lora.dropout=0.2",
    "data.caption_dropout=0.3",
    "noising.offset=0.1",
    "trainer.ema_decay=0.5",
    "optimizer.lr=1e-3",
    "optimizer.schedule=cosine",
    "optimizer.warmup_steps=1",
    "callbacks.samples.every=3",
    "callbacks.verdict.n_prompts=2",
    "callbacks.verdict.seeds_per_prompt=1",
)
UNWATCHED = ("~callbacks.samples", "~callbacks.verdict")


def checkpoint(run: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)


def policy(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint(run)["adapters"]["policy"]


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text("utf-8"))


def files(run: Path) -> dict[str, bytes]:
    """Everything in a folder but the log."""
    paths = (path for path in run.rglob("*") if path.is_file() and path.suffix != ".log")
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in paths}


def tensors(tree: Any, key: str = "") -> dict[str, torch.Tensor]:
    """The tensors of nested dictionaries and lists, by their place."""
    if isinstance(tree, torch.Tensor):
        return {key: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    return {name: value for at, node in items for name, value in tensors(node, f"{key}/{at}").items()}


def assert_same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert list(a) == list(b)
    assert not [name for name in a if not torch.equal(a[name], b[name])]


def assert_same_run(run: Path, whole: Path) -> None:
    """To the bit, the same weights, optimiser, metrics, pictures and verdict."""
    one, other = files(run), files(whole)
    assert one.keys() == other.keys()
    assert one["metrics.csv"] == other["metrics.csv"]
    assert {name: one[name] for name in one if name.endswith(".png")} == {
        name: other[name] for name in other if name.endswith(".png")
    }
    for name in ("adapters", "optimizer_states"):
        assert_same_tensors(tensors(checkpoint(run)[name]), tensors(checkpoint(whole)[name]))
    for a, b in zip(sorted((run / "lora").iterdir()), sorted((whole / "lora").iterdir()), strict=True):
        assert_same_tensors(load_file(a), load_file(b))
    for name in ("verdict", "metrics", "steps"):
        assert summary(run)[name] == summary(whole)[name]


def assert_close_runs(run: Path, other: Path) -> None:
    """The same weights and metrics but for rounding."""
    a, b = (torch.cat([value.flatten() for value in policy(folder).values()]) for folder in (run, other))
    assert torch.linalg.norm(a - b) < 1e-4 * torch.linalg.norm(b)
    for one, two in zip(rows(run), rows(other), strict=True):
        assert one.keys() == two.keys()
        for name in one:
            assert (one[name] == "") == (two[name] == "")
            if one[name]:
                assert float(one[name]) == pytest.approx(float(two[name]), rel=1e-3, abs=1e-6), (name, one["step"])


def before_call(owner: Any, name: str, number: int, action: Callable[[], object]) -> None:
    """From here on, the `number`-th call of `owner.name` begins with `action`."""
    original, calls = getattr(owner, name), itertools.count(1)

    @wraps(original)
    def watched(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            action()
        return original(*args, **kwargs)

    setattr(owner, name, watched)


def send(*numbers: signal.Signals) -> Callable[[], None]:
    def action() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)

    return action


die = send(signal.SIGKILL)


# what a run leaves


@pytest.fixture(scope="module")
def run(train, tmp_path_factory) -> Path:
    """A finished DPO run."""
    folder = tmp_path_factory.mktemp("shapes") / "run"
    ended = train(folder)
    assert ended.code == 0, ended.err
    (folder.parent / "out").write_text(ended.out)
    return folder


def test_a_run_folder_holds_all_that_the_design_promises_and_no_leftovers(run):
    assert sorted(files(run)) == [
        "checkpoints/last.ckpt",
        "checkpoints/step=000004.ckpt",
        "checkpoints/step=000006.ckpt",
        "config.yaml",
        "lora/pytorch_lora_weights.safetensors",
        "lora/train-000004.safetensors",
        "lora/train-000006.safetensors",
        "lora/train.safetensors",
        "metrics.csv",
        "run.json",
        "samples/step=000000.png",
        "samples/step=000006.png",
        "summary.json",
    ]


def test_what_a_run_prints_ends_with_its_verdict_and_where_its_results_are(run):
    out = (run.parent / "out").read_text()
    assert "on held-out prompts" in out
    assert out.splitlines()[-3:] == [
        f"before/after  {run / 'samples' / 'step=000006.png'}",
        f"lora          {run / 'lora' / 'pytorch_lora_weights.safetensors'}",
        f"lora          {run / 'lora' / 'train.safetensors'}",
    ]


def test_config_yaml_of_a_run_can_be_run_again_to_the_same_weights(run, command, tmp_path):
    ended = command("--config-dir", str(run), "--config-name", "config", f"hydra.run.dir={tmp_path}")
    assert ended.code == 0, ended.err
    assert_same_tensors(policy(tmp_path), policy(run))


def test_a_folder_with_a_run_in_it_is_not_run_into_again(run, train):
    before = files(run)
    ended = train(run, "loss.beta=7")
    assert ended.code == 1 and f"{run} holds a run already: continue it with resume={run}" in ended.err
    assert files(run) == before


def test_a_folder_inside_a_run_means_the_run(run, command):
    before = files(run)
    ended = command(f"resume={run / 'checkpoints'}")
    assert ended.code == 0 and f"resume  {run / 'checkpoints' / 'last.ckpt'}" in ended.out, ended.err
    assert files(run).keys() == before.keys()


def test_fewer_updates_than_a_checkpoint_has_are_refused(run, command):
    ended = command(f"resume={run}", "trainer.max_steps=1")
    assert ended.code == 1 and "has 6 updates behind it, and trainer.max_steps is 1" in ended.err


def test_a_finished_run_without_its_checkpoints_is_not_trained_again(run, command, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(copy / "checkpoints")
    ended = command(f"resume={copy}")
    assert ended.code == 1 and "its checkpoints are gone" in ended.err


def test_gradient_clipping_and_a_schedules_end_may_not_change_on_resuming(run, command):
    assert "trainer.gradient_clip (there 1.0, here 0.5)" in command(f"resume={run}", "trainer.gradient_clip=0.5").err


def test_without_checkpoints_the_lora_is_written_all_the_same(train, tmp_path):
    ended = train(tmp_path, "trainer.max_steps=1", "~callbacks.checkpoint", *UNWATCHED)
    assert ended.code == 0, ended.err
    assert {file.name for file in (tmp_path / "lora").iterdir()} == {
        "pytorch_lora_weights.safetensors",
        "train.safetensors",
    }


def test_a_warm_up_that_takes_all_updates_is_refused_before_anything_is_drawn(train, tmp_path):
    ended = train(tmp_path / "run", "optimizer.warmup_steps=6")
    assert ended.code == 1 and "warmup_steps must be below trainer.max_steps=6, got 6" in ended.err
    assert not (tmp_path / "run").exists()


@pytest.fixture
def small_gpu(monkeypatch):
    """Makes torch see one of 7.8 GiB."""
    properties = SimpleNamespace(name="Some GPU", total_memory=int(7.8 * 2**30))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)


def test_a_run_that_its_plan_says_the_gpu_does_not_hold_is_refused_before_data_is_looked_for(
    command, small_gpu, tmp_path, monkeypatch
):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    settings = ("experiment=style_dpo", "model=sd15", "data.pairs=nowhere", "hardware.gradient_checkpointing=false")
    folder = f"hydra.run.dir={tmp_path / 'run'}"
    ended = command(*settings, folder)
    assert ended.code == 1 and not (tmp_path / "run").exists()
    assert ended.out == "hardware 1x8gb (Some GPU, 7.8 GiB)\n"
    assert re.match(r"error: update: forward needs \d+\.\d+ GiB of the 7\.80 of Some GPU, as it is planned", ended.err)
    assert "the nearest that does, the cheapest first\n  hardware.micro_batch=1\n" in ended.err
    # which is followed, or tried nevertheless, as far as the weights
    for way_out in ("hardware.micro_batch=1", "hardware.memory_gib=null"):
        ended = command(*settings, way_out, folder)
        assert ended.code == 1 and re.fullmatch(r"error: .* is not on this computer and HF_HUB.*\n", ended.err)


def test_config_yaml_composes_the_same_settings_again(run, command):
    ended = command("--config-dir", str(run), "--config-name", "config", "--cfg", "job")
    assert ended.code == 0, ended.err
    assert OmegaConf.create(ended.out) == OmegaConf.load(run / "config.yaml")


def test_run_json_says_what_ran(run):
    record = json.loads((run / "run.json").read_text("utf-8"))
    assert record["command"][:3] == ["python", "-m", "dpo_sd.train"]
    assert "trainer.max_steps=6" in record["overrides"] and record["seed"] == 0
    assert {"version", "commit", "python", "packages", "started", "device", "model", "data"} <= record.keys()
    assert len(record["model"]["fingerprint"]) == len(record["data"]) == 16


def test_metrics_csv_has_a_row_for_every_update_and_validations_between(run):
    table = rows(run)
    assert [int(row["step"]) for row in table] == [0, 1, 2, 3, 4, 5, 6]
    assert [int(row["step"]) for row in table if row["val/loss"]] == [0, 3, 6]
    assert [int(row["step"]) for row in table if row["train/loss"]] == [1, 2, 3, 4, 5, 6]
    names = ("loss", "reward_margin", "reward_accuracy", "chosen_drift", "rejected_drift")
    assert {f"{part}/{name}" for part in ("train", "val") for name in names} <= table[0].keys()
    assert float(table[1]["train/loss"]) == pytest.approx(0.693147, abs=1e-6)  # policy and reference still are equal


def test_the_summary_holds_the_last_metrics_and_the_verdict(run):
    record = summary(run)
    assert record["steps"] == 6 and record["wall_time_s"] > 0 and record["peak_memory_gib"] > 0
    last = {name: float(value) for name, value in rows(run)[-1].items() if name != "step"}
    assert record["metrics"] == last
    verdict = record["verdict"]
    assert {"win_rate", "low", "high", "n_prompts", "judge", "score_before", "score_after"} <= verdict.keys()
    assert 0 <= verdict["low"] <= verdict["win_rate"] <= verdict["high"] <= 1
    assert verdict["n_prompts"] == 4 and verdict["judge"].startswith("oracle")


def test_before_after_sheets_show_base_and_policy(run):
    first, last = (Image.open(run / "samples" / f"step=00000{step}.png") for step in (0, 6))
    assert first.size == last.size and first.width > 2 * 64 and first.height > 2 * 64
    assert first.tobytes() != last.tobytes()


def test_checkpoints_hold_adapters_optimiser_and_loop_only(run):
    content = checkpoint(run)  # with weights_only
    assert content["state_dict"] == {} and content["adapters"].keys() == {"policy"}
    assert content["global_step"] == 6
    size = sum(tensor.nbytes for tensor in tensors(content).values())
    assert size < 3.1 * sum(tensor.nbytes for tensor in policy(run).values())  # AdamW keeps two numbers for each
    assert (run / "checkpoints" / "last.ckpt").stat().st_size < 5_000_000


def test_last_ckpt_is_the_newest_of_the_checkpoints_kept(run):
    kept = files(run / "checkpoints")
    assert kept["last.ckpt"] == kept["step=000006.ckpt"]


def test_the_exported_lora_is_the_policy_of_the_last_checkpoint(run):
    exported = load_file(run / "lora" / "pytorch_lora_weights.safetensors")
    assert_same_tensors({key: exported[key] for key in sorted(exported)}, dict(sorted(policy(run).items())))


def test_fine_tuning_leaves_the_same_folder(train, tmp_path):
    folder = tmp_path / "sft"
    ended = train(folder, "loss=sft", "trainer.max_steps=2", "callbacks.checkpoint.keep=1", "trainer.validate_every=2")
    assert ended.code == 0, ended.err
    assert {"config.yaml", "run.json", "metrics.csv", "summary.json", "checkpoints/last.ckpt"} <= files(folder).keys()
    assert set(rows(folder)[0]) == {"step", "train/loss", "train/lr", "val/loss"}
    assert summary(folder)["verdict"]["judge"].startswith("oracle")
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["last.ckpt", "step=000002.ckpt"]


@pytest.mark.parametrize("start", ["nothing", "a LoRA"])
def test_every_policy_parameter_moves_and_nothing_else_does(train, run, tmp_path, start):
    def watch() -> None:
        import lightning as L

        fit = L.Trainer.fit

        def watched(trainer: Any, module: Any, **kwargs: Any) -> None:
            before = {name: value.clone() for name, value in module.unet.state_dict().items()}
            fit(trainer, module, **kwargs)
            for name, value in module.unet.state_dict().items():
                assert torch.equal(value, before[name]) != (".policy." in name), name

        L.Trainer.fit = watched  # type: ignore[method-assign]

    init_from = () if start == "nothing" else (f"lora.init_from={run}",)
    ended = train(
        tmp_path / "run", *init_from, *UNWATCHED, "trainer.max_steps=3", "trainer.validate_every=3", patch=watch
    )
    assert ended.code == 0, ended.err
    adapters = {"policy"} if start == "nothing" else {"policy", "reference"}
    assert checkpoint(tmp_path / "run")["adapters"].keys() == adapters


# killed and continued


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory) -> Path:
    """A run that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    ended = train(folder, *RANDOM)
    assert ended.code == 0, ended.err
    return folder


def die_in_the_middle_of_writing_the_second_checkpoint() -> None:
    save, calls = torch.save, itertools.count(1)

    def cut_short(content: Any, file: Path) -> None:
        save(content, file)
        if next(calls) == 2:
            os.truncate(file, file.stat().st_size // 2)
            die()

    torch.save = cut_short


def die_before_replacing(name: str, number: int) -> Callable[[], None]:
    """Dies when a file of that name is whole for the `number`-th time and about to take its place."""

    def patch() -> None:
        replace, calls = os.replace, itertools.count(1)

        def watched(source: Any, target: Any) -> None:
            if Path(target).name == name and next(calls) == number:
                die()
            replace(source, target)

        os.replace = watched

    return patch


def die_in(module: str, owner: str, name: str, number: int) -> Callable[[], None]:
    def patch() -> None:
        before_call(getattr(importlib.import_module(f"dpo_sd.{module}"), owner), name, number, die)

    return patch


MOMENTS = {
    "before the first update": die_in("callbacks.samples", "Samples", "on_start", 1),
    "before the first checkpoint": die_in("training.step", "DiffusionModule", "training_step", 2),
    "between the micro-batches of an update": die_in("training.step", "DiffusionModule", "training_step", 6),
    "after an update and before its metrics": die_in("callbacks.metrics", "Metrics", "on_update", 5),
    "after the metrics and before the checkpoint": die_in("callbacks.checkpoint", "Checkpoint", "save", 2),
    "during a checkpoint write": die_in_the_middle_of_writing_the_second_checkpoint,
    "between a checkpoint and its being the last": die_before_replacing("last.ckpt", 2),
    "between the two LoRA files": die_before_replacing("train.safetensors", 2),
    "after the last update": die_in("callbacks.verdict", "Verdict", "on_end", 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_and_continued_ends_with_the_same_bits(train, command, whole, tmp_path, moment):
    folder = tmp_path / "run"
    ended = train(folder, *RANDOM, patch=MOMENTS[moment])
    assert ended.code == -signal.SIGKILL, ended.err
    assert not (folder / "summary.json").exists()
    ended = command(f"resume={folder}")
    assert ended.code == 0, ended.err
    assert_same_run(folder, whole)


def started(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    """`python -m dpo_sd.train *arguments`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen([sys.executable, "-m", "dpo_sd.train", *arguments], env=environment, text=True, **options)


def test_a_command_killed_from_outside_continues_to_the_same_bits(small, whole, tmp_path):
    folder = tmp_path / "run"
    process = started(*small(folder, *RANDOM), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (folder / "metrics.csv").exists() and process.poll() is None:
        time.sleep(0.05)
    pause = random.uniform(0, 1.5)  # a moment of this machine's choice
    time.sleep(pause)
    process.kill()
    process.wait()
    process = started(f"resume={folder}", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    _, err = process.communicate(timeout=500)
    assert process.returncode == 0, (pause, err)
    assert_same_run(folder, whole)


def test_ctrl_c_saves_says_how_to_continue_and_loses_nothing(train, command, whole, tmp_path):
    def patch() -> None:
        from dpo_sd.training.step import DiffusionModule

        before_call(DiffusionModule, "training_step", 5, send(signal.SIGINT))

    folder = tmp_path / "run"
    ended = train(folder, *RANDOM, patch=patch)
    assert ended.code == 130
    assert "Traceback" not in ended.err
    assert checkpoint(folder)["global_step"] == 3  # the update that it was in
    said = ended.out.splitlines()[-1].split()
    assert said == ["python", "-m", "dpo_sd.train", f"resume={folder}"]
    ended = command(*said[3:])
    assert ended.code == 0, ended.err
    assert_same_run(folder, whole)


def test_a_second_ctrl_c_stops_at_once(train, command, whole, tmp_path):
    def patch() -> None:
        from dpo_sd.training.step import DiffusionModule

        before_call(DiffusionModule, "training_step", 5, send(signal.SIGINT, signal.SIGINT))

    folder = tmp_path / "run"
    ended = train(folder, *RANDOM, patch=patch)
    assert ended.code == 130
    assert checkpoint(folder)["global_step"] == 2
    assert f"resume={folder}" in ended.out.splitlines()[-1]
    assert command(f"resume={folder}").code == 0
    assert_same_run(folder, whole)


def test_ctrl_c_while_the_pairs_are_drawn_says_how_to_continue(train, command, whole, tmp_path):
    def patch() -> None:
        from dpo_sd.models.sampling import Sampler

        before_call(Sampler, "stream", 1, send(signal.SIGINT))

    folder = tmp_path / "run"
    ended = train(folder, *RANDOM, f"cache_dir={tmp_path / 'cache'}", patch=patch)
    assert ended.code == 130
    assert f"resume={folder}" in ended.out.splitlines()[-1]
    assert command(f"resume={folder}").code == 0
    assert_same_run(folder, whole)


def test_ctrl_c_during_the_verdict_stops_at_once_and_the_verdict_can_be_had_later(train, command, whole, tmp_path):
    def patch() -> None:
        from dpo_sd.callbacks.verdict import Verdict

        before_call(Verdict, "on_end", 1, send(signal.SIGINT))

    folder = tmp_path / "run"
    ended = train(folder, *RANDOM, patch=patch)
    assert ended.code == 130
    assert f"resume={folder}" in ended.out.splitlines()[-1]
    assert command(f"resume={folder}").code == 0
    assert_same_run(folder, whole)


def test_a_run_continues_in_micro_batches_of_another_size_and_with_more_updates(train, command, tmp_path):
    constant = ("data.caption_dropout=0.3", "optimizer.eps=1e-3", *UNWATCHED)
    long, short = tmp_path / "long", tmp_path / "short"
    assert train(long, *constant, "trainer.validate_every=2").code == 0
    assert train(short, *constant, "trainer.validate_every=2", "trainer.max_steps=4").code == 0
    ended = command(f"resume={short}", "trainer.max_steps=6", "hardware.micro_batch=1")
    assert ended.code == 0, ended.err
    assert_close_runs(short, long)


# what must not change what is learnt


@pytest.fixture(scope="module")
def plain(train, tmp_path_factory) -> Path:
    """A run without pictures."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    ended = train(folder, *PLAIN)
    assert ended.code == 0, ended.err
    return folder


PLAIN = (*UNWATCHED, "data.caption_dropout=0.3", "optimizer.eps=1e-3", "callbacks.checkpoint.every=100")


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_the_size_of_the_micro_batch_changes_rounding_only(train, plain, tmp_path, micro_batch):
    ended = train(tmp_path / "run", *PLAIN, f"hardware.micro_batch={micro_batch}")
    assert ended.code == 0, ended.err
    assert_close_runs(tmp_path / "run", plain)


def test_workers_change_no_bit(train, plain, tmp_path):
    ended = train(tmp_path / "run", *PLAIN, "hardware.num_workers=2")
    assert ended.code == 0, ended.err
    assert_same_tensors(policy(tmp_path / "run"), policy(plain))
    assert rows(tmp_path / "run") == rows(plain)


def test_two_processes_change_rounding_only(small, plain, tmp_path):
    folder = tmp_path / "run"
    arguments = small(folder, *PLAIN, "trainer=ddp", "hardware.micro_batch=2")
    process = started(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    assert_close_runs(folder, plain)
    assert out.count("update  4 pairs (1 x 2 on 2 devices), 6 updates") == 1
    assert "continued" not in json.loads((folder / "run.json").read_text("utf-8"))


def test_pictures_and_validations_leave_the_training_untouched_to_the_bit(train, plain, tmp_path):
    folder = tmp_path / "run"
    pictures = tuple(setting for setting in PLAIN if setting not in UNWATCHED)
    ended = train(folder, *pictures, "callbacks.samples.every=1", "trainer.validate_every=1")
    assert ended.code == 0, ended.err
    assert len(list((folder / "samples").iterdir())) == 7
    assert_same_tensors(policy(folder), policy(plain))

    def learnt(run: Path) -> list[dict[str, str]]:
        return [{name: value for name, value in row.items() if name.startswith("train/")} for row in rows(run)]

    assert learnt(folder) == learnt(plain)


def test_another_seed_gives_another_run(train, plain, tmp_path):
    ended = train(tmp_path / "run", *PLAIN, "seed=1")
    assert ended.code == 0, ended.err
    assert rows(tmp_path / "run") != rows(plain)


# refused and broken


def refused(ended: Any, *said: str) -> None:
    """One line on stderr after whatever bars were drawn, exit code 1, no traceback."""
    assert ended.code == 1, ended
    assert "Traceback" not in ended.err
    assert ended.err.count("error: ") == 1, ended.err
    message = ended.err.rpartition("error: ")[2]
    assert not [words for words in said if words not in message], message


@pytest.fixture
def copy(run, tmp_path) -> Path:
    """A copy of the finished run, to be spoilt."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


def spoil(file: Path, how: str) -> None:
    if how == "cut short":
        file.write_bytes(file.read_bytes()[:-1000])
    elif how == "a pickle":
        file.write_bytes(pickle.dumps({"identity": {"settings": Path("/")}}))
    elif how == "of another program":
        torch.save({"state_dict": {}, "epoch": 3}, file)
    elif how == "empty":
        file.write_bytes(b"")


@pytest.mark.parametrize("how", ["cut short", "a pickle", "of another program", "empty"])
def test_a_file_that_is_no_checkpoint_is_named(command, copy, how):
    spoil(copy / "checkpoints" / "last.ckpt", how)
    before = files(copy)
    refused(command(f"resume={copy}"), str(copy / "checkpoints" / "last.ckpt"), "is damaged, or no checkpoint")
    assert files(copy) == before


def test_a_checkpoint_of_other_settings_is_refused_with_the_keys_that_differ(command, copy):
    before = files(copy)
    ended = command(f"resume={copy}", "loss.beta=500", "lora.rank=4")
    refused(ended, "loss.beta (there 5000.0, here 500.0)", "lora.rank (there 8, here 4)", "resume=")
    assert files(copy) == before


@pytest.mark.parametrize(("what", "named"), [("model", "model weights"), ("data", "pairs")])
def test_a_checkpoint_of_other_weights_or_pairs_is_refused(command, copy, what, named):
    content = checkpoint(copy)
    content["identity"][what] = "0" * 16
    torch.save(content, copy / "checkpoints" / "last.ckpt")
    seal(copy / "checkpoints" / "last.ckpt")
    before = files(copy)
    refused(command(f"resume={copy}"), f"trained with other {named}", "0" * 16)
    assert files(copy) == before


def test_a_loss_that_is_no_number_ends_the_run_before_it_reaches_the_weights(train, command, whole, tmp_path):
    def patch() -> None:
        from dpo_sd.losses import DiffusionDPOLoss

        call, calls = DiffusionDPOLoss.__call__, itertools.count(1)

        def broken(self: Any, policy: Any, *arguments: Any) -> torch.Tensor:
            losses = call(self, policy, *arguments)
            if losses.requires_grad and next(calls) == 6:  # the second micro-batch of update 3
                losses = losses * torch.tensor([1.0, float("nan")])
            return losses

        DiffusionDPOLoss.__call__ = broken  # type: ignore[method-assign]

    folder = tmp_path / "run"
    ended = train(folder, *RANDOM, patch=patch)
    refused(ended, "the loss is not finite at update 3", "on 1 pairs: 'a ")
    assert checkpoint(folder)["global_step"] == 2
    assert all(value.isfinite().all() for value in tensors(checkpoint(folder)).values())
    assert [int(row["step"]) for row in rows(folder)] == [0, 1, 2]
    ended = command(f"resume={folder}")  # without the fault, nothing of it is left
    assert ended.code == 0, ended.err
    assert_same_run(folder, whole)


# judged and watched


def test_a_judge_of_other_sizes_ends_the_run_before_anything_is_drawn(train, tmp_path):
    folder, cache = tmp_path / "run", tmp_path / "cache"
    ended = train(folder, "sampler.height=128", f"cache_dir={cache}", "data.n_pairs=4")
    refused(ended, "oracle: centred cannot judge this run", "64x64 pixels, got 64x128")
    assert files(folder) == {} and not cache.exists()


def test_a_judge_that_cannot_read_the_prompts_ends_the_run_before_anything_is_drawn(train, tmp_path):
    folder, cache = tmp_path / "run", tmp_path / "cache"
    ended = train(folder, "callbacks.verdict.prompts=[a red fox]", f"cache_dir={cache}")
    refused(ended, "oracle: centred cannot judge this run", "'a red fox' names no shape")
    assert files(folder) == {} and not cache.exists()


def test_without_a_judge_the_run_has_no_verdict_and_says_so(train, tmp_path):
    ended = train(tmp_path, "judge=none", "trainer.max_steps=1", "~callbacks.samples")
    assert ended.code == 0, ended.err
    assert "only people can judge" in ended.out
    assert summary(tmp_path)["verdict"] is None


@pytest.mark.parametrize("kind", ["a mistake", "a bug"])
def test_a_judge_that_fails_after_the_training_costs_the_verdict_and_nothing_else(train, run, tmp_path, kind):
    def patch() -> None:
        from dpo_sd.errors import UserError
        from dpo_sd.judges.oracle import Oracle

        def broken(self: Any, images: Any, prompts: Any) -> list[float]:
            raise UserError("the judge is out") if kind == "a mistake" else ZeroDivisionError("in the judge")

        Oracle.properties = broken  # type: ignore[method-assign,assignment]

    ended = train(tmp_path, patch=patch)
    if kind == "a mistake":
        refused(ended, "the judge is out")
    else:
        assert ended.code == 1 and "ZeroDivisionError: in the judge" in ended.err
    assert summary(tmp_path)["verdict"] is None and summary(tmp_path)["metrics"] == summary(run)["metrics"]
    assert files(tmp_path).keys() == files(run).keys()
    assert ended.out.splitlines()[-1].startswith("lora ")


MINE = """
from dpo_sd.callbacks.watcher import Run, Watcher

class Count(Watcher):
    def __init__(self, start: int = 0):
        self.updates = start

    def promise(self, run: Run) -> str:
        return f"count   from {self.updates}"

    def on_update(self, run: Run) -> None:
        self.updates += 1
        assert run.step == len(list((run.folder / "metrics.csv").open())) - 2
        assert not run.is_last or "val/loss" in run.metrics

    def summary(self):
        return {"counted": self.updates}

    def report(self) -> str:
        return f"{self.updates} updates were counted."
"""


def test_a_watcher_of_the_users_own_is_told_of_every_update_and_adds_to_the_summary(command, small, tmp_path):
    own = tmp_path / "own"
    (own / "callbacks").mkdir(parents=True)
    (own / "own_watchers.py").write_text(MINE)
    (own / "callbacks" / "count.yaml").write_text("count:\n  _target_: own_watchers.Count\n")
    callbacks = ("callbacks=[count,checkpoint]", "callbacks.count.start=10")
    settings = [each for each in small(tmp_path / "run") if not each.startswith(("callbacks.samples", "callbacks.ver"))]
    ended = command("--config-dir", str(own), *settings, *callbacks, "hardware.micro_batch=2")
    assert ended.code == 0, ended.err
    assert "count   from 10" in ended.out and "16 updates were counted." in ended.out
    assert list(summary(tmp_path / "run"))[-2:] == ["verdict", "counted"]
    assert summary(tmp_path / "run")["counted"] == 16


def disk_full_at_the_second_checkpoint() -> None:
    """Ends the space in the middle of a file, as the kernel does."""
    save, calls = torch.save, itertools.count(1)

    def limited(content: Any, file: Any) -> None:
        if next(calls) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
        save(content, file)

    torch.save = limited


def sync_fails_at_the_second_checkpoint() -> None:
    save, sync, calls = torch.save, os.fsync, itertools.count(1)

    def counted(content: Any, file: Any) -> None:
        next(calls)
        save(content, file)

    def failing(number: int) -> None:
        if repr(calls) == "count(3)":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(number)

    torch.save, os.fsync = counted, failing


@pytest.mark.parametrize("patch", [disk_full_at_the_second_checkpoint, sync_fails_at_the_second_checkpoint])
def test_a_checkpoint_that_finds_no_room_leaves_the_one_before_whole(train, command, whole, tmp_path, patch):
    folder = tmp_path / "run"
    ended = train(folder, *RANDOM, patch=patch)
    refused(ended, "step=000004.ckpt cannot be written", "the checkpoints before it are whole")
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["last.ckpt", "step=000002.ckpt"]
    ended = command(f"resume={folder}")  # after making room
    assert ended.code == 0, ended.err
    assert_same_run(folder, whole)


def test_an_output_folder_that_cannot_be_written_is_named(train, tmp_path):
    (tmp_path / "file").write_text("")
    refused(train(tmp_path / "file" / "run"), str(tmp_path / "file"))


def foreign_lora(file: Path, kind: str) -> None:
    """A file for lora.init_from that cannot be used."""
    file.parent.mkdir(exist_ok=True)
    if kind == "corrupt":
        file.write_bytes(b"\x40" * 500)
    elif kind == "a pickle":
        torch.save({"weight": torch.zeros(1)}, file)
    elif kind == "of another base":
        block = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
        save_file({f"{block}.lora_A.weight": torch.zeros(4, 768), f"{block}.lora_B.weight": torch.zeros(320, 4)}, file)


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("missing", "style.safetensors", "does not exist"),
        ("corrupt", "style.safetensors", "corrupt"),
        ("a pickle", "style.pt", "is a pickle"),
        ("of another base", "style.safetensors", "was made for another base"),
    ],
)
def test_a_lora_that_cannot_be_the_start_is_refused_before_anything_is_written(train, tmp_path, kind, name, said):
    file, folder = tmp_path / "loras" / name, tmp_path / "run"
    foreign_lora(file, kind)
    refused(train(folder, f"lora.init_from={file}"), str(file), said)
    assert files(folder) == {}


def test_target_modules_that_match_nothing_are_refused_before_anything_is_written(train, tmp_path):
    refused(train(tmp_path / "run", "lora.target_modules=[to_qq]"), "'to_qq' matches no module", "nearest: to_q")
    assert files(tmp_path / "run") == {}


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("hardware=1x8gb", ["hardware=1x8gb needs a CUDA GPU", "use hardware=cpu"]),
        ("lora.init_from=nowhere.safetensors", ["nowhere.safetensors does not exist"]),
    ],
)
def test_a_mistake_is_answered_in_seconds(tmp_path, mistake, said):
    folder = tmp_path / "run"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = started(
        mistake, "pairs_per_update=16", f"hydra.run.dir={folder}", stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    _, err = process.communicate(timeout=500)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert process.returncode == 1
    assert err.startswith("error: ") and not [words for words in said if words not in err], err
    assert files(folder) == {}
    # of the processor, since another test may keep it busy
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10


def test_a_sweep_ends_in_one_table(small, command, tmp_path):
    arguments = small(tmp_path / "unused", "~callbacks.samples", "trainer.max_steps=2")
    ended = command("-m", *arguments, "loss.beta=500,2000", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert ended.code == 0, ended.err
    table = [line for line in ended.out.splitlines() if line.startswith("|")]
    assert len(table) == 4
    assert "loss.beta=500" in table[2] and "loss.beta=2000" in table[3]
    assert all("n=4 (oracle" in line for line in table[2:])
    assert {"sweep.csv", "sweep.md", "0/summary.json", "1/summary.json"} <= files(tmp_path / "sweep").keys()
