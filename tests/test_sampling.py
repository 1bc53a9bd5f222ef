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
from dpo_sd.models import sampling
from dpo_sd.models.base import Base
from dpo_sd.models.families import FAMILIES, SHIPPED
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
    schedule = model.noise_scheduler
    assert sampler.settings(schedule) != Sampler(steps=2).settings(schedule)
    assert Sampler(steps=2, batch_size=1).settings(schedule) == Sampler(steps=2).settings(schedule)


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


def test_a_stream_draws_what_draw_draws_also_from_prompts_that_were_encoded_before(model, drawn, monkeypatch):
    sampler = Sampler(steps=2, batch_size=4)
    monkeypatch.setattr(sampling, "AHEAD", 1)  # of which a batch is the least
    assert np.array_equal(pixels(list(sampler.stream(model, PROMPTS, SEEDS))), drawn)
    assert np.array_equal(pixels(sampler.draw(model, PROMPTS, SEEDS, embeds=sampler.encode(model, PROMPTS))), drawn)


def test_all_prompts_are_encoded_before_the_first_picture_is_drawn(model):
    seen = []
    parts = {"text": model.text_encoders[0], "unet": model.unet}
    hooks = [part.register_forward_pre_hook(lambda *_, name=name: seen.append(name)) for name, part in parts.items()]
    next(images := Sampler(steps=1, batch_size=1).stream(model, PROMPTS, SEEDS))
    assert seen == ["text", "text", "unet"]  # the prompts, the negative one, and the first picture's only step
    assert len(list(images)) == 3 and seen.count("text") == 2
    for hook in hooks:
        hook.remove()


def test_a_rescaled_prediction_has_the_contrast_of_the_one_without_guidance(model, monkeypatch):
    """Half of the pixels are 1 and half -1 for the prompt, all 0 for the empty one: by guidance 3, ±3.

    Their deviation is 1 and 3, so a whole rescaling gives ±1, and 0.7 of it 0.7 + 0.3 · 3 = 1.6.
    """
    taken = []
    step = DDIMScheduler.step
    monkeypatch.setattr(
        DDIMScheduler, "step", lambda self, out, *a, **k: (taken.append(out), step(self, out, *a, **k))[1]
    )
    signs = torch.ones(1, 4, 8, 8)
    signs[:, :, 4:] = -1
    monkeypatch.setattr(model.unet, "forward", lambda *_, **__: (torch.cat([0 * signs, signs]),))
    for rescale, expected in ((None, 3.0), (0.7, 1.6), (1.0, 1.0)):
        Sampler("ddim", steps=1, guidance=3.0, guidance_rescale=rescale).draw(model, ["star"], [1])
        torch.testing.assert_close(taken.pop(), expected * signs)


def test_the_class_has_the_defaults_of_the_model_that_ships_with_it():
    assert (Sampler().steps, Sampler().guidance) == (FAMILIES[SHIPPED].steps, FAMILIES[SHIPPED].guidance)


def test_guidance_is_rescaled_where_the_schedule_ends_in_pure_noise(model, twin):
    """And only there are the settings for caches others than before there was such a setting."""
    plain, ending = model.noise_scheduler, Base("sd21", str(twin("sd21"))).schedule()
    assert Sampler().rescale(plain) == 0 and Sampler().rescale(ending) == 0.7
    assert Sampler(guidance=1.0).rescale(ending) == Sampler(guidance_rescale=0.0).rescale(ending) == 0
    assert "guidance_rescale" not in Sampler().settings(plain) | Sampler(guidance_rescale=0.0).settings(ending)
    assert Sampler().settings(ending)["guidance_rescale"] == 0.7
    assert Sampler(guidance_rescale=0.3).settings(plain)["guidance_rescale"] == 0.3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"guidance": 0.5}, "guidance must be at least 1 .* got 0.5"),
        ({"guidance": float("nan")}, "guidance must be at least 1 .* got nan"),
        ({"height": 60}, "height must be a multiple of 8 pixels, got 60"),
        ({"width": 0}, "width must be a multiple of 8 pixels, got 0"),
        ({"guidance_rescale": 1.5}, "guidance_rescale must be between 0 and 1, got 1.5"),
        ({"guidance_rescale": 0.7, "guidance": 1.0}, "guidance_rescale=0.7 has no effect at guidance 1"),
        ({"negative_prompt": "blurred", "guidance": 1.0}, "negative_prompt='blurred' has no effect at guidance 1"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        Sampler(**settings)
