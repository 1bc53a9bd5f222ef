"""The parts of the base: latents, prompts, and files of every family and layout."""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import run_forked
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import CLIPTextConfig, CLIPTokenizer
from twins import SingleFile, make_folder

from dpo_sd.data.drawn import encode_images
from dpo_sd.errors import UserError
from dpo_sd.forecast.truncation import truncation_line
from dpo_sd.lora.attaching import LoRA
from dpo_sd.models.base import Base
from dpo_sd.models.families import FAMILIES, TINY, FamilyName
from dpo_sd.models.files import WeightFiles
from dpo_sd.models.loading import Reader
from dpo_sd.models.skeletons import on_meta
from dpo_sd.models.stable_diffusion import StableDiffusion, TextEmbeds, encode_bytes

PROMPTS = ["a small red circle on a blue background", "", "star", "Ünïcödé 漢字 🔴 مرحبا"]
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
REAL: list[FamilyName] = ["sd15", "sd21", "sdxl"]


@pytest.fixture(autouse=True)
def memory(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("DPO_SD_CACHE", str(tmp_path_factory.getbasetemp() / "memory"))


@pytest.fixture(scope="module")
def model() -> StableDiffusion:
    return Base().load()


def make_pictures(n: int = 3) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(n)]


def same_weights(one: Any, other: Any) -> bool:
    mine, its = one.state_dict(), other.state_dict()
    return mine.keys() == its.keys() and all(torch.equal(mine[name], its[name]) for name in mine)


def test_every_part_is_frozen_and_in_evaluation_mode(model):
    for part in (model.unet, model.vae, *model.text_encoders):
        assert not any(parameter.requires_grad for parameter in part.parameters())
        assert not any(module.training for module in part.modules())


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "float16"])
def test_the_precision_asked_for_is_the_unets_alone(weights):
    model = Base().load(weights)
    assert model.unet.dtype == getattr(torch, weights)
    assert model.vae.dtype == model.text_encoders[0].dtype == torch.float32


def test_sizes_are_those_of_the_pictures(model):
    assert (model.latent_size, model.resolution, model.factor) == (8, 64, 8)


def test_networks_come_back_to_where_they_were_after_an_exception_too(model):
    moves: list[Any] = []
    network: Any = SimpleNamespace(parameters=lambda: iter([torch.zeros(1)]), to=moves.append)
    elsewhere = replace(model, device="meta")
    with pytest.raises(RuntimeError, match="out of memory"), elsewhere.working(network):
        assert moves == ["meta"]
        raise RuntimeError("out of memory")
    assert moves == ["meta", torch.device("cpu")]


# --------------------------------------------------------------------------------------------------------------- latent


def test_a_latent_is_the_scaled_mean_of_the_posterior(model):
    pictures = make_pictures(2)
    pixels = torch.stack([torch.from_numpy(np.array(picture)) for picture in pictures]).permute(0, 3, 1, 2)
    with torch.no_grad():
        mean = model.vae.encode(pixels / 127.5 - 1).latent_dist.mean
        latents = encode_bytes(model, pixels)
    assert_close(latents, mean * model.vae.config["scaling_factor"], rtol=1e-4, atol=1e-5)
    assert_close(encode_images(model, pictures), latents, rtol=1e-4, atol=1e-5)
    assert (latents.shape, latents.dtype) == ((2, 4, 8, 8), torch.float32)


def test_a_picture_has_one_latent_whatever_is_encoded_with_it(model):
    pictures = make_pictures()
    together = encode_images(model, pictures)
    assert torch.equal(encode_images(model, pictures), together)
    assert_close(encode_images(model, pictures, batch_size=1), together, rtol=1e-4, atol=1e-5)


def test_latents_decode_to_nearly_their_pictures(model):
    picture = Image.new("RGB", (64, 64), (200, 30, 40))
    (decoded,) = model.decode_latents(encode_images(model, [picture]))
    assert decoded.size == (64, 64)
    assert np.abs(np.asarray(decoded).astype(int) - np.asarray(picture)).mean() < 16


def test_latents_and_prompts_can_take_part_in_a_graph(model):
    latents, states = encode_images(model, make_pictures(1)), model.encode_prompts(["a"]).hidden
    assert not latents.is_inference() and not states.is_inference()


# --------------------------------------------------------------------------------------------------------------- prompt


def test_prompts_are_encoded_as_the_pipeline_does(model):
    expected, _ = model.pipeline().encode_prompt(PROMPTS, torch.device("cpu"), 1, False)
    embeds = model.encode_prompts(PROMPTS)
    assert_close(embeds.hidden, expected, rtol=1e-4, atol=1e-5)
    assert embeds.hidden.shape == (len(PROMPTS), model.max_tokens, 128) and embeds.pooled is None


def test_prompts_of_sdxl_are_encoded_as_its_pipeline_does(twin):
    model = Base("sdxl", str(twin("sdxl"))).load()
    expected, _, pooled, _ = model.pipeline().encode_prompt(
        PROMPTS, device=torch.device("cpu"), do_classifier_free_guidance=False
    )
    embeds = model.encode_prompts(PROMPTS)
    assert embeds.pooled is not None
    assert_close(embeds.hidden, expected, rtol=1e-4, atol=1e-5)
    assert_close(embeds.pooled, pooled, rtol=1e-4, atol=1e-5)
    assert (embeds.hidden.shape, embeds.pooled.shape) == ((4, 32, 32 + 48), (4, 48))


def test_a_prompt_has_one_encoding_whatever_is_encoded_with_it(model):
    one_by_one, together = (model.encode_prompts(PROMPTS, batch_size=n).hidden for n in (1, 64))
    assert_close(one_by_one, together, rtol=1e-4, atol=1e-5)


def test_prompts_of_more_tokens_than_the_limit_are_found_and_cut(model):
    fits, long, foreign = "red " * 30, "red " * 31, "漢字" * 16  # and two for the ends, of 32
    assert model.truncated([fits, "", long, "x" * 30, foreign]) == [long, foreign]
    assert model.truncated([]) == []
    assert torch.equal(model.encode_prompts([long]).hidden[0, :31], model.encode_prompts([fits]).hidden[0, :31])


def test_a_long_prompt_is_read_in_chunks_that_stand_side_by_side(model):
    """35 words of one token each: 30 in the first chunk and 5 in the second, as if they were prompts of their own."""
    wide = Base(max_tokens=60).load()
    first, rest, long = "red " * 30, "green " * 5, "red " * 30 + "green " * 5
    found, apart = wide.encode_prompts([long, "red"]), model.encode_prompts([first, rest, "red", ""])
    assert found.hidden.shape == (2, *wide.hidden_shape) == (2, 64, 128)
    assert_close(found.hidden.reshape(4, 32, 128), apart.hidden, rtol=1e-4, atol=1e-5)
    assert wide.truncated([long, "red " * 60, "red " * 61]) == ["red " * 61]


