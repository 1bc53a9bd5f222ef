"""Whole trainings on what people have: every family and layout, mixed sizes, caches, and a kept reference."""

from __future__ import annotations

import csv
import importlib
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from conftest import Ended
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from PIL import Image
from safetensors.torch import load_file
from small_model import make_model

from dpo_sd.composition.schema import CONF_DIR
from dpo_sd.data.cache import Cache

SIZES = [(64, 64), (110, 64), (64, 110), (64, 64), (100, 60)]
BRIEF = (
    "data=pairs",
    "pairs_per_update=4",
    "hardware.micro_batch=4",
    "lora.rank=2",
    "optimizer.lr=1e-3",
    "optimizer.eps=1e-3",  # so that rounding is not blown up by the square root of a small number
    "trainer.max_steps=6",
    "trainer.validate_every=3",
    "callbacks.checkpoint.every=2",
    "sampler.steps=2",
    "callbacks.samples.n_prompts=1",
)
UNWATCHED = ("~callbacks.samples", "~callbacks.verdict")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """Ten pairs on five prompts, in sizes of which a pair may have two."""
    folder, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    rows = []
    for i in range(10):
        for k in range(2):
            coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            coarse.resize(SIZES[(i + k * (i == 4)) % 5], Image.Resampling.BICUBIC).save(folder / f"{i}-{k}.png")
        row = {"prompt": f"prompt {i % 5}", "image_0": f"{i}-0.png", "image_1": f"{i}-1.png"}
        rows.append(row | {"prefer_0": i % 3 > 0, "prefer_1": i % 3 == 0})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def arguments(pairs, tmp_path_factory) -> Callable[..., list[str]]:
    """`arguments(folder, *overrides)`: of a training on the pairs; all share a cache unless they name another."""
    cache = tmp_path_factory.mktemp("cache")

    def arguments(folder: Path, *overrides: str) -> list[str]:
        shared = [] if any(each.startswith("cache_dir=") for each in overrides) else [f"cache_dir={cache}"]
        return [*BRIEF, f"data.pairs={pairs}", f"hydra.run.dir={folder}", *shared, *overrides]

    return arguments


@pytest.fixture(scope="module")
def go(command, arguments) -> Callable[..., Ended]:
    """`go(folder, *overrides)`: that training, in a forked process."""

    def go(folder: Path, *overrides: str, **options: Any) -> Ended:
        return command(*arguments(folder, *overrides), **options)

    return go


def done(ended: Ended) -> str:
    assert ended.code == 0, ended.err
    return ended.out


def policy(run: Path) -> torch.Tensor:
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["adapters"]["policy"]
    return torch.cat([tensor.flatten() for tensor in state.values()])


def assert_close(run: Path, other: Path, tolerance: float = 1e-4) -> None:
    """The same weights and metrics but for rounding."""
    one, two = policy(run), policy(other)
    assert torch.linalg.norm(one - two) < tolerance * torch.linalg.norm(two)
    columns = []
    for folder in (run, other):
        with (folder / "metrics.csv").open(newline="") as file:
            columns.append([float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]])
    assert columns[0] == pytest.approx(columns[1], rel=1e-3, abs=1e-5)


# ------------------------------------------------------------------------------------------------------------- families


@pytest.mark.parametrize("family", ["sdxl", "sd21"])
def test_the_twin_of_a_family_trains_from_its_folder_to_a_lora_and_pictures(go, twin, tmp_path, family):
    out = done(go(tmp_path / "run", f"model={family}", f"model.path={twin(family)}", "lora=transformer"))
    assert "only people can judge" in out and "training sizes: " in out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text("utf-8"))
    assert summary["steps"] == 6 and math.isfinite(summary["metrics"]["val/loss"])
    assert policy(tmp_path / "run").isfinite().all()
    files = {file.name: load_file(file) for file in (tmp_path / "run" / "lora").iterdir()}
    names = ("pytorch_lora_weights", "train", "train-000004", "train-000006")
    assert set(files) == {f"{name}.safetensors" for name in names}
    assert all(tensors for tensors in files.values())
    assert Image.open(tmp_path / "run" / "samples" / "step=000006.png").width > 64


@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_a_single_file_trains_to_the_weights_that_its_folder_trains_to(go, single_file, tmp_path, family):
    single = single_file(family)
    file = (f"model.path={single.file}", f"model.config={single.config}")
    done(go(tmp_path / "file", f"model={family}", *file, *UNWATCHED))
    done(go(tmp_path / "folder", f"model={family}", f"model.path={single.folder}", *UNWATCHED))
    assert torch.equal(policy(tmp_path / "file"), policy(tmp_path / "folder"))


