"""Images of a model with one of its adapters, from the same prompts and seeds for every side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from dpo_sd.lora.adapters import using
from dpo_sd.noise import image_seed

if TYPE_CHECKING:
    from PIL import Image

    from dpo_sd.models.sampling import Sampler
    from dpo_sd.models.stable_diffusion import StableDiffusion

Side = Literal["base", "reference", "policy"]


class Questions(NamedTuple):
    """Prompt and seed of every image that each side draws, all images of a prompt in a row.

    Args:
        prompts, seeds: one per image, (prompts · seeds_per_prompt,).
    """

    prompts: list[str]
    seeds: list[int]


def questions(prompts: Sequence[str], seeds_per_prompt: int, seed: int) -> Questions:
    """Every prompt with `seeds_per_prompt` seeds of its own, none of which a sheet of samples has.

    Args:
        prompts: different prompts.
        seed: seed of all of them, in [0, 2^64).
    """
    seeds = [image_seed(seed, prompt, 1, k) for prompt in prompts for k in range(seeds_per_prompt)]
    return Questions([prompt for prompt in prompts for _ in range(seeds_per_prompt)], seeds)


def draw_as(
    side: Side,
    model: StableDiffusion,
    sampler: Sampler,
    prompts: Sequence[str],
    seeds: Sequence[int],
    progress: str | None = None,
) -> list[Image.Image]:
    """Image i from prompt i and seed i, drawn by the base, the reference or the policy.

    Args:
        progress: title of a progress bar; None shows none.
    """
    with using(model, side):
        return sampler.draw(model, prompts, seeds, progress)