def test_the_pooled_text_of_chunks_is_that_of_the_first(twin):
    wide, plain = (Base("sdxl", str(twin("sdxl")), max_tokens=tokens).load() for tokens in (150, 75))
    found, first = wide.encode_prompts(["red " * 40]), plain.encode_prompts(["red " * 30])
    assert found.pooled is not None and first.pooled is not None
    assert_close(found.pooled, first.pooled, rtol=1e-4, atol=1e-5)
    assert found.hidden.shape == (1, 64, 32 + 48)


def test_clip_skip_2_reads_as_if_there_were_no_last_layer(model):
    skipping, shorter = Base(clip_skip=2).load(), Base().load()
    layers: Any = shorter.text_encoders[0].encoder  # type: ignore[union-attr]
    layers.layers = layers.layers[:-1]
    assert_close(skipping.encode_prompts(PROMPTS).hidden, shorter.encode_prompts(PROMPTS).hidden)
    layer = "encoder.layers.{}.self_attn.q_proj.weight"
    assert [skipping.unread("text_encoder", layer.format(n)) for n in range(2)] == [False, True]
    assert not model.unread("text_encoder", layer.format(1))


def test_how_prompts_are_read_is_part_of_what_caches_and_runs_go_by(model):
    others = [Base(max_tokens=60), Base(clip_skip=2), Base(max_tokens=60, clip_skip=2)]
    found = [base.fingerprints() for base in others]
    assert Base(max_tokens=30, clip_skip=1).fingerprints() == model.fingerprints
    assert len({model.fingerprints.text, *(each.text for each in found)}) == 4
    assert len({model.fingerprint, *(each.model for each in found)}) == 4
    assert {each.vae for each in found} == {model.fingerprints.vae}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Base("sd15", max_tokens=100), "sd15 reads prompts in chunks of 75 tokens, at most 10 of them: use 75"),
        (lambda: Base("sd15", max_tokens=0), "max_tokens=0: sd15 reads prompts in chunks of 75 tokens"),
        (lambda: Base("sdxl", max_tokens=7500), "at most 10 of them: use 750"),
        (lambda: Base("sd15", clip_skip=0), "clip_skip must be between 1 .the last layer. and 12, got 0"),
        (lambda: Base(clip_skip=3), "and 2, got 3"),
        (lambda: Base("sdxl", clip_skip=2), "sdxl was trained on the last layer but one, which is read already"),
        (lambda: Base("sd21", clip_skip=2), "sd21 was trained on the last layer but one"),
    ],
)
def test_what_a_family_cannot_read_is_refused_in_words(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("family", ["tiny", "sdxl"])
def test_the_pipeline_shares_the_parts(model, twin, family):
    if family == "sdxl":
        model = Base("sdxl", str(twin("sdxl"))).load()
    pipeline = model.pipeline()
    encoders = [pipeline.text_encoder, *([pipeline.text_encoder_2] if family == "sdxl" else [])]
    assert (pipeline.unet, pipeline.vae, encoders) == (model.unet, model.vae, model.text_encoders)
    assert list(model.networks) == ["unet", "text_encoder", "text_encoder_2"][: 1 + len(encoders)]


# ------------------------------------------------------------------------------------------------------------- families


@pytest.mark.parametrize("family", REAL)
def test_networks_at_their_real_shapes_take_a_lora_and_a_step(family):
    """Full depth and width, without weights: what a step is given and gives back, in shapes."""
    model = on_meta(family)
    width = {"sd15": 768, "sd21": 1024, "sdxl": 2048}[family]
    resolution = {"sd15": 512, "sd21": 768, "sdxl": 1024}[family]
    parameters = {"sd15": 859_520_964, "sd21": 865_910_724, "sdxl": 2_567_463_684}[family]
    assert sum(parameter.numel() for parameter in model.unet.parameters()) == parameters
    assert (model.resolution, model.family.resolution, model.factor) == (resolution, resolution, 8)
    assert model.prediction_type == ("v_prediction" if family == "sd21" else "epsilon")
    LoRA(rank=4).attach(model)
    side = resolution // 8
    with torch.device("meta"):
        added = model.added(torch.zeros(2, 1280), torch.zeros(2, 6))
        given = torch.zeros(2, 4, side, side), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 77, width)
        assert model.unet(*given, added_cond_kwargs=added).sample.shape == (2, 4, side, side)
        assert model.encode_pixels(torch.zeros(1, 3, resolution, resolution)).shape == (1, 4, side, side)
        embeds = model.embed(["a prompt"])
    assert embeds.hidden.shape == (1, *model.hidden_shape) == (1, 77, width)
    assert (None if embeds.pooled is None else embeds.pooled.shape[1]) == model.pooled_width
    assert model.pooled_width == (1280 if family == "sdxl" else None)


def test_the_twin_of_sd2_predicts_velocity_on_a_schedule_that_ends_in_pure_noise(twin):
    model = Base("sd21", str(twin("sd21"))).load()
    assert model.prediction_type == "v_prediction"
    assert model.noise_scheduler.alphas_cumprod[-1] < 1e-7


def test_what_the_files_do_not_say_can_be_said(twin):
    settings: dict[str, Any] = {"prediction_type": "v_prediction", "zero_terminal_snr": True}
    plain, told = Base("tiny").load(), Base("tiny", **settings).load()
    assert told.prediction_type == "v_prediction" and told.noise_scheduler.alphas_cumprod[-1] < 1e-7
    assert plain.fingerprint != told.fingerprint
    assert plain.fingerprints[1:] == told.fingerprints[1:]  # latents and embeddings stay


def test_noise_cannot_be_predicted_from_pure_noise(twin):
    with pytest.raises(UserError, match="zero_terminal_snr needs prediction_type=v_prediction"):
        Base("tiny", prediction_type="epsilon", zero_terminal_snr=True)
    with pytest.raises(UserError, match=r"ends in pure noise.*use model.prediction_type=v_prediction"):
        Base("tiny", zero_terminal_snr=True).load()
    with pytest.raises(UserError, match=r"ends in pure noise.*or model.zero_terminal_snr=false"):
        Base("sd21", str(twin("sd21")), prediction_type="epsilon").load()


def test_a_model_that_predicts_something_else_is_refused(tiny):
    change(tiny / "scheduler" / "scheduler_config.json", prediction_type="sample")
    with pytest.raises(UserError, match="predicts 'sample': only epsilon and v_prediction"):
        Base(path=str(tiny)).load()


@pytest.mark.parametrize(("name", "family"), [("sd15", "sdxl"), ("tiny", "sdxl")])
def test_a_folder_of_another_family_is_refused_with_the_right_one(twin, name, family):
    with pytest.raises(UserError, match=f"is of the family {family}: use model={family} model.path="):
        Base(name, str(twin(family)))


# -------------------------------------------------------------------------------------------------------------- folders


