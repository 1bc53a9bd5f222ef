"""Whole commands on a card that is pretended: nothing mixes its places, and few tensors travel.

A training has a budget of trips to the card for each network; Lightning's own, which brings what the step needs, is not
among them. The first one draws its pairs, which others find in the cache.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_sd.lora.attaching import LoRA
from dpo_sd.models.base import Base

HERE = Path(__file__).parent
SMALL = (
    "hardware=1x24gb",
    "hardware.num_workers=0",
    "hardware.micro_batch=2",
    "pairs_per_update=4",
    "data.n_validation=2",
    "trainer.validate_every=100",
    "sampler.steps=1",
    "callbacks.samples.n_prompts=2",
    "callbacks.verdict.n_prompts=2",
)
PAIRS = ("data.n_pairs=8",)
QUIET = ("~callbacks.samples", "~callbacks.verdict")
SDXL = ("model=sdxl", "model.path={sdxl}")
NF4 = (*SDXL, "hardware.weights=nf4", "optimizer=adamw8bit")
HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
# words beside those of every training, and trips of text encoders, VAE and UNet: two for the parts of the data that are
# drawn, two (the VAE four, for both sides of the pairs) for their encoding, three for two sheets and the verdict
TRAININGS: dict[str, tuple[tuple[str, ...], tuple[int, int, int]]] = {
    "bf16": ((*PAIRS, *QUIET, "trainer.max_steps=2"), (4, 6, 2)),
    "six": ((*PAIRS, *QUIET, "trainer.max_steps=6"), (2, 4, 0)),
    "16-mixed": (
        (*PAIRS, *QUIET, "hardware.precision=16-mixed", "hardware.weights=float16", "trainer.max_steps=2"),
        (4, 6, 2),
    ),
    "int8": ((*PAIRS, *QUIET, *SDXL, "hardware.weights=int8", "trainer.max_steps=1"), (4, 6, 2)),
    "nf4": ((*PAIRS, *QUIET, *NF4, "trainer.max_steps=1"), (4, 6, 2)),
    "text": ((*PAIRS, "lora.text_encoder=true", "cache=latents", "trainer.max_steps=1"), (0, 7, 0)),
    "off": (
        ("data=renders", "loss=sft", "cache=off", "data.n_pictures=8", *QUIET[1:], "trainer.max_steps=1"),
        (0, 2, 0),
    ),
    "cached": ((*PAIRS, *QUIET, "loss.reference=cached", "loss.draws_per_pair=2", "trainer.max_steps=2"), (2, 4, 0)),
}
LEARNING = [
    pytest.param(name, marks=pytest.mark.skipif("nf4" in name and not HAS_BITSANDBYTES, reason="needs bitsandbytes"))
    for name in TRAININGS
]
GENERATE = ("hardware=1x24gb", "prompts=[a star,a circle]", "num_sets=2", "sampler.steps=1", "sampler.batch_size=2")


@pytest.fixture(scope="session")
def ended(twin: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """How each command ended: `code`, `said`, and `copies` and `waits` by the functions that asked for them."""
    folder = tmp_path_factory.mktemp("pretend_card")
    device, torch_folder = _built(folder), Path(torch.__file__).parent
    commands = {"generate": ["generate", *GENERATE, f"out={folder / 'pairs'}"]}
    for name, (words, _) in TRAININGS.items():
        if name == "nf4" and not HAS_BITSANDBYTES:
            continue
        own = [word.format(sdxl=twin("sdxl")) for word in words]
        commands[name] = ["train", *SMALL, f"cache_dir={folder / 'cache'}", f"hydra.run.dir={folder / name}", *own]
    commands["resume"] = ["train", f"resume={folder / 'bf16'}", "trainer.max_steps=3"]
    (folder / "commands.json").write_text(json.dumps(commands))
    environment = {
        "LD_PRELOAD": str(device),  # before torch asks for the first time whether there is a card
        "LD_LIBRARY_PATH": str(torch_folder / "lib"),
        "PYTHONPATH": str(HERE.parent),
        "OMP_NUM_THREADS": "1",
    }
    run = [sys.executable, HERE / "pretend_card" / "run.py", folder]
    subprocess.run(run, cwd=folder, env=os.environ | environment, check=True, timeout=1200)
    return {
        name: json.loads((folder / f"{name}.json").read_text()) | {"said": (folder / f"{name}.txt").read_text()}
        for name in commands
    }


def _built(folder: Path) -> Path:
    """The library that tells torch of the card."""
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None or sys.platform != "linux":
        pytest.skip("a card is pretended on Linux with a C++ compiler only")
    if torch.version.cuda is not None:
        pytest.skip("this torch has a CUDA of its own")
    there, library = Path(torch.__file__).parent, folder / "device.so"
    headers = [f"-I{there / 'include'}", f"-I{there / 'include' / 'torch' / 'csrc' / 'api' / 'include'}"]
    linked = [f"-L{there / 'lib'}", "-lc10", "-ltorch_cpu"]
    source = HERE / "pretend_card" / "device.cpp"
    subprocess.run([compiler, "-std=c++20", "-fPIC", "-shared", *headers, source, "-o", library, *linked], check=True)
    return library


def tensors(network: torch.nn.Module) -> int:
    return len([*network.parameters(), *network.buffers()])


def brought(copies: dict[str, int]) -> int:
    return copies["to card: models/stable_diffusion.py _placed"]


@pytest.mark.parametrize("name", ["generate", *LEARNING, "resume"])
def test_a_command_ends_well_on_a_card_that_refuses_mixed_places(ended, name):
    assert ended[name]["code"] == 0, ended[name]["said"]


def test_generate_brings_each_weight_to_the_card_once(ended):
    model = Base().load()
    assert brought(ended["generate"]["copies"]) == sum(map(tensors, (model.unet, model.vae, *model.text_encoders)))


@pytest.mark.parametrize("name", LEARNING)
def test_a_training_keeps_to_its_budget_of_trips_to_the_card(ended, twin, name):
    model = Base("sdxl", str(twin("sdxl"))).load(name) if name in ("int8", "nf4") else Base().load()
    LoRA().attach(model)
    text, vae, unet = TRAININGS[name][1]
    budget = text * sum(map(tensors, model.text_encoders)) + vae * tensors(model.vae) + unet * tensors(model.unet)
    assert brought(ended[name]["copies"]) == budget


def test_an_update_makes_the_host_wait_six_times_at_most(ended):
    """By what four further updates add to a run: its sheets, its verdict and its validations are as many."""

    def waited(name: str) -> int:
        to_host = {asking: n for asking, n in ended[name]["copies"].items() if asking.startswith("to host: ")}
        updating = ("callbacks/health", "callbacks/metrics", "training/", "train.py")
        counted = [*ended[name]["waits"].items(), *to_host.items()]
        return sum(n for asking, n in counted if asking.removeprefix("to host: ").startswith(updating))

    assert 0 < (waited("six") - waited("bf16")) / 4 <= 6
