"""Which keys of a LoRA file ComfyUI, A1111, InvokeAI and diffusers read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dpo_sd.files.tensors import read_header
from dpo_sd.lora.names import canonical, kohya_name, kohya_names, modules_of, sgm_name, underscored
from dpo_sd.models.families import Family
from dpo_sd.models.hub import quiet_libraries
from dpo_sd.models.skeletons import blank
from dpo_sd.models.stable_diffusion import StableDiffusion

PROGRAMS = ("ComfyUI", "A1111", "InvokeAI", "diffusers")
_KOHYA_KEY = re.compile(r"(lora_(?:unet|te|te1|te2)_[^.]+)\.(?:lora_(?:down|up)\.weight|alpha)")
_DOTTED_KEY = re.compile(r"(.+)\.lora_[AB]\.weight")


def unmatched(path: str | Path, model: StableDiffusion) -> dict[str, list[str]]:
    """The keys of a LoRA file in Kohya's or diffusers' form that a program would leave unread, by program.

    For `tiny` only diffusers is asked: the others have no model of that size.

    Args:
        model: of the shape that the LoRA is for, without adapters; its weights are not read.
    """
    keys, modules = keys_of(path), modules_of(model)
    loaded = diffusers_scales(path, model)
    read_by = {"diffusers": {n for m in loaded for n in [m, *kohya_names(m, model.name)]}}
    if model.name != "tiny":
        for program, reads in (("ComfyUI", _comfyui), ("A1111", _a1111), ("InvokeAI", _invokeai)):
            read_by[program] = {name for module in modules for name in reads(module, model.name)}
    if model.name == "sdxl":  # InvokeAI converts all names of Stability's, or refuses the file
        sgm = {"lora_unet_" + underscored(sgm_name(module[5:])) for module in modules if module.startswith("unet.")}
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
    return sorted(read_header(path).names)


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


def _stem(key: str) -> str:
    match = _KOHYA_KEY.fullmatch(key) or _DOTTED_KEY.fullmatch(key)
    return match[1] if match else key


def _comfyui(module: str, family: Family) -> Iterable[str]:
    if module == "text_encoder_2.text_projection":
        return kohya_names(module, family)
    # of attention it knows the names of diffusers' older files only
    dotted = [] if module.startswith("unet.") and ".to_" in module else [module]
    return [*kohya_names(module, family), *dotted]


def _a1111(module: str, family: Family) -> Iterable[str]:
    network, _, inside = module.partition(".")
    if inside == "text_projection":
        return []
    if network == "unet":
        names = kohya_names(module, family)
        wrong = family == "sdxl" and (inside == "up_blocks.0.upsamplers.0.conv" or inside.startswith("add_embedding."))
        return names[1:] if wrong else names
    if network == "text_encoder":  # lora_te1_ is for CLIP-L, which SD 2 has not; lora_te_ is not for SDXL
        allowed = {"sd15": ("lora_te_", "lora_te1_"), "sd21": ("lora_te_",), "sdxl": ("lora_te1_",)}[family]
        return [name for name in kohya_names(module, family) if name.startswith(allowed)]
    return kohya_names(module, family)


def _invokeai(module: str, family: Family) -> Iterable[str]:
    if module.startswith("text_encoder."):
        return [kohya_name(module, family)]
    return kohya_names(module, family)
