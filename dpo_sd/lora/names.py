"""Names of a Stable Diffusion's modules: our own canonical ones, and those of LoRA files and other programs."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dpo_sd.lora.weights import PEFT_PREFIX
from dpo_sd.models.families import FAMILIES
from dpo_sd.models.stable_diffusion import StableDiffusion

if TYPE_CHECKING:
    from torch import nn

    from dpo_sd.lora.weights import Form
    from dpo_sd.models.families import Family

UNET = "lora_unet_"  # begins Kohya's names for the UNet's modules
# each network's beginnings in Kohya's files of any family
_PREFIXES = {
    network: list(dict.fromkeys(f.encoders[network].kohya for f in FAMILIES.values() if network in f.encoders))
    for network in dict.fromkeys(network for family in FAMILIES.values() for network in family.encoders)
}
_STARTS = "|".join([UNET, *(prefix for prefixes in _PREFIXES.values() for prefix in prefixes)])
KEYS: dict[Form, re.Pattern[str]] = {  # names of tensors in LoRA files by their form; the group is the module
    "diffusers": re.compile(r"(.+?)(?:\.lora_[AB]|[._]lora\.(?:down|up)|\.lora_linear_layer\.(?:down|up))\.weight"),
    "kohya": re.compile(rf"((?:{_STARTS})[^.]+)\.(?:lora_(?:down|up)\.weight|alpha)"),
    "peft": re.compile(rf"{re.escape(PEFT_PREFIX)}(.+)\.lora_[AB]\.weight"),
}

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
    """The modules of a network that a LoRA can adapt, by the names that they have in it."""
    from torch import nn

    return {name: module for name, module in network.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}


def modules_of(model: StableDiffusion) -> dict[str, str]:
    """Canonical names of all modules that a LoRA can adapt, with their names in their network.

    Args:
        model: a model without adapters.
    """
    networks = model.networks.items()
    return {canonical(name, module): module for name, network in networks for module in adaptable(network)}


def sgm_name(module: str) -> str:
    """Stability's name for a module of SDXL's UNet, such as `input_blocks.1.0.in_layers.2` for
    `down_blocks.0.resnets.0.conv1`.

    Stability numbers places through all blocks. Going down, place 0 is the first convolution, and each block has three:
    two resnets with their attentions, and a sampler. Going up, each block has three resnets, the last with the sampler.
    """
    head, _, last = module.rpartition(".")
    if ".resnets." in module:
        module = f"{head}.{_IN_RESNETS[last]}"
    for pattern, name in _SGM:
        if match := re.fullmatch(pattern, module):
            return name(match)
    raise ValueError(f"no module of SDXL's UNet: {module}")


def kohya_name(module: str, family: Family) -> str:
    """Kohya's name for a module, given by its canonical name.

    SD 1 and 2 keep diffusers' names and `lora_te_`, without which InvokeAI misses the text encoder. SDXL has
    Stability's names, as Kohya's own trainer writes them: of diffusers' names A1111 misses
    `up_blocks_0_upsamplers_0_conv`, and A1111 and diffusers `add_embedding`, while all four programs read every one of
    Stability's.
    """
    network, _, inside = module.partition(".")
    if network in family.encoders:
        return family.encoders[network].kohya + underscored(inside)
    return UNET + underscored(sgm_name(inside) if family.sgm_names else inside)


def underscored(module: str) -> str:
    return module.replace(".", "_")


def kohya_names(module: str, family: Family) -> list[str]:
    """All names for a module in Kohya's files, with diffusers' or Stability's names, whoever reads them."""
    network, _, inside = module.partition(".")
    if network in _PREFIXES:
        return [prefix + underscored(inside) for prefix in _PREFIXES[network]]
    sgm = [sgm_name(inside)] if family.sgm_names else []
    return [UNET + underscored(name) for name in [inside, *sgm]]
