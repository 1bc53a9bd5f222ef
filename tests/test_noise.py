from __future__ import annotations

import time
from itertools import product

import numpy as np
import pytest
import torch

from dpo_sd import noise
from dpo_sd.errors import UserError

SHAPE = (4, 64, 64)


# functions of their arguments


def test_the_same_arguments_give_the_same_numbers():
    np.testing.assert_array_equal(noise.noise(1, 2, 3, SHAPE), noise.noise(1, 2, 3, SHAPE))
    np.testing.assert_array_equal(noise.order(1, 2, 100), noise.order(1, 2, 100))
    assert noise.timestep(1, 2, 3, 1000) == noise.timestep(1, 2, 3, 1000)
    assert noise.uniform(1, 2, 3, "flip") == noise.uniform(1, 2, 3, "flip")
    assert noise.image_seed(1, "a red circle", 0, 3) == noise.image_seed(1, "a red circle", 0, 3)


def test_other_draws_in_between_change_nothing():
    before = noise.noise(1, 2, 3, SHAPE)
    np.random.seed(0)
    noise.noise(1, 2, 4, SHAPE)
    noise.generator(1, 2, 3, "noise").standard_normal(1000)
    np.testing.assert_array_equal(noise.noise(1, 2, 3, SHAPE), before)


def test_the_bit_stream_and_what_is_made_of_it_are_pinned():
    """A change here, ours or numpy's, makes old runs unrepeatable: it needs a new version of dpo_sd."""
    assert noise.sample_id("a", b"b") == 2833458332866829543
    assert noise.generator(1, 2, 3, "noise").bit_generator.random_raw(3).tolist() == [
        10436963295565616612,
        16744218240346084354,
        8348946537901810314,
    ]
    np.testing.assert_allclose(
        noise.noise(1, 2, 3, (4,)), [-2.2092416, 1.2448745, 0.10893039, -1.891114], rtol=1e-6, atol=0
    )
    assert noise.timestep(1, 2, 3, 1000) == 932
    assert noise.uniform(1, 2, 3, "flip") == 0.3209776998051376
    assert noise.order(1, 2, 6).tolist() == [2, 5, 4, 0, 1, 3]
    assert noise.image_seed(1, "a red circle", 0, 1) == 2129584955689323439


# independence


@pytest.mark.parametrize("other", [(1, 0, 0, "a"), (0, 1, 0, "a"), (0, 0, 1, "a"), (0, 0, 0, "b")])
def test_changing_any_one_argument_gives_unrelated_numbers(other: tuple[int, int, int, str]):
    x = noise.generator(0, 0, 0, "a").standard_normal(100_000)
    y = noise.generator(*other).standard_normal(100_000)
    assert abs(np.corrcoef(x, y)[0, 1]) < 0.015  # 4.7 standard errors


def test_neighbouring_samples_and_draws_are_unrelated_number_by_number():
    first = np.array([[noise.uniform(0, sample, draw, "flip") for draw in range(50)] for sample in range(50)])
    assert abs(np.corrcoef(first[:, 1:].ravel(), first[:, :-1].ravel())[0, 1]) < 0.09  # 4.4 standard errors
    assert abs(np.corrcoef(first[1:].ravel(), first[:-1].ravel())[0, 1]) < 0.09


def test_no_two_streams_begin_alike():
    edges = (0, 1, 2, 2**32, 2**63, 2**64 - 1)
    begins = {
        noise.generator(seed, sample, draw, stream).bit_generator.random_raw()
        for seed, sample, draw, stream in product(edges, edges, edges, ("noise", "timestep", "order"))
    }
    assert len(begins) == 3 * len(edges) ** 3


def test_a_long_stream_does_not_run_into_the_next_sample_or_draw():
    long = set(noise.generator(0, 0, 0, "noise").bit_generator.random_raw(200_000).tolist())
    for sample, draw in ((1, 0), (0, 1), (2**64 - 1, 0), (0, 2**64 - 1)):
        assert long.isdisjoint(noise.generator(0, sample, draw, "noise").bit_generator.random_raw(1000).tolist())


