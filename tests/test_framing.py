"""Sizes and crops: what is worked out on paper, and that a part always lies inside its picture."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dpo_sd.data.frames import WIDEST, Frame, Framing, frames, nearest_sizes, pixels, time_ids
from dpo_sd.errors import UserError


def framed(picture: tuple[int, int], size: tuple[int, int], where: tuple[float, float] = (0.5, 0.5)) -> Frame:
    return Frame(*frames(np.array([picture]), np.array([size]), where)[0].tolist())


@pytest.mark.parametrize(("resolution", "step"), [(512, 64), (768, 64), (1024, 32), (64, 16), (64, 64)])
def test_buckets_are_multiples_of_the_step_with_nearly_the_area_of_the_square_and_bearable_shapes(resolution, step):
    sizes = Framing().sizes(resolution, step)
    assert (resolution, resolution) in sizes and len(sizes) == len(set(sizes))
    for width, height in sizes:
        assert width % step == height % step == 0
        assert resolution**2 - step * max(width, height) < width * height <= resolution**2
        assert max(width, height) <= WIDEST * min(width, height)
        assert (height, width) in sizes
    assert sizes == sorted(sizes, key=lambda size: size[0] / size[1])


def test_without_buckets_there_is_one_square():
    assert Framing(buckets=False).sizes(512, 64) == [(512, 512)]


def test_a_picture_goes_into_the_bucket_of_the_nearest_aspect_ratio():
    sizes = [(512, 512), (640, 384), (384, 640)]
    asked = np.array([[(100, 100)], [(1000, 600)], [(600, 1000)], [(4000, 100)], [(110, 100)]])
    assert nearest_sizes(sizes, asked).tolist() == [0, 1, 2, 1, 0]


def test_a_pair_goes_into_the_bucket_of_its_geometric_mean():
    """Of 4:1 and 1:4 that is 1:1; of 2:1 and 1:1 it is 1.41:1, nearer to 5:3 than to 1:1 on the scale of logarithms."""
    sizes = [(512, 512), (640, 384), (384, 640)]
    pairs = np.array([[(400, 100), (100, 400)], [(200, 100), (100, 100)]])
    assert nearest_sizes(sizes, pairs).tolist() == [0, 1]
    assert nearest_sizes(sizes, pairs[:, ::-1]).tolist() == [0, 1]


def test_of_two_buckets_that_are_equally_near_the_larger_one_is_taken():
    assert nearest_sizes([(256, 256), (512, 512)], np.array([[(9, 9)]])).tolist() == [1]


def test_many_pictures_are_sorted_in_as_one_by_one():
    sizes = Framing().sizes(512, 64)
    pictures = np.random.default_rng(0).integers(1, 4000, (9000, 2, 2))
    together = nearest_sizes(sizes, pictures)
    some = range(0, 9000, 1000)
    assert [int(nearest_sizes(sizes, pictures[i : i + 1])[0]) for i in some] == together[list(some)].tolist()


def test_a_wide_picture_is_scaled_to_the_height_and_cut_at_the_sides():
    """300x100 into 64x64: scaled to 192x64, of which the middle 64 begin at 64."""
    assert framed((300, 100), (64, 64)) == Frame(64, 64, 192, 64, 64, 0)
    assert framed((300, 100), (64, 64), (0.0, 0.7)).left == 0
    assert framed((300, 100), (64, 64), (1.0, 0.7)).left == 128


def test_a_small_picture_is_scaled_up():
    assert framed((32, 16), (128, 64)) == Frame(128, 64, 128, 64, 0, 0)


def test_the_part_lies_inside_the_scaled_picture_whatever_the_sizes():
    rng = np.random.default_rng(1)
    pictures, sizes = rng.integers(1, 3000, (2000, 2)), 8 * rng.integers(1, 200, (2000, 2))
    for where in ((0.0, 0.0), (0.5, 0.5), (1.0, 1.0), (0.31, 0.77)):
        width, height, scaled_width, scaled_height, left, top = frames(pictures, sizes, where).T
        assert (np.stack([width, height], axis=1) == sizes).all()
        assert (left >= 0).all() and (top >= 0).all()
        assert (left + width <= scaled_width).all() and (top + height <= scaled_height).all()
        # one side is filled exactly, and the aspect ratio stays but for rounding
        assert ((scaled_width == width) | (scaled_height == height)).all()
        assert (
            abs(scaled_width / pictures[:, 0] - scaled_height / pictures[:, 1]) * pictures.min(axis=1) <= 1.01
        ).all()


def test_time_ids_are_original_size_corner_and_target_height_first():
    """Podell et al. 2023: c_size = (h_original, w_original), c_crop = (top, left); 300x100 into 64x48 begins at 40."""
    part = frames(np.array([[300, 100]]), np.array([[64, 48]]))
    assert part.tolist() == [[64, 48, 144, 48, 40, 0]]
    assert time_ids(np.array([[300, 100]]), part).tolist() == [[100, 300, 0, 40, 48, 64]]


def test_pixels_are_those_of_the_part_and_mirrored_when_flipped():
    picture = Image.fromarray(np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3))
    part = Frame(2, 4, 6, 4, 3, 0)  # no scaling: columns 3 and 4
    got = pixels(picture, part)
    assert got.shape == (3, 4, 2)
    assert (got.permute(1, 2, 0).numpy() == np.asarray(picture)[:, 3:5]).all()
    assert (pixels(picture, part, flip=True).numpy() == got.numpy()[:, :, ::-1]).all()


def test_a_mirrored_picture_says_the_place_that_its_part_has_in_the_mirrored_whole():
    """As diffusers' SDXL scripts, which mirror first and then cut: cutting there at the place that is told gives it."""
    picture = Image.fromarray(np.random.default_rng(0).integers(256, size=(4, 9, 3), dtype=np.uint8))
    part = Frame(2, 4, 9, 4, 6, 0)
    (told,) = time_ids(np.array([picture.size]), np.array([part]), flip=True)
    assert told.tolist() == [4, 9, 0, 1, 4, 2]
    whole = pixels(picture, Frame(9, 4, 9, 4, 0, 0), flip=True)
    assert (pixels(picture, part, flip=True) == whole[:, :, told[3] : told[3] + 2]).all()


def test_pixels_of_a_scaled_picture_have_the_size_of_the_part():
    assert pixels(Image.new("RGB", (300, 100), "red"), framed((300, 100), (64, 48))).shape == (3, 48, 64)


def test_a_resolution_out_of_range_is_named():
    with pytest.raises(UserError, match="resolution must be at least 64, got 32"):
        Framing(resolution=32)