@pytest.fixture
def tiny(tmp_path) -> Path:
    return shutil.copytree(TINY, tmp_path / "tiny")


def change(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def test_a_path_without_a_pipeline_is_named(tmp_path):
    with pytest.raises(UserError, match=f"model.path={tmp_path}: no diffusers pipeline there"):
        Base(path=str(tmp_path))


@pytest.mark.parametrize("file", ["lora/style.safetensors", "adapter_config.json", "unet/adapter_config.json"])
def test_a_run_or_a_folder_of_pefts_form_is_told_from_a_model(tmp_path, file):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    with pytest.raises(UserError, match=f"model.path={tmp_path} is a LoRA, not a model: give it as lora.init_from"):
        Base(path=str(tmp_path))


@pytest.mark.parametrize("name", ["no.safetensors", "no.ckpt"])
def test_a_file_that_is_not_there_is_no_repository(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"model.path=models/{name}: there is no such folder or file"):
        Base(path=f"models/{name}", pickle=True)


def test_the_shipped_model_is_no_other_family(tiny):
    with pytest.raises(UserError, match=f"{tiny} is of the family tiny: use model=tiny"):
        Base("sd15", path=str(tiny))


@pytest.mark.parametrize("setting", ["path", "vae", "config"])
def test_a_place_that_is_nowhere_is_named(tmp_path, setting):
    place: dict[str, Any] = {setting: str(tmp_path / "no")}
    with pytest.raises(UserError, match=f"model.{setting}={tmp_path}/no: there is no such folder or file.*owner/name"):
        Base(**place)


@pytest.mark.parametrize("part", PARTS)
def test_a_pipeline_that_lacks_a_part_is_refused_before_anything_loads(tiny, part):
    shutil.rmtree(tiny / part)
    with pytest.raises(UserError, match=f"lacks {part}: copy the whole pipeline folder"):
        Base(path=str(tiny))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("unet/diffusion_pytorch_model.safetensors", b""),
        ("unet/diffusion_pytorch_model.safetensors", b"garbage" * 100),
        ("unet/config.json", b"{"),
        ("unet/config.json", b'{"_class_name": "UNet2DModel"}'),
        ("vae/diffusion_pytorch_model.safetensors", None),
        ("text_encoder/model.safetensors", None),
    ],
)
def test_a_part_that_cannot_be_loaded_is_named(tiny, file, content):
    if content is None:
        (tiny / file).unlink()
    else:
        (tiny / file).write_bytes(content)
    with pytest.raises(UserError, match=f"{file.split('/')[0]} cannot be loaded: [^\n]*$"):
        Base(path=str(tiny)).load()


