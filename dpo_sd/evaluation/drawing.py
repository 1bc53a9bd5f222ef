"""Images of a model with one of its adapters, from the same prompts and seeds for every side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from dpo_sd.lora.adapters import lora_layers, using
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


def draw_sides(
    sides: Sequence[Side],
    model: StableDiffusion,
    sampler: Sampler,
    prompts: Sequence[str],
    seeds: Sequence[int],
    progress: str | None = None,
) -> dict[Side, list[Image.Image]]:
    """Image i from prompt i and seed i, drawn by every side: the base, the reference or the policy.

    The prompts are encoded for all sides first, and no network is brought to the device twice.

    Args:
        progress: beginning of the titles of progress bars; None shows none.
    """
    embeds, images = {}, {}
    # without adapters the text encoders tell all sides the same
    differing = sides if any(map(lora_layers, model.text_encoders)) else sides[:1]
    with model.working(*model.text_encoders):
        for side in differing:
            with using(model, side):
                embeds[side] = sampler.encode(model, prompts)
    height, width = sampler.size(model)
    with model.drawing(height * width):
        for side in sides:
            title = None if progress is None else f"{progress}: {side}"
            with using(model, side):
                images[side] = sampler.draw(model, prompts, seeds, title, embeds.get(side, embeds[sides[0]]))
    return images
