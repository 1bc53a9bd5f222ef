"""Drawing: a picture follows from its prompt and its seed, and nothing else notices."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from PIL import Image

from dpo_sd.errors import UserError
from dpo_sd.models.base import Base
from dpo_sd.models.sampling import Sampler
from dpo_sd.models.stable_diffusion import StableDiffusion

PROMPTS = ["a small red circle on a blue background", "a large green star", "", "yellow cross on black"]
SEEDS = [3, 2**63 - 1, 0, 3]


@pytest.fixture(scope="module")
def model() -> StableDiffusion:
    return Base().load()


def pixels(pictures: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(picture) for picture in pictures]).astype(int)


@pytest.fixture(scope="module")
def drawn(model) -> np.ndarray:
    return pixels(Sampler(steps=2, batch_size=4).draw(model, PROMPTS, SEEDS))


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_batch_size_changes_pictures_by_rounding_only(model, drawn, batch_size):
    again = pixels(Sampler(steps=2, batch_size=batch_size).draw(model, PROMPTS, SEEDS))
    assert again.shape == (4, 64, 64, 3)
    assert np.abs(again - drawn).max() <= 2


def test_a_picture_depends_on_its_own_prompt_and_seed_alone(model, drawn):
    backwards = pixels(Sampler(steps=2, batch_size=4).draw(model, PROMPTS[::-1], SEEDS[::-1]))
    assert np.abs(backwards[::-1] - drawn).max() <= 2


def test_another_seed_or_prompt_gives_another_picture(model, drawn):
    other = pixels(Sampler(steps=2).draw(model, PROMPTS, [4, *SEEDS[1:]]))
    assert np.abs(other - drawn).max(axis=(1, 2, 3)).tolist()[0] > 2
    assert np.abs(other - drawn)[1:].max() <= 2
    assert np.abs(drawn[0] - drawn[3]).max() > 0  # one seed, two prompts


@pytest.mark.parametrize("settings", [{"scheduler": "ddim"}, {"steps": 3}, {"guidance": 1.0}])
def test_every_setting_changes_the_pictures_and_is_among_the_settings_for_caches(model, drawn, settings):
    sampler = Sampler(**{"steps": 2, **settings})
    assert np.abs(pixels(sampler.draw(model, PROMPTS, SEEDS)) - drawn).max() > 2
    assert sampler.settings() != Sampler(steps=2).settings()
    assert Sampler(steps=2, batch_size=1).settings() == Sampler(steps=2).settings()


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++"])
def test_one_step_is_enough_for_a_picture(model, scheduler):
    (picture,) = Sampler(scheduler, steps=1).draw(model, ["star"], [1])
    assert (picture.size, picture.mode) == ((64, 64), "RGB")


def test_drawing_leaves_every_global_generator_as_it_was(model):
    states = (torch.get_rng_state(), repr(np.random.get_state()), random.getstate())
    Sampler(steps=1).draw(model, ["star"], [1])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (repr(np.random.get_state()), random.getstate()) == states[1:]


@pytest.mark.parametrize("training", [True, False])
def test_the_unet_draws_in_evaluation_mode_and_gets_its_mode_back(model, training):
    modes = []
    hook = model.unet.register_forward_pre_hook(lambda unet, given: modes.append(unet.training))
    model.unet.train(training)
    try:
        Sampler(steps=1).draw(model, ["star"], [1])
        assert modes and not any(modes)
        assert model.unet.training == training
    finally:
        hook.remove()
        model.unet.eval()


def test_the_unet_gets_its_mode_back_after_an_exception(model):
    def fail(unet, given):
        raise RuntimeError("out of memory")

    hook = model.unet.register_forward_pre_hook(fail)
    model.unet.train()
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            Sampler(steps=1).draw(model, ["star"], [1])
        assert model.unet.training
    finally:
        hook.remove()
        model.unet.eval()


@pytest.mark.parametrize("family", ["sdxl", "sd21"])
def test_the_other_families_draw_pictures_of_their_own_size(twin, family):
    model = Base(family, str(twin(family))).load()
    one, again, other = (Sampler(steps=2).draw(model, ["star"], [seed])[0] for seed in (1, 1, 2))
    assert one.size == (model.resolution, model.resolution) == (64, 64)
    assert one.tobytes() == again.tobytes() != other.tobytes()


def test_sdxl_draws_what_its_own_pipeline_draws(twin):
    model = Base("sdxl", str(twin("sdxl"))).load()
    (mine,) = Sampler("ddim", steps=2, guidance=3.0, negative_prompt="blurred").draw(model, ["star"], [1])
    pipeline: Any = model.pipeline()
    pipeline.scheduler = DDIMScheduler.from_config(model.noise_scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    its = pipeline(
        "star",
        negative_prompt="blurred",
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(1),
    ).images[0]
    assert np.abs(pixels([mine]) - pixels([its])).max() <= 2


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++"])
def test_a_schedule_that_ends_in_pure_noise_is_begun_at_its_end(twin, scheduler):
    """Begun anywhere else, the model would meet a noise level that it was never given (Lin et al. 2023)."""
    model = Base("sd21", str(twin("sd21"))).load()
    asked: list[int] = []
    hook = model.unet.register_forward_pre_hook(lambda unet, given: asked.append(int(given[1])))
    Sampler(scheduler, steps=4).draw(model, ["star"], [1])
    hook.remove()
    assert asked[0] == 999 and asked == sorted(asked, reverse=True)


@pytest.mark.parametrize(("height", "width"), [(96, 64), (64, 128), (None, 96)])
def test_pictures_of_other_sizes_can_be_asked_for(model, height, width):
    (picture,) = Sampler(steps=1, height=height, width=width).draw(model, ["star"], [1])
    assert picture.size == (width, height or 64)


def test_a_negative_prompt_leads_away_from_it(model, drawn):
    away = pixels(Sampler(steps=2, negative_prompt="a small red circle").draw(model, PROMPTS, SEEDS))
    assert np.abs(away - drawn).max() > 2
    same = pixels(Sampler(steps=2, negative_prompt="").draw(model, PROMPTS, SEEDS))
    assert np.abs(same - drawn).max() <= 2


def test_text_encoders_draw_in_evaluation_mode_too(model):
    encoder, modes = model.text_encoders[0], []
    hook = encoder.register_forward_pre_hook(lambda network, given: modes.append(network.training))
    encoder.train()
    try:
        Sampler(steps=1).draw(model, ["star"], [1])
        assert modes and not any(modes) and encoder.training
    finally:
        hook.remove()
        encoder.eval()


def test_drawing_leaves_no_graph_and_the_weights_frozen(model):
    Sampler(steps=1).draw(model, ["star"], [1])
    assert not any(parameter.requires_grad or parameter.is_inference() for parameter in model.unet.parameters())


def test_a_base_in_half_precision_draws_nearly_the_same_pictures(drawn):
    half = pixels(Sampler(steps=2).draw(Base().load("bfloat16"), PROMPTS, SEEDS))
    assert np.abs(half - drawn).mean() < 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"guidance": 0.5}, "guidance must be at least 1 .* got 0.5"),
        ({"guidance": float("nan")}, "guidance must be at least 1 .* got nan"),
        ({"height": 60}, "height must be a multiple of 8 pixels, got 60"),
        ({"width": 0}, "width must be a multiple of 8 pixels, got 0"),
        ({"negative_prompt": "blurred", "guidance": 1.0}, "negative_prompt='blurred' has no effect at guidance 1"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        Sampler(**settings)
