"""The parts of the base: latents, prompts, files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from dpo_sd.errors import UserError
from dpo_sd.models import PARTS, TINY, Model, StableDiffusion

PROMPTS = ["a small red circle on a blue background", "", "star", "Ünïcödé 漢字 🔴 مرحبا"]


@pytest.fixture(scope="module")
def model() -> StableDiffusion:
    return Model().load()


def make_pictures(n: int = 3) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(n)]


def test_every_part_is_frozen_and_in_evaluation_mode(model):
    for part in (model.unet, model.vae, model.text_encoder):
        assert not any(parameter.requires_grad for parameter in part.parameters())
        assert not any(module.training for module in part.modules())


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "float16"])
def test_the_precision_asked_for_is_the_unets_alone(weights):
    model = Model().load(weights)
    assert model.unet.dtype == getattr(torch, weights)
    assert model.vae.dtype == model.text_encoder.dtype == torch.float32


def test_sizes_are_those_of_the_pictures(model):
    assert (model.latent_size, model.resolution) == (8, 64)


# --------------------------------------------------------------------------------------------------------------- latent


def test_a_latent_is_the_scaled_mean_of_the_posterior(model):
    pictures = make_pictures(2)
    pixels = torch.stack([torch.from_numpy(np.array(picture)) for picture in pictures])
    with torch.no_grad():
        mean = model.vae.encode(pixels.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mean
    latents = model.encode_images(pictures)
    assert_close(latents, mean * model.vae.config["scaling_factor"], rtol=1e-4, atol=1e-5)
    assert (latents.shape, latents.dtype) == ((2, 4, 8, 8), torch.float32)


def test_a_picture_has_one_latent_whatever_is_encoded_with_it(model):
    pictures = make_pictures()
    together = model.encode_images(pictures)
    assert torch.equal(model.encode_images(pictures), together)
    assert_close(model.encode_images(pictures, batch_size=1), together, rtol=1e-4, atol=1e-5)


def test_transparent_and_grey_pictures_are_read_as_rgb(model):
    grey = Image.new("L", (64, 64), 128)
    latents = model.encode_images([grey, grey.convert("RGBA")])
    assert_close(latents, model.encode_images([grey.convert("RGB")] * 2), rtol=1e-4, atol=1e-5)


def test_latents_and_prompts_can_take_part_in_a_graph(model):
    latents, states = model.encode_images(make_pictures(1)), model.encode_prompts(["a"])
    assert not latents.is_inference() and not states.is_inference()


# --------------------------------------------------------------------------------------------------------------- prompt


def test_prompts_are_encoded_as_the_pipeline_does(model):
    expected, _ = model.pipeline().encode_prompt(PROMPTS, torch.device("cpu"), 1, False)
    states = model.encode_prompts(PROMPTS)
    assert_close(states, expected, rtol=1e-4, atol=1e-5)
    assert states.shape == (len(PROMPTS), model.tokenizer.model_max_length, 128)


def test_a_prompt_has_one_encoding_whatever_is_encoded_with_it(model):
    assert_close(model.encode_prompts(PROMPTS, batch_size=1), model.encode_prompts(PROMPTS), rtol=1e-4, atol=1e-5)


def test_prompts_of_more_tokens_than_the_limit_are_found_and_cut(model):
    fits, long = "red " * 30, "red " * 31  # and two for the ends, of 32
    assert model.truncated([fits, "", long]) == [long]
    assert torch.equal(model.encode_prompts([long])[0, :31], model.encode_prompts([fits])[0, :31])


# -------------------------------------------------------------------------------------------------------------- pipelin


def test_the_pipeline_shares_the_parts(model):
    pipeline = model.pipeline()
    assert (pipeline.unet, pipeline.vae, pipeline.text_encoder) == (model.unet, model.vae, model.text_encoder)


# ----------------------------------------------------------------------------------------------------------------- file


def test_a_path_without_a_pipeline_is_named(tmp_path):
    with pytest.raises(UserError, match=f"model.path={tmp_path / 'no'}: no diffusers pipeline there"):
        Model(path=str(tmp_path / "no"))


def test_a_model_that_predicts_something_else_is_refused(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "prediction_type": "sample"}))
    with pytest.raises(UserError, match="predicts 'sample': only epsilon and v_prediction"):
        Model(path=str(folder)).load()


def test_the_fingerprint_depends_on_weights_and_settings_and_not_on_the_place_or_the_card(tmp_path):
    def fingerprint(place: str, **content: str) -> str:
        folder = tmp_path / place
        for part in PARTS:
            (folder / part).mkdir(parents=True)
        (folder / "model_index.json").write_text("{}")
        (folder / "README.md").write_text(content.get("card", "card"))
        (folder / "unet" / "weights.safetensors").write_text(content.get("weights", "weights"))
        (folder / "unet" / "config.json").write_text(content.get("config", "{}"))
        return Model(path=str(folder)).fingerprint()

    first = fingerprint("a")
    assert fingerprint("b", card="other") == first
    assert len({first, fingerprint("c", weights="other"), fingerprint("d", config="other")}) == 3


@pytest.fixture
def tiny(tmp_path) -> Path:
    return shutil.copytree(TINY, tmp_path / "tiny")


@pytest.mark.parametrize("part", PARTS)
def test_a_pipeline_that_lacks_a_part_is_refused_before_anything_loads(tiny, part):
    shutil.rmtree(tiny / part)
    with pytest.raises(UserError, match=f"lacks {part}: copy the whole pipeline folder"):
        Model(path=str(tiny))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("unet/diffusion_pytorch_model.safetensors", b""),
        ("unet/diffusion_pytorch_model.safetensors", b"garbage" * 100),
        ("unet/config.json", b"{"),
        ("unet/config.json", b'{"_class_name": "UNet2DModel"}'),
        ("vae/diffusion_pytorch_model.safetensors", None),
        ("text_encoder/model.safetensors", None),
        ("scheduler/scheduler_config.json", None),
    ],
)
def test_a_part_that_cannot_be_loaded_is_named(tiny, file, content):
    if content is None:
        (tiny / file).unlink()
    else:
        (tiny / file).write_bytes(content)
    with pytest.raises(UserError, match=f"{file.split('/')[0]} cannot be loaded: "):
        Model(path=str(tiny)).load()


def test_the_fingerprint_of_a_loaded_model_is_that_of_its_files(model):
    assert model.fingerprint == Model().fingerprint()
    assert len(model.fingerprint) == 16