def test_a_folder_without_a_schedule_is_named(tiny):
    (tiny / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(UserError, match="lacks scheduler: copy the whole pipeline folder"):
        Base(path=str(tiny)).load()


def test_a_single_file_that_predicts_something_unknown_is_refused(single_file, tmp_path):
    single = single_file("sd15")
    file = altered(single, tmp_path, lambda tensors: tensors, {"modelspec.prediction_type": "edm"})
    with pytest.raises(UserError, match="predicts 'edm': only epsilon and v_prediction can be trained"):
        of_file(file, single).load()


def test_weights_that_are_a_pickle_are_read_only_when_that_is_asked_for(tiny):
    weights = tiny / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(UserError, match="vae cannot be loaded"):
        Base(path=str(tiny)).load()
    assert same_weights(Base(path=str(tiny), pickle=True).load().vae, Base().load().vae)


def halve(part: Path, variant: str = "fp16") -> None:
    """Another variant of a part's weights, in half precision."""
    (plain,) = part.glob("*model.safetensors")
    halved = {key: tensor.half() for key, tensor in load_file(plain).items()}
    save_file(halved, plain.with_name(f"{plain.stem}.{variant}.safetensors"), {"format": "pt"})


def test_a_variant_is_taken_where_there_is_one_and_the_others_are_said(tiny):
    halve(tiny / "unet")
    model = Base(path=str(tiny), variant="fp16")
    loaded = model.load()
    plain = load_file(tiny / "unet" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(loaded.unet.state_dict()["conv_in.weight"], plain["conv_in.weight"].half().float())
    assert model.notes == [
        f"{tiny / 'vae'} has no variant fp16: plain weights taken",
        f"{tiny / 'text_encoder'} has no variant fp16: plain weights taken",
    ]


def test_where_there_are_no_plain_weights_a_variant_is_taken_and_said(tiny):
    halve(tiny / "vae")
    (tiny / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    model = Base(path=str(tiny))
    model.load()
    assert model.notes == [f"{tiny / 'vae'} has no plain weights: variant fp16 taken"]


# --------------------------------------------------------------------------------------------------------- fingerprints


def test_the_fingerprint_of_a_loaded_model_is_that_of_its_files(model):
    assert model.fingerprints == Base().fingerprints()
    assert {len(each) for each in model.fingerprints} == {16}


def test_fingerprints_do_not_depend_on_the_place_the_card_or_weights_that_are_not_read(tiny):
    before = Base(path=str(tiny)).fingerprints()
    assert before == Base().fingerprints()
    (tiny / "README.md").write_text("another card")
    halve(tiny / "vae")
    halve(tiny / "text_encoder", "ema")
    (tiny / "unet" / "flax_model.msgpack").write_text("for another library")
    assert Base(path=str(tiny)).fingerprints() == before


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        ("unet/diffusion_pytorch_model.safetensors", {"model"}),
        ("unet/config.json", {"model"}),
        ("scheduler/scheduler_config.json", {"model"}),
        ("vae/diffusion_pytorch_model.safetensors", {"model", "vae"}),
        ("vae/config.json", {"model", "vae"}),
        ("text_encoder/model.safetensors", {"model", "text"}),
        ("tokenizer/merges.txt", {"model", "text"}),
        ("tokenizer/tokenizer.json", {"model", "text"}),
    ],
)
def test_fingerprints_depend_on_the_bytes_of_what_decides(tiny, file, changed):
    before = Base(path=str(tiny)).fingerprints()
    with (tiny / file).open("r+b") as opened:  # of the same length
        opened.seek(-1, 2)
        opened.write(b"?")
    after = Base(path=str(tiny)).fingerprints()
    assert {name for name in before._fields if getattr(before, name) != getattr(after, name)} == changed


def test_another_variant_has_another_fingerprint(tiny):
    halve(tiny / "vae")
    plain, half = (Base(path=str(tiny), variant=variant).fingerprints() for variant in (None, "fp16"))
    assert plain.vae != half.vae and plain.text == half.text


def test_the_settings_and_the_vocabulary_of_a_single_file_are_part_of_its_fingerprint(single_file, tmp_path):
    single = single_file("sd15")
    config = shutil.copytree(single.config, tmp_path / "config")
    before = Base("sd15", str(single.file), config=str(config)).fingerprints()
    assert before == Base("sd15", str(single.file), config=str(single.config)).fingerprints()
    with (config / "tokenizer" / "tokenizer.json").open("a") as opened:
        opened.write(" ")
    after = Base("sd15", str(single.file), config=str(config)).fingerprints()
    assert after.text != before.text and after.vae == before.vae


# ---------------------------------------------------------------------------------------------------------- another VAE


def brighter(file: Path) -> dict[str, torch.Tensor]:
    return {key: tensor.float() + 0.01 for key, tensor in load_file(file).items()}


@pytest.mark.parametrize("layout", ["folder", "pipeline", "file"])
def test_another_vae_is_taken_from_a_folder_a_pipeline_or_a_single_file(tiny, single_file, tmp_path, layout):
    change(tiny / "vae" / "config.json", scaling_factor=0.5)
    weights = tiny / "vae" / "diffusion_pytorch_model.safetensors"
    save_file(brighter(weights), weights, {"format": "pt"})
    place = {"folder": tiny / "vae", "pipeline": tiny}.get(layout)
    if place is None:
        vae = {key: tensor for key, tensor in load_file(single_file("sd15").file).items() if "first_stage" in key}
        place = tmp_path / "other.safetensors"
        save_file({key: tensor + 0.01 for key, tensor in vae.items()}, place)
    model, plain = Base(vae=str(place)).load(), Base().load()
    assert torch.equal(
        model.vae.state_dict()["encoder.conv_in.weight"], plain.vae.state_dict()["encoder.conv_in.weight"] + 0.01
    )
    assert model.vae.config["scaling_factor"] == (0.67194 if layout == "file" else 0.5)
    assert not any(parameter.requires_grad for parameter in model.vae.parameters())
    assert model.fingerprints.vae != plain.fingerprints.vae and model.fingerprints.text == plain.fingerprints.text
    assert same_weights(model.unet, plain.unet)


def test_another_vae_that_is_changed_has_another_fingerprint(tiny):
    before = Base(vae=str(tiny / "vae")).fingerprints()
    weights = tiny / "vae" / "diffusion_pytorch_model.safetensors"
    save_file(brighter(weights), weights, {"format": "pt"})
    after = Base(vae=str(tiny / "vae")).fingerprints()
    assert before.vae != after.vae and before.model != after.model


def test_a_vae_that_is_a_pickle_or_damaged_is_one_line(tmp_path):
    for name in ("vae.pt", "vae.safetensors"):
        (tmp_path / name).write_bytes(b"garbage" * 20)
    with pytest.raises(UserError, match=r"model.vae=.*vae.pt is a pickle"):
        Base(vae=str(tmp_path / "vae.pt"))
    with pytest.raises(UserError, match=r"vae.safetensors cannot be loaded: [^\n]*$"):
        Base(vae=str(tmp_path / "vae.safetensors")).load()


# --------------------------------------------------------------------------------------------------------- single files


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("half", [False, True])
def test_a_single_file_has_the_weights_of_its_folder(single_file, tmp_path, family, half):
    single = single_file(family)
    file = single.file
    if half:
        file = tmp_path / "half.safetensors"
        save_file({key: tensor.half() for key, tensor in load_file(single.file).items()}, file)
    model = Base(family, str(file), config=str(single.config)).load("bfloat16" if half else "float32")
    folder = Base(family, str(single.folder)).load()
    if half:
        assert model.unet.dtype == torch.bfloat16
        assert {part.dtype for part in (model.vae, *model.text_encoders)} == {torch.float32}
        return
    for name, network in model.networks.items():
        assert same_weights(network, folder.networks[name])
        assert not any(parameter.requires_grad for parameter in network.parameters())
    assert same_weights(model.vae, folder.vae)
    assert dict(model.noise_scheduler.config) == dict(folder.noise_scheduler.config)
    mine, its = model.encode_prompts(PROMPTS), folder.encode_prompts(PROMPTS)
    assert isinstance(mine, TextEmbeds) and torch.equal(mine.hidden, its.hidden)


@pytest.mark.parametrize(("name", "family"), [("sdxl", "sd15"), ("tiny", "sd15"), ("sd15", "sdxl"), ("sd21", "sdxl")])
def test_a_single_file_of_another_family_is_refused_with_the_right_one(single_file, name, family):
    with pytest.raises(UserError, match=f"is of the family {family}: use model={family} model.path="):
        Base(name, str(single_file(family).file))


def make_header(shapes: dict[str, list[int]]) -> bytes:
    """A whole file whose tensors have a first side of 0, and so no numbers."""
    header = json.dumps(
        {key: {"dtype": "F32", "shape": [0, *shape[1:]], "data_offsets": [0, 0]} for key, shape in shapes.items()}
    )
    return struct.pack("<Q", len(header)) + header.encode()


ATTENTION = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no safetensors file, or damaged .*: fetch it again"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "is no safetensors file, or damaged .*longer than the file"),
        (struct.pack("<Q", 20) + b"{" * 20, "is no safetensors file, or damaged"),
        (struct.pack("<Q", 2) + b"[]", "is no safetensors file, or damaged"),
        (make_header({"lora_unet_down_blocks_0.lora_down.weight": [4, 320]}), "is a LoRA, not a model: give it as"),
        (make_header({"unet.down_blocks.0.to_q.lora_A.weight": [4, 320]}), "is a LoRA, not a model: give it as"),
        (make_header({"double_blocks.0.img_attn.qkv.weight": [9216, 3072]}), "holds no Stable Diffusion 1, 2 or XL"),
        (make_header({"first_stage_model.encoder.conv_in.weight": [128, 3, 3, 3]}), "holds no Stable Diffusion 1, 2"),
        (make_header({ATTENTION: [320, 1024]}), "is of the family sd21: use model=sd21 model.path="),
    ],
)
@pytest.mark.parametrize("ending", [".safetensors", ".sft", ""])
def test_what_is_no_single_file_of_the_family_is_refused_in_one_line(tmp_path, content, message, ending):
    file = tmp_path / f"model{ending}"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message) as refused:
        Base("sd15", str(file))
    assert "\n" not in str(refused.value) and str(file) in str(refused.value)


@pytest.mark.parametrize("ending", [".ckpt", ".pt", ".bin"])
def test_a_pickle_is_refused_with_the_reason_and_the_ways_out(tmp_path, ending):
    file = tmp_path / f"model{ending}"
    file.write_bytes(b"anything")
    with pytest.raises(UserError, match=r"is a pickle, which can run code.*\.safetensors.*model.pickle=true"):
        Base("sd15", str(file))


