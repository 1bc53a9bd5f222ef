"""Other programs' names for the modules of a Stable Diffusion, and what of a LoRA file each of them reads.

The rules are those of ComfyUI, A1111, InvokeAI and diffusers for plain LoRAs; the modules are those of the family's
networks at their real shapes, which are built without weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_sd.models import Family, Fingerprints, StableDiffusion, quiet_libraries, skeleton

if TYPE_CHECKING:
    from torch import nn

ADAPTED = ("unet", "text_encoder", "text_encoder_2")  # networks, as diffusers names them
PROGRAMS = ("ComfyUI", "A1111", "InvokeAI", "diffusers")

_KOHYA_KEY = re.compile(r"(lora_(?:unet|te|te1|te2)_[^.]+)\.(?:lora_(?:down|up)\.weight|alpha)")
_DOTTED_KEY = re.compile(r"(.+)\.lora_[AB]\.weight")
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
        return "lora_unet_" + _flat(sgm_name(inside) if family == "sdxl" else inside)
    prefix = {"text_encoder": "lora_te1_" if family == "sdxl" else "lora_te_", "text_encoder_2": "lora_te2_"}[network]
    return prefix + _flat(inside)


def unmatched(path: str | Path, model: StableDiffusion) -> dict[str, list[str]]:
    """The keys of a LoRA file in Kohya's or diffusers' form that a program would leave unread, by program.

    For `tiny` only diffusers is asked: the others have no model of that size.

    Args:
        model: of the shape that the LoRA is for, without adapters; its weights are not read.
    """
    keys, modules = keys_of(path), modules_of(model)
    loaded = diffusers_scales(path, model)
    read_by = {"diffusers": {n for m in loaded for n in [m, *_kohya_names(m, model.name)]}}
    if model.name != "tiny":
        for program, reads in (("ComfyUI", _comfyui), ("A1111", _a1111), ("InvokeAI", _invokeai)):
            read_by[program] = {name for module in modules for name in reads(module, model.name)}
    if model.name == "sdxl":  # InvokeAI converts all names of Stability's, or refuses the file
        sgm = {"lora_unet_" + _flat(sgm_name(module[5:])) for module in modules if module.startswith("unet.")}
        if len({_stem(key) in sgm for key in keys if key.startswith("lora_unet_")}) > 1:
            read_by["InvokeAI"] = set()
    return {
        program: [key for key in keys if _stem(key) not in read_by[program]]
        for program in PROGRAMS
        if program in read_by
    }


def loader_report(path: str | Path, model: StableDiffusion) -> list[str]:
    """One line per program: `ComfyUI   0 unmatched keys of 96`, and the first of them where there are any."""
    total = len(keys_of(path))
    return [
        f"{program:<10}{len(keys)} unmatched keys of {total}" + (f" (first: {keys[0]})" if keys else "")
        for program, keys in unmatched(path, model).items()
    ]


def keys_of(path: str | Path) -> list[str]:
    """The names of the tensors in a file."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return sorted(file.keys())


def diffusers_scales(path: str | Path, model: StableDiffusion) -> dict[str, float]:
    """What diffusers' own loader makes of a file: the modules it adapts, and by what it multiplies each of them.

    Nothing at all for a file that it refuses.

    Args:
        model: as in `unmatched`.
    """
    from peft.tuners.lora import LoraLayer

    quiet_libraries()
    model = blank(model)
    pipeline: Any = model.pipeline()
    try:
        pipeline.load_lora_weights(str(Path(path).parent), weight_name=Path(path).name, local_files_only=True)
    except (ValueError, KeyError, IndexError, RuntimeError):
        return {}
    return {
        canonical(name, module): next(iter(layer.scaling.values()))
        for name, network in model.networks.items()
        for module, layer in network.named_modules()
        if isinstance(layer, LoraLayer)
    }


def _flat(module: str) -> str:
    return module.replace(".", "_")


def _stem(key: str) -> str:
    match = _KOHYA_KEY.fullmatch(key) or _DOTTED_KEY.fullmatch(key)
    return match[1] if match else key


def _kohya_names(module: str, family: Family) -> list[str]:
    """Kohya's names for a module in either dialect, whoever reads them."""
    network, _, inside = module.partition(".")
    if network != "unet":
        prefixes = {"text_encoder": ["lora_te_", "lora_te1_"], "text_encoder_2": ["lora_te2_"]}[network]
        return [prefix + _flat(inside) for prefix in prefixes]
    sgm = [sgm_name(inside)] if family == "sdxl" else []
    return ["lora_unet_" + _flat(name) for name in [inside, *sgm]]


def _comfyui(module: str, family: Family) -> Iterable[str]:
    if module == "text_encoder_2.text_projection":
        return _kohya_names(module, family)
    # of attention it knows the names of diffusers' older files only
    dotted = [] if module.startswith("unet.") and ".to_" in module else [module]
    return [*_kohya_names(module, family), *dotted]


def _a1111(module: str, family: Family) -> Iterable[str]:
    network, _, inside = module.partition(".")
    if inside == "text_projection":
        return []
    if network == "unet":
        names = _kohya_names(module, family)
        wrong = family == "sdxl" and (inside == "up_blocks.0.upsamplers.0.conv" or inside.startswith("add_embedding."))
        return names[1:] if wrong else names
    if network == "text_encoder":  # lora_te1_ is for CLIP-L, which SD 2 has not; lora_te_ is not for SDXL
        allowed = {"sd15": ("lora_te_", "lora_te1_"), "sd21": ("lora_te_",), "sdxl": ("lora_te1_",)}[family]
        return [name for name in _kohya_names(module, family) if name.startswith(allowed)]
    return _kohya_names(module, family)


def _invokeai(module: str, family: Family) -> Iterable[str]:
    if module.startswith("text_encoder."):
        return [kohya_name(module, family)]
    return _kohya_names(module, family)
