"""Randomness as a function of (seed, sample, draw): nothing to save, nothing that depends on batches or workers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from numbers import Integral
from typing import Literal, get_args

import numpy as np

from dpo_sd.errors import UserError, check_range


def check_uint64(name: str, value: int) -> None:
    """Refuse a value that is not a whole number in [0, 2^64).

    Args:
        name: what the message calls the value.
        value: the one to check.

    Raises:
        UserError: if it is not a whole number or out of range.
    """
    if not isinstance(value, Integral) or not 0 <= value < 2**64:
        raise UserError(f"{name} must be a whole number in [0, 2^64), got {value!r}")


def sample_id(*parts: str | bytes) -> int:
    """Identity of a sample by its content, in [0, 2^63): the same parts in the same order give the same number.

    Args:
        parts: what makes the sample what it is, such as image bytes or a prompt; strings count as UTF-8.
    """
    # 63 bits: fits torch.int64, in which batches carry it
    return _hash(*parts) >> 1


def generator(seed: int, sample_id: int, draw: int, stream: str) -> np.random.Generator:
    """The generator of one sample at one visit for one purpose, always in the same initial state.

    Args:
        seed: seed of the run, in [0, 2^64).
        sample_id: identity of the sample, in [0, 2^64).
        draw: how many times the sample was visited before, in [0, 2^64).
        stream: the purpose; "noise", "offset", "timestep", "order" and "image" are taken by the functions below.

    Raises:
        UserError: if a number is not a whole one or out of range.
    """
    check_uint64("seed", seed)
    check_uint64("sample_id", sample_id)
    check_uint64("draw", draw)
    # Philox turns (key, counter) into bits by a bijection of the counter. Each (sample_id, draw) begins 2^128 counts
    # from the next, more than any generator uses up, so no two of them share a block; each (seed, stream) has a
    # bijection of its own.
    key = np.array([seed, _hash(stream)], dtype=np.uint64)
    counter = np.array([0, 0, sample_id, draw], dtype=np.uint64)  # lowest word first
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def noise(seed: int, sample_id: int, draw: int, shape: Sequence[int]) -> np.ndarray:
    """Standard normal noise of the given shape in float32, one per pair: chosen and rejected share it.

    Args:
        seed, sample_id, draw: as for `generator`.
        shape: (C, H, W) of the latent.
    """
    return generator(seed, sample_id, draw, "noise").standard_normal(tuple(shape), dtype=np.float32)


def timestep(seed: int, sample_id: int, draw: int, num_train_timesteps: int) -> int:
    """A timestep, uniform in [0, num_train_timesteps).

    Args:
        seed, sample_id, draw: as for `generator`.
        num_train_timesteps: length of the noise schedule, at least 1.

    Raises:
        UserError: if num_train_timesteps is below 1.
    """
    if num_train_timesteps < 1:
        raise UserError(f"num_train_timesteps must be at least 1, got {num_train_timesteps}")
    return int(generator(seed, sample_id, draw, "timestep").integers(num_train_timesteps))


Bias = Literal["earlier", "later"]


class Noising:
    """Settings of the noise and the timesteps that training samples get; the validation's are not changed.

    Args:
        offset: standard deviation of a further noise that a whole channel shares, in [0, 1]; 0.05 to 0.1 lets dark and
            bright images be learnt (crosslabs.org, "Diffusion with Offset Noise", 2023).
        min_timestep: first timestep that is drawn, at least 0.
        max_timestep: end of the timesteps that are drawn, above `min_timestep`; None takes the length of the schedule.
        bias: "later" draws the noisiest timesteps of this range more often, "earlier" the others.
        bias_multiplier: how much more often, positive.
        bias_portion: share of the range that is drawn more often, in (0, 1).

    Raises:
        UserError: if a value is out of range, or the bias would change nothing.
    """

    def __init__(
        self,
        offset: float = 0.0,
        min_timestep: int = 0,
        max_timestep: int | None = None,
        bias: Bias | None = None,
        bias_multiplier: float = 2.0,
        bias_portion: float = 0.25,
    ) -> None:
        if not 0 <= offset <= 1:
            raise UserError(f"offset must be in [0, 1], got {offset}")
        check_range("min_timestep", min_timestep, 0)
        if max_timestep is not None:
            check_range("max_timestep", max_timestep, min_timestep + 1)
        if bias not in (None, *get_args(Bias)):
            raise UserError(f"unknown bias {bias!r}: use {' or '.join(get_args(Bias))}, or leave it out")
        if not 0 < bias_multiplier < math.inf:
            raise UserError(f"bias_multiplier must be positive and finite, got {bias_multiplier}")
        if not 0 < bias_portion < 1:
            raise UserError(f"bias_portion must be in (0, 1), got {bias_portion}")
        self.offset, self.min_timestep, self.max_timestep = offset, min_timestep, max_timestep
        self.bias, self.bias_multiplier, self.bias_portion = bias, bias_multiplier, bias_portion

    def check(self, num_train_timesteps: int) -> None:
        """Refuse timesteps that a schedule does not have.

        Raises:
            UserError: if it is too short.
        """
        for name, least in (("min_timestep", self.min_timestep + 1), ("max_timestep", self.max_timestep or 1)):
            if least > num_train_timesteps:
                raise UserError(f"noising.{name} lies outside of the model's schedule, which has {num_train_timesteps}")

    def noise(self, seed: int, sample_id: int, draw: int, shape: Sequence[int]) -> np.ndarray:
        """`noise` with the offset of each channel: float32, of that shape."""
        drawn = noise(seed, sample_id, draw, shape)
        if not self.offset:
            return drawn
        channels = generator(seed, sample_id, draw, "offset").standard_normal((shape[0], 1, 1), dtype=np.float32)
        return drawn + np.float32(self.offset) * channels

    def timestep(self, seed: int, sample_id: int, draw: int, num_train_timesteps: int) -> int:
        """A timestep of the range; as likely as all others, but for the bias."""
        first, end = self.min_timestep, num_train_timesteps if self.max_timestep is None else self.max_timestep
        if self.bias is None:
            return first + timestep(seed, sample_id, draw, end - first)
        weights = np.ones(end - first)
        portion = max(1, round(self.bias_portion * len(weights)))
        weights[-portion:] = self.bias_multiplier
        if self.bias == "earlier":
            weights = weights[::-1]
        place = generator(seed, sample_id, draw, "timestep").random() * weights.sum()
        return first + int(np.searchsorted(weights.cumsum(), place, side="right"))


def uniform(seed: int, sample_id: int, draw: int, stream: str) -> float:
    """A number, uniform in [0, 1), for decisions such as caption dropout and flips.

    Args:
        seed, sample_id, draw, stream: as for `generator`.
    """
    return generator(seed, sample_id, draw, stream).random()


def order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order in which one pass over the data visits its samples: a permutation of range(n), int64.

    Args:
        seed: seed of the run, in [0, 2^64).
        epoch: number of the pass, from 0.
        n: number of samples, at least 0.

    Raises:
        UserError: if n is negative.
    """
    if n < 0:
        raise UserError(f"n must not be negative, got {n}")
    return generator(seed, 0, epoch, "order").permutation(n)


def image_seed(seed: int, prompt: str, set_index: int, k: int) -> int:
    """Seed of one generated picture, in [0, 2^63), for torch.Generator.manual_seed.

    Args:
        seed: seed of the run, in [0, 2^64).
        prompt: text of the prompt.
        set_index: which set of pictures of that prompt, from 0.
        k: which picture of the set, from 0.
    """
    picture = sample_id(prompt, str(set_index), str(k))
    return int(generator(seed, picture, 0, "image").integers(2**63))


def _hash(*parts: str | bytes) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        # surrogatepass: file names and JSON can hold lone surrogates
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))  # the length keeps ("ab", "c") apart from ("a", "bc")
        digest.update(data)
    return int.from_bytes(digest.digest(), "little")
