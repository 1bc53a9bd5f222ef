"""Other programs' names for the modules of a Stable Diffusion."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dpo_sd.models.families import Family
from dpo_sd.models.stable_diffusion import StableDiffusion

if TYPE_CHECKING:
    from torch import nn

_IN_RESNETS = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_SGM: list[tuple[str, Callable[[Any], str]]] = [
    (r"conv_in", lambda m: "input_blocks.0.0"),
    (r"conv_out", lambda m: "out.2"),
    (r"time_embedding\.linear_(\d)", lambda m: f"time_embed.{2 * int(m[1]) - 2}"),
    (r"add_embedding\.linear_(\d)", lambda m: f"label_emb.0.{2 * int(m[1]) - 2}"),
    (r"down_blocks\.(\d)\.resnets\.(\d)\.(.+)", lambda m: f"input_blocks.{3 * int(m[1]) + int(m[2]) + 1}.0.{m[3]}"),
    (r"down_blocks\.(\d)\.attentions\.(\d)\.(.+)", lambda m: f"input_blocks.{3 * int(m[1]) + int(m[2]) + 1}.1.{m[3]}"),
    (r"down_blocks\.(\d)\.downsamplers\.0\.conv", lambda m: f"input_blocks.{3 * int(m[1]) + 3}.0.op"),
    (r"mid_block\.resnets\.(\d)\.(.+)", lambda m: f"middle_block.{2 * int(m[1])}.{m[2]}"),
    (r"mid_block\.attentions\.0\.(.+)", lambda m: f"middle_block.1.{m[1]}"),
    (r"up_blocks\.(\d)\.resnets\.(\d)\.(.+)", lambda m: f"output_blocks.{3 * int(m[1]) + int(m[2])}.0.{m[3]}"),
    (r"up_blocks\.(\d)\.attentions\.(\d)\.(.+)", lambda m: f"output_blocks.{3 * int(m[1]) + int(m[2])}.1.{m[3]}"),
    (r"up_blocks\.(\d)\.upsamplers\.0\.conv", lambda m: f"output_blocks.{3 * int(m[1]) + 2}.2.conv"),
]


def canonical(network: str, module: str) -> str:
    """`<network>.<module>` as LoRA files write it, whether or not this transformers nests its text model."""
    nested = network != "unet" and module.startswith("encoder.")
    return f"{network}.text_model.{module}" if nested else f"{network}.{module}"


def adaptable(network: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The modules of a network that a LoRA can adapt, by the network's own names."""
    from torch import nn

    return {name: module for name, module in network.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}


def modules_of(model: StableDiffusion) -> dict[str, str]:
    """All modules that a LoRA can adapt, of a model without adapters: canonical names, with the networks' own."""
    networks = model.networks.items()
    return {canonical(name, module): module for name, network in networks for module in adaptable(network)}


def sgm_name(module: str) -> str:
    """What Stability's code calls a module of SDXL's UNet: `down_blocks.1.attentions.0.proj_in` is
    `input_blocks.4.1.proj_in`.
    """
    head, _, last = module.rpartition(".")
    if ".resnets." in module:
        module = f"{head}.{_IN_RESNETS[last]}"
    for pattern, name in _SGM:
        if match := re.fullmatch(pattern, module):
            return name(match)
    raise ValueError(f"no module of SDXL's UNet: {module}")


def kohya_name(module: str, family: Family) -> str:
    """What Kohya's files call a module, given by its canonical name.

    SD 1 and 2 keep diffusers' names and `lora_te_`, without which InvokeAI misses the text encoder. SDXL has
    Stability's names, as Kohya's own trainer writes them: of diffusers' names A1111 misses
    `up_blocks_0_upsamplers_0_conv`, and A1111 and diffusers `add_embedding`, while all four programs read every one of
    Stability's.
    """
    network, _, inside = module.partition(".")
    if network == "unet":
        return "lora_unet_" + underscored(sgm_name(inside) if family == "sdxl" else inside)
    prefix = {"text_encoder": "lora_te1_" if family == "sdxl" else "lora_te_", "text_encoder_2": "lora_te2_"}[network]
    return prefix + underscored(inside)


def underscored(module: str) -> str:
    return module.replace(".", "_")


def kohya_names(module: str, family: Family) -> list[str]:
    """Kohya's names for a module in either dialect, whoever reads them."""
    network, _, inside = module.partition(".")
    if network != "unet":
        prefixes = {"text_encoder": ["lora_te_", "lora_te1_"], "text_encoder_2": ["lora_te2_"]}[network]
        return [prefix + underscored(inside) for prefix in prefixes]
    sgm = [sgm_name(inside)] if family == "sdxl" else []
    return ["lora_unet_" + underscored(name) for name in [inside, *sgm]]