def test_a_pickle_that_is_asked_for_runs_no_code(single_file, tmp_path):
    class Attack:
        def __reduce__(self) -> Any:
            return Path.mkdir, (tmp_path / "ran",)

    single = single_file("sd15")
    torch.save({"state_dict": load_file(single.file)}, tmp_path / "model.ckpt")
    torch.save({"state_dict": Attack()}, tmp_path / "attack.ckpt")
    how: dict[str, Any] = {"config": str(single.config), "pickle": True}
    model = Base("sd15", str(tmp_path / "model.ckpt"), **how).load()
    assert same_weights(model.unet, Base("sd15", str(single.folder)).load().unet)
    with pytest.raises(UserError, match=r"attack.ckpt cannot be loaded"):
        Base("sd15", str(tmp_path / "attack.ckpt"), **how).load()
    assert not (tmp_path / "ran").exists()


def test_a_single_file_with_a_part_missing_or_cut_is_one_line(single_file, tmp_path):
    single, file = single_file("sd15"), tmp_path / "model.safetensors"
    state = load_file(single.file)
    save_file({key: tensor for key, tensor in state.items() if "cond_stage" not in key}, file)
    with pytest.raises(UserError, match=r"model.safetensors cannot be loaded: [^\n]*$"):
        Base("sd15", str(file), config=str(single.config)).load()
    file.write_bytes(single.file.read_bytes()[:-1000])
    with pytest.raises(
        UserError, match=r"model.safetensors is no safetensors file, or damaged \(it is cut short\): .*$"
    ):
        Base("sd15", str(file), config=str(single.config))  # before anything is loaded


def test_a_config_that_is_no_pipeline_folder_is_named(single_file, tmp_path):
    with pytest.raises(UserError, match=f"model.config={tmp_path}: no diffusers pipeline there"):
        Base("sd15", str(single_file("sd15").file), config=str(tmp_path))


# --------------------------------------------------------------------------------------- what is in the files of a part

Tensors = dict[str, torch.Tensor]


