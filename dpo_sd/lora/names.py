"""Names of a Stable Diffusion's modules: our own canonical ones, and those of LoRA files and other programs."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal

from dpo_sd.errors import UserError
from dpo_sd.lora.weights import MAGNITUDE, PEFT_PREFIX
from dpo_sd.models.families import FAMILIES, NETWORKS
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
    "diffusers": re.compile(
        r"(.+?)(?:(?:\.lora_[AB]|[._]lora\.(?:down|up)|\.lora_linear_layer\.(?:down|up))\.weight"
        rf"|{re.escape(MAGNITUDE)})"
    ),
    "kohya": re.compile(rf"((?:{_STARTS})[^.]+)\.(?:lora_(?:down|up)\.weight|alpha)"),
    "peft": re.compile(rf"{re.escape(PEFT_PREFIX)}(.+)(?:\.lora_[AB]\.weight|{re.escape(MAGNITUDE)})"),
}
# beginnings of dotted names in files of OneTrainer, ComfyUI and others, and Kohya's for the same network
_DOTTED_STARTS = {
    **dict.fromkeys(("", "unet", "lora_unet", "diffusion_model", "model.diffusion_model"), UNET),
    **dict.fromkeys(("text_encoder", "lora_te", "lora_te1", "clip_l", "clip_h"), "lora_te_"),
    **dict.fromkeys(("text_encoders.clip_l.transformer", "text_encoders.clip_h.transformer"), "lora_te_"),
    **dict.fromkeys(("text_encoder_2", "lora_te2", "clip_g", "text_encoders.clip_g.transformer"), "lora_te2_"),
}
_SGM_BLOCKS = "input_blocks|middle_block|output_blocks|time_embed|label_emb|out"
_BLOCKS = f"down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding|{_SGM_BLOCKS}"
_DOTTED = re.compile(
    rf"(?:({'|'.join(map(re.escape, filter(None, _DOTTED_STARTS)))})\.|(?=(?:{_BLOCKS})\.))"
    r"(.+?)\.(?:lora_(A|B|down|up)\.weight|alpha)"
)

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


def plain_names(keys: Iterable[str]) -> dict[str, str]:
    """The names that diffusers or Kohya's trainer would give the tensors of a LoRA file, by the names in the file.

    A name that is unknown stays as it is. Dotted names of a file are those of diffusers, unless one of them ends as
    Kohya's do or names a block as Stability's code does: then all of them become Kohya's.
    """
    names = {key: _without_wrapping(key) for key in keys}
    dotted = {key: match for key, name in names.items() if (match := _DOTTED.fullmatch(name))}
    as_diffusers = all(
        match[1] in (None, *NETWORKS) and match[3] in ("A", "B") and not re.match(rf"(?:{_SGM_BLOCKS})\.", match[2])
        for match in dotted.values()
    )
    return names if as_diffusers else names | {key: _as_kohya(match) for key, match in dotted.items()}


def _without_wrapping(key: str) -> str:
    key = re.sub(r"\.lora_([AB])\.[^.]+\.weight$", r".lora_\1.weight", key)  # the name of peft's adapter
    key = re.sub(rf"{re.escape(MAGNITUDE)}(\.[^.]+)?\.weight$", MAGNITUDE, key)
    return re.sub(rf"^({'|'.join(NETWORKS)})\.{re.escape(PEFT_PREFIX)}", r"\1.", key)


def _as_kohya(match: re.Match[str]) -> str:
    start, module, half = match.groups(default="")
    ending = f"lora_{ {'A': 'down', 'B': 'up'}.get(half, half) }.weight" if half else "alpha"
    return f"{_DOTTED_STARTS[start]}{underscored(module)}.{ending}"


def from_sgm(module: str) -> str:
    """diffusers' name, in Kohya's form, for a block of the UNet that a Kohya file names as Stability's code does.

    The opposite of `sgm_name`, for SD 1 and 2 too; names outside of blocks stay as they are.

    Raises:
        ValueError: if there is no such block.
    """
    if match := re.match(rf"{UNET}middle_block_([012])_", module):
        place = int(match[1])
        return f"{UNET}mid_block_{'attentions_0' if place == 1 else f'resnets_{place // 2}'}_{module[match.end() :]}"
    if match := re.fullmatch(rf"{UNET}(input|output)_blocks_(\d+)_([012])_(.+)", module):
        way = {"input": "down", "output": "up"}[match[1]]
        block, layer = divmod(int(match[2]) - (way == "down"), 3)
        if match[4] in ("op", "conv"):
            return f"{UNET}{way}_blocks_{block}_{way}samplers_0_conv"
        if match[3] != "2":
            return f"{UNET}{way}_blocks_{block}_{('resnets', 'attentions')[int(match[3])]}_{layer}_{match[4]}"
    if re.match(rf"{UNET}(input_blocks|middle_block|output_blocks)_(?!0_0$)", module):
        raise ValueError(module)
    return module


def part_of(name: str) -> Literal["A", "B", "alpha", "magnitude"]:
    """The part of its module that a tensor of a plain name is."""
    if name.endswith(".alpha"):
        return "alpha"
    if name.endswith(MAGNITUDE):
        return "magnitude"
    return "A" if name.endswith(("lora_A.weight", "down.weight")) else "B"


def underscored(module: str) -> str:
    return module.replace(".", "_")


def kohya_convolutions(modules: Iterable[str], family: Family) -> set[str]:
    """The modules, of those given, that are linear in SD 2 and that Kohya's trainer has as convolutions of one pixel.

    It builds the UNet of SD 2 like that of SD 1 and refuses weights of another shape. ComfyUI, A1111 and InvokeAI
    multiply the halves whatever their shape; diffusers refuses what is no matrix.
    """
    return {module for module in modules if family.kohya_v2 and module.endswith((".proj_in", ".proj_out"))}


def kohya_names(module: str, family: Family) -> list[str]:
    """All names for a module in Kohya's files, with diffusers' or Stability's names, whoever reads them."""
    network, _, inside = module.partition(".")
    if network in _PREFIXES:
        return [prefix + underscored(inside) for prefix in _PREFIXES[network]]
    sgm = [sgm_name(inside)] if family.sgm_names else []
    return [UNET + underscored(name) for name in [inside, *sgm]]


def check_parts(setting: str, values: object, kind: type | tuple[type, ...]) -> None:
    """Raises UserError unless the values are None, or numbers of that kind by dotted parts of names."""
    if values is None:
        return
    fitting = isinstance(values, Mapping) and all(
        isinstance(value, kind) and not isinstance(value, bool) for value in values.values()
    )
    if not fitting:
        raise UserError(f"{setting} must be numbers by parts of names, such as {{mid_block: 2}}, got {values!r:.100}")


def having(part: str, modules: Collection[str], setting: str) -> list[str]:
    """The modules of whose dotted names `part` is a part: `mid_block`, `attn1` or `up_blocks.1` for example.

    Args:
        setting: what the message calls the setting that names the part.

    Raises:
        UserError: if there is none, with the nearest parts.
    """
    found = [module for module in modules if f".{part}." in f".{module}."]
    if not found:
        parts = {piece for module in modules for piece in module.split(".") if not piece.isdigit()}
        parts |= {".".join(module.split(".")[:n]) for module in modules for n in (2, 3)}
        nearest = get_close_matches(part, sorted(parts), 3, 0.3) or sorted(parts)[:3]
        raise UserError(f"{setting}: '{part}' is part of no adapted module's name; nearest: {', '.join(nearest)}")
    return found