def test_the_text_encoders_of_sdxl_train_too(go, twin, tmp_path):
    sdxl = ("model=sdxl", f"model.path={twin('sdxl')}", "lora.text_encoder=true")
    refused = go(tmp_path / "refused", *sdxl)
    assert refused.code == 1 and "add cache=latents" in refused.err
    done(go(tmp_path / "run", *sdxl, "cache=latents", *UNWATCHED))
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["adapters"]["policy"]
    for network in ("unet", "text_encoder", "text_encoder_2"):
        grown = [value for name, value in state.items() if name.startswith(f"{network}.") and "lora_B" in name]
        # of both encoders SDXL reads the last layer but one
        assert sum(bool(value.any()) for value in grown) >= len(grown) / 2 > 0


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_text_encoder_trains_on_pictures_of_the_shapes_world(command, tmp_path, precision):
    brief = (*BRIEF[1:], "loss=sft", "data=renders", "data.n_pictures=8", "data.n_validation=4")
    text = ("lora.text_encoder=true", "cache=latents", f"hardware.precision={precision}", "trainer.max_steps=2")
    done(command(*brief, *text, f"hydra.run.dir={tmp_path}", "~callbacks.verdict"))
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["adapters"]["policy"]
    grown = [value for name, value in state.items() if name.startswith("text_encoder.") and "lora_B" in name]
    assert grown and all(value.any() and value.dtype == torch.float32 for value in grown)


def test_two_processes_train_the_text_encoders_of_sdxl_as_one_does(go, arguments, twin, tmp_path):
    """Each waits for the gradients of all that is trained, and none comes to a layer that SDXL does not read.

    Dropout of a micro-batch is the same on whichever device it is trained.
    """
    text = ("model=sdxl", f"model.path={twin('sdxl')}", "lora.text_encoder=true", "cache=latents")
    micro = ("hardware.micro_batch=2", "lora.dropout=0.3")
    settings = (
        *text,
        *UNWATCHED,
        *micro,
        "trainer.max_steps=2",
    )  # it is the second update that would find some missing
    done(go(tmp_path / "one", *settings))
    two = arguments(tmp_path / "two", *settings, "trainer=ddp")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "dpo_sd.train", *two]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr
    assert_close(tmp_path / "two", tmp_path / "one")


# --------------------------------------------------------------------------------------------------------------- caches