def test_the_timestep_tells_nothing_about_the_noise():
    timesteps = [noise.timestep(0, sample, 0, 1000) for sample in range(2000)]
    means = [noise.noise(0, sample, 0, (16,)).mean() for sample in range(2000)]
    assert abs(np.corrcoef(timesteps, means)[0, 1]) < 0.1  # 4.5 standard errors


# distributions


def test_noise_is_standard_normal_in_float32():
    drawn = np.stack([noise.noise(0, sample, 0, SHAPE) for sample in range(20)]).astype(np.float64)
    assert noise.noise(0, 0, 0, SHAPE).dtype == np.float32
    assert noise.noise(0, 0, 0, SHAPE).shape == SHAPE
    tolerance = 5 / np.sqrt(drawn.size)  # five standard errors of the mean, more of the others
    assert abs(drawn.mean()) < tolerance
    assert abs(drawn.var() - 1) < np.sqrt(2) * tolerance
    assert abs((drawn**3).mean()) < np.sqrt(15) * tolerance
    assert abs((drawn**4).mean() - 3) < np.sqrt(96) * tolerance


def test_timesteps_cover_their_range_evenly():
    counts = np.bincount([noise.timestep(0, sample, 0, 10) for sample in range(5000)], minlength=10)
    assert len(counts) == 10
    assert ((counts - 500) ** 2 / 500).sum() < 33.7  # chi-squared with 9 degrees of freedom, p = 1e-4


def test_uniform_numbers_lie_in_the_unit_interval_evenly():
    drawn = np.array([noise.uniform(0, 7, draw, "caption dropout") for draw in range(5000)])
    assert drawn.min() >= 0 and drawn.max() < 1
    assert abs(drawn.mean() - 0.5) < 0.02 and abs((drawn < 0.1).mean() - 0.1) < 0.02


@pytest.mark.parametrize("n", [0, 1, 2, 1000])
def test_an_order_is_a_permutation(n: int):
    assert sorted(noise.order(0, 0, n).tolist()) == list(range(n))