def rewrite(part: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Changes the tensors in the folder of a part."""
    (file,) = part.glob("*.safetensors")
    save_file(change(load_file(file)), file, {"format": "pt"})


def without_one(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name != sorted(tensors)[7]}


def refused_by_all(base: Callable[[], Base]) -> str:
    """What both `load` and the look at names alone say."""
    said = []
    for how in ("check_tensors", "load"):
        with pytest.raises(UserError) as refused:
            getattr(base(), how)()
        said.append(str(refused.value))
    assert said[0] == said[1] and "\n" not in said[0]
    return said[0]


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: {re.sub(r"(to_q|q_proj)\.", r"\1.base_layer.", n): t for n, t in tensors.items()},
            "adapters are attached",
        ),
        (lambda tensors: {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}, "inside a wrapper"),
        (lambda tensors: {f"module.{name}": tensor for name, tensor in tensors.items()}, "inside a wrapper"),
        (
            lambda tensors: {f"net.{name}": tensor for name, tensor in tensors.items()},
            "lacks .* and holds net.*none of it",
        ),
        (lambda tensors: tensors | {"mid.to_q.lora_A.weight": torch.ones(2)}, "adapters are attached"),
        (lambda tensors: tensors | {"mid.to_q.weight_scale": torch.ones(1)}, "quantised"),
        (lambda tensors: tensors | {"mid.to_q.weight.absmax": torch.ones(1)}, "quantised"),
        (lambda tensors: {name: tensor.to(torch.int8) for name, tensor in tensors.items()}, "quantised"),
        (without_one, "lacks a tensor of the network"),
        (lambda tensors: tensors | {sorted(tensors)[7]: torch.ones(1, 2)}, r"has the shape \(1, 2\), not"),
    ],
)
def test_a_part_whose_file_has_not_its_tensors_as_they_are_is_refused(tiny, part, change, message):
    rewrite(tiny / part, change)
    assert re.search(f"{part}.*{message}", refused_by_all(lambda: Base(path=str(tiny))))


def test_a_text_encoder_that_was_saved_with_its_adapters_is_refused_at_once(tiny):
    rewrite(tiny / "text_encoder", lambda t: {n.replace("q_proj.", "q_proj.base_layer."): x for n, x in t.items()})
    with pytest.raises(UserError, match=r"text_encoder/model.safetensors holds .*base_layer.*: adapters are attached"):
        Base(path=str(tiny)).check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_one, "unet lacks a tensor of the network"),
        (lambda tensors: {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}, "inside a wrapper"),
        (lambda tensors: tensors | {"conv_in.SCB": torch.ones(1)}, "quantised"),
    ],
)
def test_a_pickle_is_refused_for_the_same_reasons(tiny, change, message):
    (file,) = (tiny / "unet").glob("*.safetensors")
    torch.save(change(load_file(file)), file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(UserError, match=message):
        Base(path=str(tiny), pickle=True).load()


def test_what_nothing_reads_may_lie_beside_the_tensors(tiny, single_file, tmp_path):
    beside = {"position_ids": torch.arange(32)[None], "logit_scale": torch.ones(())}
    for part in ("unet", "vae", "text_encoder"):
        rewrite(tiny / part, lambda tensors: tensors | beside)
    Base(path=str(tiny)).check_tensors()
    assert same_weights(Base(path=str(tiny)).load().unet, Base().load().unet)
    kept = {"model_ema.decay": torch.ones(()), "model_ema.diffusion_modelout0weight": torch.ones(2)}
    kept |= {
        "betas": torch.ones(1000),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.ones(1, 32),
    }
    single = single_file("sd15")
    file = altered(single, tmp_path, lambda tensors: tensors | kept, {"sshs_model_hash": "0", "merge_recipe": "{}"})
    assert same_weights(of_file(file, single).load().unet, Base("sd15", str(single.folder)).load().unet)


def test_older_names_of_tensors_are_read(tiny):
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def old(name: str) -> str:
        return reduce(
            lambda name, new: name.replace(f"attentions.0.{new}.", f"attentions.0.{older[new]}."), older, name
        )

    rewrite(tiny / "vae", lambda tensors: {old(name): tensor for name, tensor in tensors.items()})
    rewrite(tiny / "text_encoder", lambda tensors: {f"text_model.{name}": tensor for name, tensor in tensors.items()})
    base = Base(path=str(tiny))
    base.check_tensors()
    model, plain = base.load(), Base().load()
    assert same_weights(model.vae, plain.vae) and same_weights(model.text_encoders[0], plain.text_encoders[0])


def test_weights_in_plain_float8_are_read_as_they_are(tiny):
    rewrite(tiny / "unet", lambda tensors: {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()})
    base = Base(path=str(tiny))
    base.check_tensors()
    weight = base.load().unet.state_dict()["conv_in.weight"]
    assert torch.equal(weight, Base().load().unet.state_dict()["conv_in.weight"].to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_tensor_that_holds_no_numbers_is_named(tiny, part, number):
    def spoilt(tensors: Tensors) -> Tensors:
        tensors[sorted(tensors)[7]].view(-1)[-1] = number
        return tensors

    rewrite(tiny / part, spoilt)
    (file,) = (tiny / part).glob("*.safetensors")
    with pytest.raises(UserError, match=f"{part} holds NaN or infinity in {sorted(load_file(file))[7]}: "):
        Base(path=str(tiny)).load()


# --------------------------------------------------------------------------------------------- what is not a base alone


@pytest.mark.parametrize(
    ("part", "settings", "message"),
    [
        ("unet", {"in_channels": 9}, "9 input channels, which is for a mask and an image to inpaint"),
        ("unet", {"in_channels": 8}, "8 input channels, which is for an image to edit"),
        ("unet", {"in_channels": [4]}, "input channels"),
        ("unet", {"out_channels": 8}, "8 output channels"),
        ("unet", {"time_cond_proj_dim": 256}, "told more than the time and the text"),
        ("unet", {"num_class_embeds": 10}, "told more than the time and the text"),
        ("unet", {"addition_embed_type": "image"}, "told more than the time and the text"),
        ("unet", {"cross_attention_dim": 1280}, "reads text of width 1280, but .* give 128"),
        ("unet", {"quantization_config": {"load_in_4bit": True}}, "is quantised"),
        ("text_encoder", {"quantization_config": {"load_in_8bit": True}}, "is quantised"),
        ("vae", {"latent_channels": 16}, "latents of 16 channels"),
        ("vae", {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}, "by latents_mean"),
        ("vae", {"shift_factor": 0.06}, "by shift_factor"),
        ("vae", {"_class_name": "AutoencoderTiny"}, "it is a AutoencoderTiny, not a AutoencoderKL"),
    ],
)
def test_a_folder_of_another_kind_of_model_is_refused_at_once(tiny, part, settings, message):
    change(tiny / part / "config.json", **settings)
    for how in ("check", "check_tensors", "load"):
        with pytest.raises(UserError, match=f"{part} .*{message}"):
            getattr(Base(path=str(tiny)), how)()
    if part == "vae":
        with pytest.raises(UserError, match=f"{part} .*{message}"):
            Base(vae=str(tiny)).check()


def altered(
    single: SingleFile, folder: Path, change: Callable[[Tensors], Tensors], metadata: dict[str, str] | None = None
) -> Path:
    """A copy of a single file with other tensors."""
    file = folder / "altered.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(single.file)).items()}, file, metadata)
    return file


def of_file(file: Path, single: SingleFile, **settings: Any) -> Base:
    return Base("sd15", str(file), config=str(single.config), **settings)


UNET = "model.diffusion_model."


def test_a_refiner_is_told_from_a_base(twin, tmp_path):
    folder = shutil.copytree(twin("sdxl"), tmp_path / "refiner")
    for part in ("text_encoder", "tokenizer"):
        shutil.rmtree(folder / part)
    with pytest.raises(UserError, match=r"lacks text_encoder, tokenizer: .*where this is SDXL's refiner, use its base"):
        Base("sdxl", str(folder))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({UNET + "input_blocks.0.0.weight": torch.ones(32, 9, 3, 3)}, "9 input channels, which is for a mask"),
        ({UNET + "out.2.weight": torch.ones(8, 32, 3, 3)}, "8 output channels"),
        ({UNET + "time_embed.cond_proj.weight": torch.ones(4, 4)}, "told more than the time and the text"),
        ({UNET + "out.0.scale_weight": torch.ones(1)}, "quantised"),
        ({"scaled_fp8": torch.ones(1).to(torch.float8_e4m3fn)}, "quantised"),
        ({UNET + "out.0.weight": torch.ones(32).to(torch.uint8)}, "quantised"),
        ({UNET + "input_blocks.1.1.to_q.lora_A.weight": torch.ones(2)}, "adapters are attached"),
        ({"edm_mean": torch.ones(4), "edm_std": torch.ones(4)}, "its noise is that of EDM"),
        ({"edm_vpred.sigma_max": torch.ones(())}, "its noise is that of EDM"),
    ],
)
def test_a_single_file_of_another_kind_of_model_is_refused_at_once(single_file, tmp_path, more, message):
    single = single_file("sd15")
    file = altered(single, tmp_path, lambda tensors: tensors | more)
    for how in ("check", "check_tensors", "load"):
        with pytest.raises(UserError, match=message):
            getattr(of_file(file, single), how)()
    torch.save(load_file(file), file.with_suffix(".ckpt"))
    with pytest.raises(UserError, match=message):
        of_file(file.with_suffix(".ckpt"), single, pickle=True).load()


@pytest.mark.parametrize("beginning", [UNET, "first_stage_model.", "cond_stage_model."])
def test_a_single_file_that_lacks_a_tensor_of_a_part_is_refused(single_file, tmp_path, beginning):
    single = single_file("sd15")
    lost = [name for name in load_file(single.file) if name.startswith(beginning)][-1]
    file = altered(single, tmp_path, lambda tensors: {name: tensors[name] for name in tensors if name != lost})
    assert "lacks a tensor of the network" in refused_by_all(lambda: of_file(file, single))


def test_a_single_file_without_a_vae_is_used_with_another_and_says_so_otherwise(single_file, tmp_path):
    single = single_file("sd15")
    file = altered(single, tmp_path, lambda tensors: {n: x for n, x in tensors.items() if "first_stage" not in n})
    with pytest.raises(UserError, match=r"lacks vae .*: give one as model.vae"):
        of_file(file, single).check()
    base = of_file(file, single, vae=str(single.folder / "vae"))
    base.check_tensors()
    assert same_weights(base.load().vae, Base("sd15", str(single.folder)).load().vae)


def test_a_single_file_takes_no_part_from_the_folder_of_its_settings(single_file, tmp_path):
    single = single_file("sd15")
    file = altered(single, tmp_path, lambda tensors: {n: x for n, x in tensors.items() if n.startswith(UNET)})
    message = r"lacks text_encoder \(cond_stage_model.transformer.*\), vae \(first_stage_model.*\): use a whole"
    with pytest.raises(UserError, match=message):
        Base("sd15", str(file), config=str(single.folder)).check()


def test_a_folder_without_a_vae_is_used_with_another(tiny):
    shutil.rmtree(tiny / "vae")
    with pytest.raises(UserError, match=r"lacks vae: copy the whole pipeline folder, or give one as model.vae"):
        Base(path=str(tiny))
    base = Base(path=str(tiny), vae=str(TINY))
    base.check_tensors()
    assert same_weights(base.load().vae, Base().load().vae)


# ------------------------------------------------------------------------------------------------------------ schedules


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"_class_name": "EDMEulerScheduler", "sigma_min": 0.002, "sigma_max": 80.0},
            "EDMEulerScheduler without betas",
        ),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "FlowMatch.* without betas"),
        ({"_class_name": "DDPMScheduler"}, "without betas"),
        ({**BETAS, "timestep_type": "continuous", "prediction_type": "v_prediction"}, "timestep_type=continuous"),
        ({**BETAS, "sigma_min": 0.002, "sigma_max": 120.0}, "sigma_min=0.002"),
        ({**BETAS, "use_flow_sigmas": True}, "use_flow_sigmas=True"),
        ({**BETAS, "beta_schedule": "laplace"}, "beta_schedule=laplace"),
        ({**BETAS, "beta_end": "x"}, "scheduler cannot be loaded"),
        ({**BETAS, "beta_end": 12.0}, "betas are not as many numbers from 0 to 1"),
        ({"trained_betas": [0.1, 0.2]}, "schedule of 1000 steps whose betas"),
    ],
)
def test_a_schedule_that_is_not_ddpms_is_refused(tiny, settings, message):
    (tiny / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    assert re.search(message, refused_by_all(lambda: Base(path=str(tiny))))


@pytest.mark.parametrize("name", ["PNDMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler", "LCMScheduler"])
def test_samplers_of_ddpms_schedule_leave_it_as_it_is(tiny, name):
    getattr(diffusers, name)(**BETAS).save_pretrained(tiny / "scheduler")
    schedule = Base(path=str(tiny)).load().noise_scheduler
    assert torch.equal(schedule.alphas_cumprod, Base().load().noise_scheduler.alphas_cumprod)


@pytest.mark.parametrize(
    ("marks", "metadata", "predicts", "ends"),
    [
        (["v_pred"], {}, "v_prediction", False),
        (["v_pred", "ztsnr"], {"modelspec.prediction_type": "epsilon"}, "v_prediction", True),
        ([], {"modelspec.prediction_type": "v"}, "v_prediction", False),
        ([], {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, "v_prediction", True),
        ([], {"modelspec.prediction_type": "epsilon"}, "epsilon", False),
        ([], {"modelspec.prediction_type": "", "ss_zero_terminal_snr": "False"}, "epsilon", False),
    ],
)
def test_what_a_single_file_says_of_its_training_is_believed_and_noted(
    single_file, tmp_path, marks, metadata, predicts, ends
):
    single = single_file("sd15")
    file = altered(single, tmp_path, lambda tensors: tensors | dict.fromkeys(marks, torch.tensor([])), metadata)
    base = of_file(file, single)
    model = base.load()
    assert model.prediction_type == predicts
    assert bool(model.noise_scheduler.alphas_cumprod[-1] < 1e-7) == ends
    assert len(base.notes) == (predicts != "epsilon") + ends
    planned = of_file(file, single)
    planned.check_tensors()
    assert planned.notes == base.notes


def test_a_setting_is_followed_against_what_the_file_says_with_a_note(single_file, tmp_path):
    single = single_file("sd15")
    file = altered(single, tmp_path, lambda tensors: tensors | {"v_pred": torch.tensor([])})
    base = of_file(file, single, prediction_type="epsilon")
    assert base.load().prediction_type == "epsilon"
    assert base.notes == [
        f"{file} says by v_pred that model.prediction_type is v_prediction: epsilon is taken, as it is set"
    ]


def test_a_file_whose_schedule_ends_in_noise_that_the_setting_cannot_predict_is_refused(single_file, tmp_path):
    single = single_file("sd15")
    marks = {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    file = altered(single, tmp_path, lambda tensors: tensors | marks)
    said = refused_by_all(lambda: of_file(file, single, prediction_type="epsilon"))
    assert "ends in pure noise" in said and "model.zero_terminal_snr=false" in said


# --------------------------------------------------------------------------------------------------------- vocabularies


@pytest.mark.parametrize("limit", [None, 77, 10**30])
def test_a_vocabulary_without_a_limit_is_limited_by_its_text_encoder(tiny, limit):
    change(tiny / "tokenizer" / "tokenizer_config.json", model_max_length=limit)
    if limit is None:
        file = tiny / "tokenizer" / "tokenizer_config.json"
        settings = json.loads(file.read_text())
        del settings["model_max_length"]
        file.write_text(json.dumps(settings))
    model = Base(path=str(tiny)).load()
    assert model.max_tokens == 32
    assert torch.equal(model.encode_prompts(PROMPTS).hidden, Base().load().encode_prompts(PROMPTS).hidden)
    assert truncation_line(Base(path=str(tiny)), ["red " * 31]).startswith("1 of 1 prompt is cut")


@pytest.mark.parametrize("limit", ["many", 0])
def test_a_limit_that_is_none_is_refused(tiny, limit):
    change(tiny / "tokenizer" / "tokenizer_config.json", model_max_length=limit)
    assert f"tokenizer has model_max_length={limit!r}" in refused_by_all(lambda: Base(path=str(tiny)))


def test_a_vocabulary_of_more_tokens_than_its_text_encoder_knows_is_refused(tiny):
    tokenizer = CLIPTokenizer.from_pretrained(tiny / "tokenizer")
    tokenizer.add_tokens(["<my-style>"])
    tokenizer.save_pretrained(tiny / "tokenizer")
    assert "has 627 tokens, and its text encoder knows 626" in refused_by_all(lambda: Base(path=str(tiny)))


def test_the_vocabularies_of_sdxl_cut_at_one_length(twin, tmp_path):
    folder = shutil.copytree(twin("sdxl"), tmp_path / "sdxl")
    change(folder / "tokenizer_2" / "tokenizer_config.json", model_max_length=16)
    assert Base("sdxl", str(folder)).load().encode_prompts(PROMPTS).hidden.shape[:2] == (4, 16)


# --------------------------------------------------------------------------------------------------------- the commands


@pytest.mark.parametrize("program", ["train", "plan", "generate", "export"])
def test_every_command_refuses_what_is_no_base_before_it_does_anything(command, tiny, tmp_path, program):
    change(tiny / "unet" / "config.json", in_channels=9)
    brief = {
        "train": [f"hydra.run.dir={tmp_path / 'run'}", f"cache_dir={tmp_path / 'cache'}"],
        "plan": [],
        "generate": ["prompts=[a star]", f"out={tmp_path / 'out'}"],
        "export": ["format=merged", f"out={tmp_path / 'out'}"],
    }
    ended = command(f"model.path={tiny}", *brief[program], program=program)
    assert ended.code == 1 and all(line.startswith("hardware") for line in ended.out.splitlines())
    assert re.fullmatch(r"error: .*unet has a UNet of 9 input channels.*\n", ended.err), ended.err
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()


def test_a_plan_says_which_tensors_are_missing_and_what_the_file_says_of_its_training(
    command, tiny, single_file, tmp_path
):
    rewrite(tiny / "text_encoder", without_one)
    refused = command(f"model.path={tiny}", program="plan")
    assert refused.code == 1 and "text_encoder lacks a tensor of the network" in refused.err
    single = single_file("sd15")
    file = altered(single, tmp_path, lambda tensors: tensors | {"v_pred": torch.tensor([])})
    ended = command("model=sd15", f"model.path={file}", f"model.config={single.config}", program="plan")
    assert "model    " in ended.out and "says by v_pred that model.prediction_type is v_prediction" in ended.out


# -------------------------------------------------------------------------------------------------------------- the Hub


@pytest.fixture
def unreachable(tmp_path) -> Any:
    """`unreachable(build, offline)`: what it says in a process that has never seen the Hub and finds no way to it."""

    def call(build: Any, offline: bool) -> tuple[str, float]:
        def work() -> None:
            from huggingface_hub import constants

            constants.HF_HUB_CACHE = constants.HUGGINGFACE_HUB_CACHE = str(tmp_path / "hub")
            constants.HF_HUB_OFFLINE = offline
            constants.ENDPOINT = "http://127.0.0.1:9"  # where nobody listens
            start = time.monotonic()
            try:
                build()
            except UserError as error:
                print(f"{time.monotonic() - start:.1f} {error}")

        ended = run_forked(work, tmp_path)
        assert ended.code == 0, ended.err
        seconds, _, message = ended.out.rstrip("\n").partition(" ")
        assert "\n" not in message
        return message, float(seconds)

    return call


@pytest.mark.parametrize(("family", "pads"), [("sd15", [49407]), ("sd21", [0]), ("sdxl", [49407, 0])])
def test_the_vocabulary_of_published_families_comes_with_the_package(family, pads):
    """CLIP's: 49408 tokens, in which these numbers are a photo of a cat, its ends included."""
    known = FAMILIES[family]
    reader = Reader(known, WeightFiles(None, False), "float32", print, True)
    encoders = {name: SimpleNamespace(config=CLIPTextConfig(**known.settings(name))) for name in known.encoders}
    tokenizers = list(reader.tokenizers(known.folder, encoders).values())
    assert [tokenizer.pad_token_id for tokenizer in tokenizers] == pads
    for tokenizer in tokenizers:
        assert (len(tokenizer), tokenizer.model_max_length) == (49408, 77)
        assert tokenizer("A photo of a  cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]


@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.parametrize("settings", [{}, {"variant": "fp16"}, {"revision": "main"}])
def test_a_repository_that_cannot_be_reached_is_one_line_in_seconds(unreachable, offline, settings):
    message, seconds = unreachable(lambda: Base("sd15", **settings).load(), offline)
    why = "HF_HUB_OFFLINE is set" if offline else "the Hub cannot be reached"
    assert message.startswith(
        f"{FAMILIES['sd15'].repository} is not on this computer and {why}: fetch it once with a network"
    )
    assert seconds < 20


@pytest.mark.parametrize("offline", [True, False])
def test_settings_and_vaes_that_cannot_be_reached_are_one_line_too(unreachable, single_file, offline):
    settings, _ = unreachable(lambda: Base("sd15", str(single_file("sd15").file), config="some/model").load(), offline)
    assert settings.startswith("some/model is not on this computer")
    vae, _ = unreachable(lambda: Base(vae="madebyollin/sdxl-vae-fp16-fix").load(), offline)
    assert vae.startswith("madebyollin/sdxl-vae-fp16-fix is not on this computer")


def test_a_repository_is_read_from_the_cache_of_the_hub_without_a_network(tmp_path, twin, unreachable):
    """A folder as the Hub's client leaves it."""
    commit = "0" * 40
    root = tmp_path / "hub" / "models--some--model"
    shutil.copytree(twin("sd21"), root / "snapshots" / commit)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)

    def load() -> None:
        model, folder = (Base("sd21", path).load() for path in ("some/model", str(twin("sd21"))))
        assert same_weights(model.unet, folder.unet) and model.fingerprints == folder.fingerprints
        raise UserError("loaded")

    assert unreachable(load, True)[0] == "loaded"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("GatedRepoError", "asks for consent: accept its terms on its page, then hf auth login"),
        ("RepositoryNotFoundError", "the Hub has no public some/model: check its name, or hf auth login"),
        ("RevisionNotFoundError", "some/model has no revision v2 on the Hub"),
    ],
)
def test_what_the_hub_answers_is_one_line_that_says_what_to_do(monkeypatch, name, message):
    import httpx
    from huggingface_hub import errors

    def fail(*names: Any, **how: Any) -> str:
        answer = httpx.Response(404, request=httpx.Request("GET", "http://hub"))
        raise getattr(errors, name)("a page of text\nand more", response=answer)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UserError, match=message):
        Base("sd15", "some/model", revision="v2").files()