@pytest.fixture(scope="module")
def plain(go, tmp_path_factory) -> Path:
    """A run with everything in the cache."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    done(go(folder, *UNWATCHED, "framing.flip=true", "data.caption_dropout=0.3"))
    return folder


@pytest.mark.parametrize("keep", ["latents", "off"])
def test_a_run_learns_the_same_whatever_the_cache_keeps(go, plain, tmp_path, keep):
    done(go(tmp_path / "run", *UNWATCHED, "framing.flip=true", "data.caption_dropout=0.3", f"cache={keep}"))
    assert_close(tmp_path / "run", plain, tolerance=1e-3)


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_pictures_of_mixed_sizes_learn_the_same_in_every_micro_batch(go, plain, tmp_path, micro_batch):
    settings = ("framing.flip=true", "data.caption_dropout=0.3", f"hardware.micro_batch={micro_batch}")
    done(go(tmp_path / "run", *UNWATCHED, *settings))
    assert_close(tmp_path / "run", plain)


def test_random_crops_train_without_a_cache(go, tmp_path):
    out = go(tmp_path / "refused", "framing.random_crop=true")
    assert out.code == 1 and "add cache=off" in out.err
    done(go(tmp_path / "run", *UNWATCHED, "framing.random_crop=true", "cache=off", "trainer.max_steps=2"))


# ---------------------------------------------------------------------------------------------------- a kept reference

DRAWS = ("loss.draws_per_pair=2", "framing.flip=true", "hardware.micro_batch=2", *UNWATCHED)
KEPT = ("loss.reference=cached", *DRAWS)


def read_of(out: str) -> tuple[int, int]:
    """How many of how many errors were read."""
    (line,) = [line for line in out.splitlines() if "were read and not computed" in line]
    words = line.split()
    return int(words[1]), int(words[3])


def test_a_kept_reference_gives_the_weights_of_a_live_one_and_is_read_by_later_runs(go, tmp_path):
    """24 visits of 9 pairs with two draws: at most 18 are computed."""
    cache = f"cache_dir={tmp_path / 'cache'}"
    done(go(tmp_path / "live", *DRAWS, cache))
    out = done(go(tmp_path / "kept", *KEPT, cache))
    assert "0% of the reference's errors are known" in out
    hits, asked = read_of(out)
    assert asked == 24 and hits >= 24 - 18
    assert_close(tmp_path / "kept", tmp_path / "live")
    again = done(go(tmp_path / "again", *KEPT, cache))
    assert read_of(again) == (24, 24)
    assert_close(tmp_path / "again", tmp_path / "live")


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ("seed=1", False),
        ("hardware.precision=bf16-mixed", False),
        ("hardware.compile=true", False),
        ("loss.min_snr_gamma=5", False),
        ("loss.huber_c=0.1", False),
        ("noising.offset=0.1", False),
        ("framing.flip=true", False),
        ("framing.resolution=96", False),
        ("data.caption_dropout=0.5", False),
        ("cache=off", False),
        ("loss.beta=1", True),
        ("optimizer.lr=1", True),
        ("hardware.micro_batch=2", True),
        ("lora.rank=4", True),
    ],
)
def test_errors_are_kept_apart_by_whatever_decides_them(monkeypatch, tmp_path, change, same):
    from dpo_sd import train

    monkeypatch.setattr(train, "say", lambda text: None)
    model, data = make_model(), cast(Any, SimpleNamespace(train=SimpleNamespace(contents=np.arange(3), vary=None)))

    def folder(*overrides: str) -> Path:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            cfg = compose("train", ["loss.reference=cached", "loss.draws_per_pair=2", *overrides])
        unasked: dict[str, Any] = dict.fromkeys(train.Parts._fields)
        parts = {"hardware": instantiate(cfg.hardware), "loss": instantiate(cfg.loss)}
        parts |= {"cache": Cache(tmp_path, cfg.cache), "source": instantiate(cfg.data)}
        parts |= {"noising": instantiate(cfg.noising), "framing": instantiate(cfg.framing)}
        kept = train.reference_cache(cfg, train.Parts(**(unasked | parts)), model, data, 0, False)
        assert kept is not None and kept.file is not None
        return kept.file.parent

    assert (folder() == folder(change)) == same


def test_errors_of_another_reference_or_seed_are_not_read(go, plain, tmp_path):
    cache = f"cache_dir={tmp_path / 'cache'}"
    for number, change in enumerate(([], [f"lora.init_from={plain}"], ["seed=1"])):
        out = done(go(tmp_path / str(number), *KEPT, cache, *change, "trainer.max_steps=3"))
        others = (
            f"; {number} kept of another base, reference, seed, precision, noise or framing: not read"
            if number
            else "\n"
        )
        assert f"0% of the reference's errors are known from earlier runs{others}" in out


def die_at_step(number: int) -> Callable[[], None]:
    def patch() -> None:
        module: Any = importlib.import_module("dpo_sd.training.step").DiffusionModule
        step, calls = module.training_step, itertools.count(1)

        def watched(*args: Any) -> Any:
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*args)

        module.training_step = watched

    return patch


@pytest.fixture(scope="module")
def whole(go, tmp_path_factory) -> Path:
    """A run that nobody interrupts while it fills its cache."""
    folder = tmp_path_factory.mktemp("whole")
    done(go(folder / "run", *KEPT, "lora.dropout=0.2", f"cache_dir={folder / 'cache'}"))
    return folder / "run"


@pytest.mark.parametrize("moment", [7, 11])
def test_a_run_killed_while_it_fills_the_cache_continues_to_the_same_bits(go, command, whole, tmp_path, moment):
    """Of twelve micro-steps; the tenth is the first with a draw that comes again."""
    folder = tmp_path / "run"
    settings = (*KEPT, "lora.dropout=0.2", f"cache_dir={tmp_path / 'cache'}")
    ended = go(folder, *settings, patch=die_at_step(moment))
    assert ended.code == -signal.SIGKILL, ended.err
    done(command(f"resume={folder}"))
    assert torch.equal(policy(folder), policy(whole))
    assert (folder / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()


def test_pairs_of_the_shapes_world_that_are_judged_otherwise_do_not_read_each_others_errors(train, tmp_path):
    """They are the same samples, with chosen and rejected in each other's place."""
    kept = ("loss.reference=cached", "loss.draws_per_pair=2", f"cache_dir={tmp_path / 'cache'}", *UNWATCHED)
    for rate in (0, 1):
        out = done(train(tmp_path / str(rate), *kept, f"data.flip_rate={rate}", "trainer.max_steps=2"))
        assert "0% of the reference's errors are known" in out