def test_every_epoch_and_seed_has_its_own_order():
    orders = {tuple(noise.order(seed, epoch, 100).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


# identities


def test_sample_ids_depend_on_where_one_part_ends():
    ids = {noise.sample_id(*parts) for parts in [("ab", "c"), ("a", "bc"), ("abc",), ("abc", ""), ("c", "ab")]}
    assert len(ids) == 5


def test_strings_count_as_their_utf8_bytes():
    assert noise.sample_id("größe") == noise.sample_id("größe".encode())


def test_a_lone_surrogate_from_a_file_name_has_an_id():
    assert noise.sample_id("\udcff.png") != noise.sample_id("\udcfe.png")


def test_sample_ids_do_not_collide_and_fit_into_int64():
    ids = [noise.sample_id(f"image {i}") for i in range(20_000)]
    assert len(set(ids)) == len(ids)
    assert torch.tensor(ids, dtype=torch.int64).tolist() == ids


def test_image_seeds_do_not_collide_and_torch_takes_them():
    grid = product(range(3), ("a red circle", "a red circle ", "a blue circle"), range(12), range(12))
    seeds = [noise.image_seed(*arguments) for arguments in grid]
    assert len(set(seeds)) == len(seeds)
    for seed in seeds:
        torch.Generator().manual_seed(seed)


# limits


@pytest.mark.parametrize("value", [-1, 2**64, 0.5, float("nan"), "7", None])
def test_seeds_samples_and_draws_outside_64_bits_are_refused(value: object):
    for name, arguments in (("seed", (value, 0, 0)), ("sample_id", (0, value, 0)), ("draw", (0, 0, value))):
        with pytest.raises(UserError, match=rf"{name} must be a whole number in \[0, 2\^64\), got {value!r}"):
            noise.generator(*arguments, "noise")  # pyright: ignore[reportArgumentType]


def test_the_largest_seed_is_not_the_smallest():
    assert noise.uniform(2**64 - 1, 0, 0, "flip") != noise.uniform(0, 0, 0, "flip")


def test_numpy_integers_are_as_good_as_python_ones():
    assert noise.uniform(np.int64(1), np.uint64(2), np.int32(3), "flip") == noise.uniform(1, 2, 3, "flip")  # pyright: ignore[reportArgumentType]


def test_an_empty_range_of_timesteps_and_a_negative_length_are_refused():
    with pytest.raises(UserError, match="num_train_timesteps must be at least 1, got 0"):
        noise.timestep(0, 0, 0, 0)
    with pytest.raises(UserError, match="n must not be negative, got -1"):
        noise.order(0, 0, -1)


def test_a_latent_of_noise_costs_well_under_a_millisecond():
    noise.noise(0, 0, 0, SHAPE)
    times = []
    for sample in range(50):
        start = time.perf_counter()
        noise.noise(0, sample, 0, SHAPE)
        times.append(time.perf_counter() - start)
    assert min(times) < 1e-3  # the best of many, so that a busy machine does not fail it


# noise and timesteps of a training


def draws(noising: noise.Noising, n: int = 2000, length: int = 1000) -> np.ndarray:
    return np.array([noising.timestep(0, 7, draw, length) for draw in range(n)])


def test_without_settings_noise_and_timesteps_are_those_of_the_functions():
    noising = noise.Noising()
    np.testing.assert_array_equal(noising.noise(1, 2, 3, SHAPE), noise.noise(1, 2, 3, SHAPE))
    assert noising.timestep(1, 2, 3, 1000) == noise.timestep(1, 2, 3, 1000)


def test_an_offset_moves_every_channel_as_a_whole_and_is_the_same_at_every_asking():
    noising = noise.Noising(offset=0.1)
    moved = noising.noise(1, 2, 3, SHAPE) - noise.noise(1, 2, 3, SHAPE)
    assert moved.dtype == np.float32 and np.ptp(moved, axis=(1, 2)).max() < 1e-6
    np.testing.assert_array_equal(noising.noise(1, 2, 3, SHAPE), noising.noise(1, 2, 3, SHAPE))
    every = [noising.noise(0, 0, draw, (4, 2, 2)) - noise.noise(0, 0, draw, (4, 2, 2)) for draw in range(500)]
    assert np.std([each[:, 0, 0] for each in every]) == pytest.approx(0.1, rel=0.1)


def test_timesteps_of_a_range_are_all_of_it():
    assert set(draws(noise.Noising(min_timestep=3, max_timestep=7))) == {3, 4, 5, 6}
    assert set(draws(noise.Noising(min_timestep=8), length=10)) == {8, 9}


@pytest.mark.parametrize(("bias", "often"), [("later", (750, 1000)), ("earlier", (0, 250))])
def test_a_bias_draws_its_portion_so_many_times_as_often(bias, often):
    """Weights 3 on a quarter and 1 on the rest: half of all draws."""
    drawn = draws(noise.Noising(bias=bias, bias_multiplier=3.0), 4000)
    assert 0 <= drawn.min() < 20 and 980 < drawn.max() < 1000
    assert np.mean((often[0] <= drawn) & (drawn < often[1])) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"offset": -0.1}, "offset must be in"),
        ({"offset": float("nan")}, "offset must be in"),
        ({"min_timestep": -1}, "min_timestep must be at least 0"),
        ({"min_timestep": 5, "max_timestep": 5}, "max_timestep must be at least 6"),
        ({"bias": "late"}, "unknown bias 'late': use earlier or later"),
        ({"bias": "later", "bias_multiplier": 0.0}, "bias_multiplier must be positive"),
        ({"bias": "later", "bias_portion": 1.0}, "bias_portion must be in"),
    ],
)
def test_noising_out_of_range_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        noise.Noising(**settings)


@pytest.mark.parametrize("settings", [{"min_timestep": 1000}, {"max_timestep": 1001}])
def test_timesteps_that_the_schedule_does_not_have_are_refused(settings):
    with pytest.raises(UserError, match=rf"noising.{next(iter(settings))} lies outside of the model's schedule"):
        noise.Noising(**settings).check(1000)
