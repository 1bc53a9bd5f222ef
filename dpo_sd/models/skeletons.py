"""Models at their real shape without weights."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from dpo_sd.models.families import ADAPTED, SHAPES, TINY, Family
from dpo_sd.models.stable_diffusion import Fingerprints, StableDiffusion

if TYPE_CHECKING:
    pass


def skeleton(name: Family, **changes: Any) -> dict[str, Any]:
    """The networks of a family at their real shapes, without weights: on the `meta` device inside `torch.device`.

    Args:
        name: of the family.
        changes: settings of the UNet that differ, for smaller or larger ones.

    Returns:
        "unet", "vae", "text_encoder" and for SDXL "text_encoder_2", frozen; and "scheduler".
    """
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    folder = TINY if name == "tiny" else SHAPES / name

    def settings(part: str, file: str = "config.json") -> dict[str, Any]:
        return json.loads((folder / part / file).read_text(encoding="utf-8"))

    parts: dict[str, Any] = {
        "unet": UNet2DConditionModel.from_config(settings("unet") | changes),
        "vae": AutoencoderKL.from_config(settings("vae")),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**settings("text_encoder"))),
    }
    if name == "sdxl":
        parts["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(**settings("text_encoder_2")))
    for network in parts.values():
        network.eval().requires_grad_(False)
    return parts | {"scheduler": DDPMScheduler.from_config(settings("scheduler", "scheduler_config.json"))}


def on_meta(family: Family) -> StableDiffusion:
    """A model of a family at its real shape, without weights, vocabulary or any memory of note."""
    import torch

    with torch.device("meta"):
        return _without_weights(family, skeleton(family))


def blank(model: StableDiffusion) -> StableDiffusion:
    """A model of the same shape without weights, vocabulary and adapters."""
    import torch

    with torch.device("meta"):
        parts: dict[str, Any] = {"unet": type(model.unet).from_config(model.unet.config), "vae": None}
        parts |= {name: type(n)(n.config) for name, n in zip(ADAPTED[1:], model.text_encoders, strict=False)}
    return _without_weights(model.name, parts | {"scheduler": model.noise_scheduler})


def _without_weights(family: Family, parts: dict[str, Any]) -> StableDiffusion:
    encoders = [parts[name] for name in ADAPTED[1:] if name in parts]
    nothing: Any = [None] * len(encoders)
    unknown = Fingerprints("", "", "")
    return StableDiffusion(family, parts["unet"], parts["vae"], encoders, nothing, parts["scheduler"], unknown)
