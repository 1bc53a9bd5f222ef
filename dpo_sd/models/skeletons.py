"""Models at their real shapes without the weights of anybody: of random weights, or of none on the `meta` device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo_sd.models.families import AS_USUAL, FAMILIES, FamilyName, Reading, tokenizer_of
from dpo_sd.models.stable_diffusion import Fingerprints, StableDiffusion

if TYPE_CHECKING:
    import torch

    from dpo_sd.models.quantization import Weights

UNKNOWN = Fingerprints("", "", "")  # there are no files


class RandomWeights:
    """A family at its real shape with random weights, as if it were loaded; on the `meta` device it has none.

    Args:
        name: the family.
        reading: how it reads prompts.
    """

    def __init__(self, name: FamilyName, reading: Reading = AS_USUAL):
        self.name: FamilyName = name
        self.reading = reading
        self.notes: list[str] = []

    def load(self, weights: Weights, device: torch.device | str) -> StableDiffusion:
        """The model; its networks are on the CPU, or on the `meta` device if they are to work there.

        Its vocabularies take every prompt for the same one.
        """
        import torch

        from dpo_sd.models.quantization import store

        meta = torch.device(device).type == "meta"
        with torch.device("meta" if meta else "cpu"):
            parts = skeleton(self.name)
            store(parts["unet"], weights)
        for encoder in FAMILIES[self.name].encoders:
            parts[tokenizer_of(encoder)] = _Vocabulary(parts[encoder].config.max_position_embeddings)
        return StableDiffusion.of_parts(self.name, parts, UNKNOWN, device, self.reading)


def skeleton(name: FamilyName) -> dict[str, Any]:
    """Networks and schedule of a family at their real shapes, by their names in diffusers' layout.

    Weights are random; inside `torch.device("meta")` there are none.
    """
    import transformers
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

    family = FAMILIES[name]
    parts: dict[str, Any] = {
        "unet": UNet2DConditionModel.from_config(family.settings("unet")),
        "vae": AutoencoderKL.from_config(family.settings("vae")),
    }
    for encoder, how in family.encoders.items():
        config = transformers.CLIPTextConfig(**family.settings(encoder))
        parts[encoder] = getattr(transformers, how.kind)(config)
    return parts | {"scheduler": DDPMScheduler.from_config(family.settings("scheduler"))}


def on_meta(name: FamilyName) -> StableDiffusion:
    """A model of a family at its real shape, without weights or any memory of note."""
    return RandomWeights(name).load("float32", "meta")


def blank(model: StableDiffusion) -> StableDiffusion:
    """A model of the same shape without weights, VAE, vocabularies and adapters."""
    import torch

    with torch.device("meta"):
        parts: dict[str, Any] = {"unet": type(model.unet).from_config(model.unet.config)}
        for name, encoder in zip(model.family.encoders, model.text_encoders, strict=True):
            parts[name] = type(encoder)(encoder.config)
    return StableDiffusion.of_parts(model.name, parts | {"scheduler": model.noise_scheduler}, UNKNOWN, "meta")


class _Vocabulary(NamedTuple):
    """Takes every prompt for the same one."""

    model_max_length: int
    bos_token_id: int = 0
    eos_token_id: int = 0
    pad_token_id: int = 0

    def __call__(self, prompts: list[str]) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[[0] * self.model_max_length] * len(prompts))
