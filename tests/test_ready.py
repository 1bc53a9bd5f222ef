"""A model that is ready works on its device, whichever command it is for; and families are told apart in one place."""

from __future__ import annotations

import ast
import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import Ended, run_forked
from stand_in import CARD, Card
from test_architecture import MODULES

from dpo_sd.data.drawn import encode_images
from dpo_sd.evaluation.drawing import draw_sides
from dpo_sd.forecast.workload import Workload
from dpo_sd.lora.attaching import LoRA
from dpo_sd.losses import DiffusionDPOLoss
from dpo_sd.models import stable_diffusion
from dpo_sd.models.base import Base
from dpo_sd.models.families import FAMILIES, NETWORKS, FamilyName
from dpo_sd.models.ready import ready
from dpo_sd.models.sampling import Sampler
from dpo_sd.models.skeletons import RandomWeights
from dpo_sd.training.hardware import Hardware
from dpo_sd.training.optimizers import AdamW

NETWORK_TYPES = ("UNet2DConditionModel", "CLIPTextModel", "Encoder", "Decoder")  # the last two are the VAE's


@pytest.fixture(autouse=True)
def no_cuda(monkeypatch) -> None:
    """The stand-in is no device that CUDA knows; its memory has no end."""
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(stable_diffusion, "free_memory", lambda device: math.inf)


# ------------------------------------------------------------------------------------------------------------- the road


@pytest.mark.parametrize("base", [Base(), RandomWeights("tiny")], ids=["loaded", "random"])
def test_networks_lie_on_the_cpu_and_work_on_the_device(base):
    with Card() as card:
        model = ready(base, CARD)
        places = {str(next(network.parameters()).device) for network in (model.vae, *model.networks.values())}
        (image,) = Sampler(steps=1).draw(model, ["a star"], [1]) if isinstance(base, Base) else [None]
        model.encode_prompts(["a star"])
        if image is not None:
            encode_images(model, [image])
    assert torch.device(model.device) == CARD and places == {"cpu"}
    worked = {name: set(card.passes[name]) for name in NETWORK_TYPES if name in card.passes}
    assert "CLIPTextModel" in worked and all(where == {str(CARD)} for where in worked.values())
    assert len(worked) == (4 if image is not None else 1)


def test_the_device_changes_no_image():
    images = []
    with Card():
        for device in (CARD, "cpu"):
            images += Sampler(steps=2).draw(ready(Base(), device), ["a star"], [1])
    assert images[0].tobytes() == images[1].tobytes()


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("base", [Base, lambda: RandomWeights("tiny")], ids=["loaded", "random"])
def test_precision_and_checkpointing_are_as_asked_for(base, weights):
    model = ready(base(), "cpu", weights, gradient_checkpointing=True)
    kinds = {parameter.dtype for name, parameter in model.unet.named_parameters() if "to_q.weight" in name}
    assert kinds == {getattr(torch, weights)}
    assert model.unet.conv_in.weight.dtype == (torch.float32 if weights == "float32" else torch.bfloat16)
    assert {network.dtype for network in (model.vae, *model.text_encoders)} == {torch.float32}
    assert model.unet.is_gradient_checkpointing
    assert not any(p.requires_grad for network in model.networks.values() for p in network.parameters())


def test_what_there_is_to_note_is_said_once(tmp_path, twin):
    lines: list[str] = []
    ready(Base("sd21", str(twin("sd21")), variant="fp16"), "cpu", say=lines.append)
    assert len(lines) == 3 and all(line.startswith("model   ") and "no variant fp16" in line for line in lines)
    assert len(set(lines)) == 3


# --------------------------------------------------------------------------------------------------------- the commands


def on_the_card(program: str, folder: Path, *arguments: str, until: Any = None) -> tuple[Ended, dict[str, Any]]:
    """A command whose hardware names the stand-in: how it ended, and what the card saw."""

    def work() -> None:
        import lightning

        Hardware.check = lambda *_, **__: None  # type: ignore[method-assign]
        Hardware.device = CARD  # type: ignore[method-assign]  # for `hardware=cpu` too, which Lightning can train on
        if until is not None:
            setattr(lightning.Trainer, until, lambda *_, **__: sys.exit())
        sys.argv = [program, *arguments]
        with Card() as card:
            try:
                importlib.import_module(f"dpo_sd.{program}").main()
            finally:
                seen = {"passes": {name: sorted(set(card.passes[name])) for name in NETWORK_TYPES}, "moves": card.moves}
                (folder / "seen.json").write_text(json.dumps(seen))

    ended = run_forked(work, folder)
    return ended, json.loads((folder / "seen.json").read_text())


def went(seen: dict[str, Any]) -> list[str]:
    """The networks that were brought to the card from elsewhere, in turn."""
    there: set[str] = set()
    names = []
    for name, place in seen["moves"]:
        if place == "cpu":
            there.discard(name)
        elif name not in there and name in ("UNet2DConditionModel", "CLIPTextModel", "AutoencoderKL"):
            there.add(name)
            names.append(name)
    return names


def test_generate_brings_each_network_to_the_card_once(tmp_path):
    single = ("hardware.weights=float32", "hardware.precision=32-true")  # autocast would ask CUDA
    settings = ("prompts=[a star,a circle]", "sampler.steps=1", "sampler.batch_size=1", f"out={tmp_path / 'pairs'}")
    ended, seen = on_the_card("generate", tmp_path, "hardware=1x24gb", *single, *settings)
    assert ended.code == 0, ended.err
    drawing = [name for name in NETWORK_TYPES if name != "Encoder"]
    assert {name: seen["passes"][name] for name in drawing} == {name: [str(CARD)] for name in drawing}
    assert went(seen) == ["CLIPTextModel", "UNet2DConditionModel", "AutoencoderKL"]
    assert len(list((tmp_path / "pairs").rglob("*.png"))) == 4


