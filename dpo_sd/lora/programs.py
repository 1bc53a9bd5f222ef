"""The keys of a LoRA file that ComfyUI, A1111, InvokeAI and diffusers read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_sd.lora.finding import read_header
from dpo_sd.lora.names import KEYS, UNET, canonical, kohya_name, kohya_names, modules_of, sgm_name, underscored
from dpo_sd.models.hub import quiet_libraries
from dpo_sd.models.skeletons import blank
from dpo_sd.models.stable_diffusion import StableDiffusion

if TYPE_CHECKING:
    from dpo_sd.models.families import Family


def unmatched(path: str | Path, model: StableDiffusion) -> dict[str, list[str]]:
    """The keys of a LoRA file in Kohya's or diffusers' form that a program would leave unread, by program.

    Only programs that have a model of this family are asked.

    Args:
        model: one of the shape that the LoRA is for, without adapters; its weights are not read.
    """
    family, keys, modules = model.family, read_header(Path(path)).keys, modules_of(model)
    read_by = {
        program: {name for module in modules for name in reads(module, family)}
        for program, reads in _READS.items()
        if program in family.programs
    }
    read_by["diffusers"] = {n for m in diffusers_scales(path, model) for n in [m, *kohya_names(m, family)]}
    if family.sgm_names and _mixed(keys, modules):  # InvokeAI converts all names of Stability's, or refuses the file
        read_by["InvokeAI"] = set()
    return {program: [key for key in keys if _module(key) not in names] for program, names in read_by.items()}


def loader_report(path: str | Path, model: StableDiffusion) -> list[str]:
    """One line per program: `ComfyUI   0 unmatched keys of 96`, and the first of them where there are any."""
    total = len(read_header(Path(path)).keys)
    return [
        f"{program:<10}{len(keys)} unmatched keys of {total}" + (f" (first: {keys[0]})" if keys else "")
        for program, keys in unmatched(path, model).items()
    ]


def diffusers_scales(path: str | Path, model: StableDiffusion) -> dict[str, float]:
    """The modules that diffusers' own loader adapts by a file, with the factor at which it adds to each of them.

    There are none for a file that it refuses.

    Args:
        model: as in `unmatched`.
    """
    from peft.tuners.lora import LoraLayer

    quiet_libraries()
    model = blank(model)
    pipeline: Any = model.pipeline()
    log = logging.getLogger("diffusers")
    level = log.level
    log.setLevel(logging.CRITICAL)  # of what it refuses it writes a line per tensor
    try:
        pipeline.load_lora_weights(str(Path(path).parent), weight_name=Path(path).name, local_files_only=True)
    except (ValueError, KeyError, IndexError, RuntimeError):
        return {}
    finally:
        log.setLevel(level)
    return {
        canonical(name, module): next(iter(layer.scaling.values()))
        for name, network in model.networks.items()
        for module, layer in network.named_modules()
        if isinstance(layer, LoraLayer)
    }


def _module(key: str) -> str:
    match = KEYS["kohya"].fullmatch(key) or KEYS["diffusers"].fullmatch(key)
    return match[1] if match else key


def _mixed(keys: Iterable[str], modules: Iterable[str]) -> bool:
    """Whether some of the UNet's modules have Stability's names, and others do not."""
    sgm = {UNET + underscored(sgm_name(module[5:])) for module in modules if module.startswith("unet.")}
    return len({_module(key) in sgm for key in keys if key.startswith(UNET)}) > 1


def _comfyui(module: str, family: Family) -> Iterable[str]:
    if module == "text_encoder_2.text_projection":
        return kohya_names(module, family)
    # of attention it knows the names of diffusers' older files only
    dotted = [] if module.startswith("unet.") and ".to_" in module else [module]
    return [*kohya_names(module, family), *dotted]


def _a1111(module: str, family: Family) -> Iterable[str]:
    network, _, inside = module.partition(".")
    names = kohya_names(module, family)
    if network in family.encoders:
        known = family.encoders[network].a1111
        return [] if inside == "text_projection" else [name for name in names if name.startswith(known)]
    missed = inside == "up_blocks.0.upsamplers.0.conv" or inside.startswith("add_embedding.")
    return names[1:] if family.sgm_names and missed else names


def _invokeai(module: str, family: Family) -> Iterable[str]:
    if module.startswith("text_encoder."):
        return [kohya_name(module, family)]
    return kohya_names(module, family)


# the names that a program reads for a module; what diffusers reads, its own loader says
_READS: dict[str, Callable[[str, Family], Iterable[str]]] = {
    "ComfyUI": _comfyui,
    "A1111": _a1111,
    "InvokeAI": _invokeai,
}
