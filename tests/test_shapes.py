from __future__ import annotations

import numpy as np
import pytest

from dpo_sd.errors import UserError
from dpo_sd.shapes.captions import caption, parse, random_caption, split_prompts
from dpo_sd.shapes.render import coverage, render, render_array
from dpo_sd.shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    POSITIONS,
    RESOLUTION,
    SHAPES,
    SIZES,
    STYLES,
    Scene,
    held_out,
    place,
    random_scene,
    reach,
)

RED_CIRCLE = ("small", "red", "circle", "blue")


def random_scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    names = [None, *POSITIONS]
    return [random_scene(rng, KINDS[rng.integers(len(KINDS))], names[rng.integers(len(names))]) for _ in range(count)]


def test_every_kind_is_listed_once_and_none_hides_in_its_background():
    assert len(KINDS) == len(set(KINDS)) == len(SIZES) * len(SHAPES) * (len(COLOURS) * len(BACKGROUNDS) - 4)
    assert all(colour != background for _, colour, _, background in KINDS)


def test_about_one_kind_in_eight_is_held_out_and_always_the_same():
    held = [kind for kind in KINDS if held_out(kind)]
    assert 0.09 < len(held) / len(KINDS) < 0.16
    assert all(held_out(kind) for kind in held)


def test_held_out_kinds_hide_no_word_of_the_vocabulary():
    seen = [kind for kind in KINDS if not held_out(kind)]
    for part in range(4):
        assert {kind[part] for kind in seen} == {kind[part] for kind in KINDS}


def test_a_random_scene_keeps_its_kind_its_size_and_the_picture():
    for scene in random_scenes(200):
        low, high = SIZES[scene.size]
        assert low <= scene.radius <= high
        assert max(abs(u) for u in place(scene.x, scene.y, scene.shape, scene.radius)) <= 1


@pytest.mark.parametrize("position", POSITIONS)
def test_a_scene_drawn_at_a_position_has_that_position(position: str):
    rng = np.random.default_rng(0)
    for kind in KINDS[::40]:
        assert random_scene(rng, kind, position).position == position


def test_the_same_generator_state_draws_the_same_scene():
    assert random_scenes(5, seed=3) == random_scenes(5, seed=3)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_radius_is_that_of_the_disc_of_equal_area(shape: str):
    assert coverage(shape, 31.3, 32.6, 12.0).sum() == pytest.approx(np.pi * 12**2, rel=0.01)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_centre_is_the_centroid(shape: str):
    cover = coverage(shape, 30.3, 33.6, 12.0)
    centres = np.arange(RESOLUTION) + 0.5
    assert (cover.sum(axis=0) @ centres) / cover.sum() == pytest.approx(30.3, abs=0.05)
    assert (cover.sum(axis=1) @ centres) / cover.sum() == pytest.approx(33.6, abs=0.05)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_at_the_end_of_its_room_leaves_the_edge_free(shape: str):
    room = reach(shape, 13.0)
    for sign in (-1, 1):
        cover = coverage(shape, 32 + sign * room, 32 + sign * room, 13.0)
        assert cover[0].sum() + cover[-1].sum() + cover[:, 0].sum() + cover[:, -1].sum() < 0.5


def test_a_pixel_deep_inside_has_the_colour_and_a_corner_the_background():
    picture = render_array(Scene(*RED_CIRCLE, radius=7.0))
    assert tuple(picture[32, 32]) == COLOURS["red"]
    assert tuple(picture[0, 0]) == BACKGROUNDS["blue"]


def test_edges_are_antialiased():
    cover = coverage("circle", 32.0, 32.0, 10.0)
    assert ((cover > 0.05) & (cover < 0.95)).sum() > 30


def test_moving_a_scene_by_whole_pixels_moves_its_picture():
    one, other = (render_array(Scene(*RED_CIRCLE, x=x, y=30, radius=7.0)) for x in (25.25, 30.25))
    np.testing.assert_allclose(np.roll(one, 5, axis=1), other, atol=1e-9)


def test_a_picture_is_64_pixels_of_rgb_and_rounds_its_array():
    scene = Scene(*RED_CIRCLE, radius=7.0)
    picture = render(scene)
    assert (picture.size, picture.mode) == ((RESOLUTION, RESOLUTION), "RGB")
    assert np.abs(np.asarray(picture, float) - render_array(scene)).max() <= 0.5


@pytest.mark.parametrize("kind", [RED_CIRCLE, ("small", "pink", "star", "white"), ("large", "cyan", "cross", "black")])
def test_every_style_draws_another_picture(kind: tuple[str, str, str, str]):
    pictures = [render_array(Scene(*kind, radius=7.0, style=style)) for style in STYLES]
    for i, one in enumerate(pictures):
        assert all(np.abs(one - other).max() > 40 for other in pictures[:i])


def test_a_full_caption_reads_as_written_and_parses_back():
    text = caption(RED_CIRCLE, "top left")
    assert text == "a small red circle at the top left on a blue background"
    demand = parse(text)
    assert (demand.size, demand.colour, demand.shape, demand.background) == RED_CIRCLE
    assert demand.position == "top left"


def test_the_prompts_of_the_world_name_every_kind_and_no_position():
    demands = [parse(text) for part in split_prompts(0) for text in part]
    assert sorted((d.size, d.colour, d.shape, d.background) for d in demands) == sorted(KINDS)  # type: ignore[type-var]
    assert {d.position for d in demands} == {None}


@pytest.mark.parametrize("named", [True, False])
def test_random_captions_say_nothing_false_and_always_colour_and_shape(named: bool):
    rng = np.random.default_rng(1)
    forms = set()
    for scene in random_scenes(400):
        text = random_caption(rng, scene, name_position=named)
        demand = parse(text)
        assert (demand.colour, demand.shape) == (scene.colour, scene.shape), text
        assert demand.size in (None, scene.size) and demand.background in (None, scene.background), text
        assert demand.position == (scene.position if named else None), text
        forms.add((demand.size is None, demand.background is None))
    assert {(False, False), (True, False), (False, True)} <= forms


@pytest.mark.parametrize(
    ("text", "background", "colour"),
    [
        ("a Red circle on a GREY background", "gray", "red"),
        ("red circle on red", "red", "red"),
        ("an orange star in the middle, black background", "black", "orange"),
        ("a white background with a cyan cross", "white", "cyan"),
        ("a square", None, None),
    ],
)
def test_other_wordings_are_understood(text: str, background: str | None, colour: str | None):
    demand = parse(text)
    assert (demand.background, demand.colour) == (background, colour)


@pytest.mark.parametrize(("text", "position"), [("center", "centre"), ("middle", "centre"), ("left", "left")])
def test_positions_have_synonyms(text: str, position: str):
    assert parse(f"a red star in the {text}").position == position


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a cat on a blue background", "write one of circle, square"),
        ("", "write one of circle, square"),
        ("a black circle on a white background", "no shape of the shapes world is black: write one of red"),
        ("a red circle on a pink background", "no background of the shapes world is pink: write one of white"),
    ],
)
def test_a_caption_of_another_world_is_refused(text: str, message: str):
    with pytest.raises(UserError, match=message):
        parse(text)