def settings_of(folder: Path, part: str, **settings: object) -> None:
    file = folder / part / ("tokenizer_config.json" if part == "tokenizer" else "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize(("part", "settings", "message"), [
    ("vae", {"scaling_factor": 0}, r"scaling_factor=0, which latents are multiplied by"),
    ("vae", {"scaling_factor": None}, r"scaling_factor=None"),
    ("vae", {"scaling_factor": math.nan}, r"scaling_factor=nan"),
    ("unet", {"sample_size": None}, r"sample_size=None: it must be the side of a latent"),
    ("unet", {"sample_size": [8, 8]}, r"sample_size=\[8, 8\]"),
    ("text_encoder", {"num_hidden_layers": 1}, r"layers\.1\..*a layer more than its config\.json says"),
    ("tokenizer", {"model_max_length": math.nan}, r"model_max_length=nan: it must be a number of tokens"),
])  # fmt: skip
def test_settings_that_no_base_has_are_refused(tmp_path, part, settings, message):
    folder = make_folder(tmp_path / "m", "sd15")
    settings_of(folder, part, **settings)
    with pytest.raises(UserError, match=message):
        Base("sd15", path=str(folder)).load()


def test_a_vocabulary_without_its_files_is_refused(tmp_path):
    folder = make_folder(tmp_path / "m", "sd15")
    for file in (folder / "tokenizer").iterdir():
        file.unlink()
    with pytest.raises(UserError, match=r"tokenizer"):
        Base("sd15", path=str(folder)).load()


def test_a_setting_that_contradicts_the_schedule_of_a_folder_is_named(tmp_path):
    base = Base("sd15", path=str(make_folder(tmp_path / "m", "sd15")), prediction_type="v_prediction")
    assert base.load().prediction_type == "v_prediction"
    assert any("its scheduler_config.json" in note and "v_prediction is taken" in note for note in base.notes)


def test_a_revision_of_a_local_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"model\.revision=main is of a repository on the Hub"):
        Base("sd15", path=str(make_folder(tmp_path / "m", "sd15")), revision="main")


def test_latents_that_are_not_finite_are_no_black_picture(tmp_path):
    model = Base("sd15", path=str(make_folder(tmp_path / "m", "sd15"))).load()
    with pytest.raises(UserError, match="numbers that are not finite"):
        model.decode_latents(torch.full((1, 4, 8, 8), math.nan))