def test_where_memory_is_short_unet_and_vae_take_turns(tmp_path, monkeypatch):
    monkeypatch.setattr(stable_diffusion, "free_memory", lambda device: 0)
    single = ("hardware.weights=float32", "hardware.precision=32-true")
    settings = ("prompts=[a star,a circle]", "sampler.steps=1", "sampler.batch_size=2", f"out={tmp_path / 'pairs'}")
    ended, seen = on_the_card("generate", tmp_path, "hardware=1x24gb", *single, *settings)
    assert ended.code == 0, ended.err
    assert went(seen) == ["CLIPTextModel", *("UNet2DConditionModel", "AutoencoderKL") * 2, "UNet2DConditionModel"]


@pytest.mark.parametrize(
    ("data", "works"),
    [
        (("data=shapes", "data.n_pairs=2", "sampler.steps=1"), {"CLIPTextModel", "UNet2DConditionModel", "Decoder"}),
        (("data=renders", "data.n_pictures=2", "loss=sft"), {"CLIPTextModel", "Encoder"}),
    ],
    ids=["shapes", "renders"],
)
def test_train_draws_and_encodes_on_the_card(tmp_path, data, works):
    """Up to the first update, to which Lightning brings the networks."""
    folders = (f"cache_dir={tmp_path / 'cache'}", f"hydra.run.dir={tmp_path / 'run'}")
    few = ("data.n_validation=2", "pairs_per_update=2", "hardware.micro_batch=2")
    ended, seen = on_the_card("train", tmp_path, *data, *few, *folders, until="fit")
    worked = {name: where for name, where in seen["passes"].items() if where}
    assert set(worked) >= works, ended.err
    assert all(where == [str(CARD)] for where in worked.values())


def test_sides_are_drawn_from_prompts_that_were_encoded_before_and_each_network_comes_once():
    with Card() as card:
        model = ready(Base(), CARD)
        LoRA(rank=2, text_encoder=True).attach(model)
        with model.working(model.unet):  # as training has it
            draw_sides(("base", "policy"), model, Sampler(steps=1, batch_size=1), ["a star", "a circle"], [1, 2])
        assert went({"moves": card.moves}) == ["UNet2DConditionModel", "CLIPTextModel", "AutoencoderKL"]
        assert len(card.passes["CLIPTextModel"]) == 4  # prompts and the negative one, for both sides
        LoRA(rank=2).attach(plain := ready(Base(), CARD))
        draw_sides(("base", "policy"), plain, Sampler(steps=1), ["a star", "a circle"], [1, 2])
        assert len(card.passes["CLIPTextModel"]) == 6  # the same for both


def test_plan_and_benchmark_build_their_model_for_the_device_they_name():
    parts = (LoRA(rank=2), DiffusionDPOLoss(), AdamW(), Hardware(), Sampler())
    with Card():
        model = Workload("tiny", *parts, resolution=64).build(CARD)
        model.encode_prompts(["a star"])  # which would mix places if they were not the device's
    assert torch.device(model.device) == CARD


def test_nobody_loads_a_base_past_that_road():
    """Except `export`, which says a base's notes once and loads it again for comparison, on the CPU."""
    loading = {
        name
        for name, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load"
        if ast.unparse(node.func.value).split("(")[0].split(".")[-1] in ("base", "Base", "RandomWeights")
    }
    assert loading == {"models.ready", "models.skeletons", "export"}


# --------------------------------------------------------------------------------------------------------- the families


def test_families_are_named_in_one_module_and_where_they_are_measured():
    names = set(get_args(FamilyName))
    knowing = {
        name
        for name, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in names
    }
    assert knowing == {"models.families", "models.hub", "benchmark"}  # hub has the table of repositories
    benchmark = [node for node in ast.walk(MODULES["benchmark"]) if isinstance(node, ast.Compare)]
    assert not [node for node in benchmark if any(ast.unparse(part).strip("'") in names for part in node.comparators)]


def test_every_option_of_the_group_is_a_family_and_the_names_of_networks_are_theirs():
    assert tuple(FAMILIES) == get_args(FamilyName)
    assert NETWORKS == ("unet", "text_encoder", "text_encoder_2")
    assert [name for name, family in FAMILIES.items() if family.repository is None] == ["tiny"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_says_what_its_networks_say(name):
    family = FAMILIES[name]
    unet = family.settings("unet")
    assert unet["cross_attention_dim"] == family.width
    assert unet.get("addition_embed_type") == family.addition
    assert family.pooled == any(encoder.pooled for encoder in family.encoders.values())
    assert sum(family.settings(encoder)["hidden_size"] for encoder in family.encoders) == family.width


def test_of_the_first_encoder_of_sdxl_the_last_layer_is_read_by_nothing():
    """And of no other encoder: a gradient of its embeddings reaches all layers that are not named."""
    for name in FAMILIES:
        model = ready(RandomWeights(name), "meta")
        for network, encoder in list(model.networks.items())[1:]:
            layers: int = encoder.config.num_hidden_layers  # type: ignore[union-attr,assignment]
            unread = [n for n in range(layers) if model.unread(network, f"encoder.layers.{n}.self_attn.q_proj.lora_A")]
            assert unread == ([layers - 1] if (name, network) == ("sdxl", "text_encoder") else [])
