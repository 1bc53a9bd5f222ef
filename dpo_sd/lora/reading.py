"""LoRA files in the forms of Kohya, diffusers and PEFT, read into one shape."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_sd.errors import UserError
from dpo_sd.files.tensors import HeaderError, check_tensors
from dpo_sd.lora.finding import find_lora, form_of, is_checkpoint, peft_config, peft_parts, read_header
from dpo_sd.lora.names import canonical, from_sgm, plain_names
from dpo_sd.lora.weights import MAGNITUDE, PEFT_PREFIX, PEFT_WEIGHTS, LoRAFile
from dpo_sd.models.families import NETWORKS


def read_lora(path: str | Path) -> LoRAFile:
    """Reads a LoRA in diffusers', Kohya's (with diffusers' or Stability's names) or PEFT's form.

    A module without a stated alpha has its rank for alpha, as every loader takes it.

    Args:
        path: as in `find_lora`.

    Names of other trainers and programs are read too (OneTrainer, ComfyUI, a named adapter of PEFT). Tensors have the
    shapes that the file gives them, which `attaching.check_base` brings into those of a model, and float8 becomes
    float32.

    Raises:
        UserError: if the file is missing, empty, corrupt or a pickle, is no LoRA or one of another kind (LoHa, LoKr,
            DoRA in Kohya's form) or base (Flux), or has tensors or alphas that can be no LoRA's.
    """
    path = find_lora(path)
    file = _read_peft(path) if path.is_dir() else _read_checkpoint(path) if is_checkpoint(path) else _read_file(path)
    for key, tensor in file.state.items():
        if (
            tensor.ndim < (1 if key.endswith(MAGNITUDE) else 2)
            or not tensor.is_floating_point()
            or not tensor.numel()
            or not tensor.isfinite().all()
        ):
            raise UserError(f"{path}: {key} is no matrix of finite numbers ({tensor.dtype}, {tuple(tensor.shape)})")
    for module, alpha in file.alphas.items():
        if not 0 < alpha < math.inf:
            raise UserError(f"{path} has an alpha that is not positive: it is {alpha:g} for {module}")
    for part in map(file.of, file.networks):
        if lacking := [module for module in part.modules if part.dora and f"{module}{MAGNITUDE}" not in part.state]:
            raise UserError(f"{path} is a DoRA without the magnitudes of {len(lacking)} modules (first: {lacking[0]})")
    return file


def _read_file(path: Path) -> LoRAFile:
    from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin

    header, tensors = read_header(path), _load(path)
    form = form_of(tensors)
    try:
        known_to_diffusers = {_for_diffusers(name): tensor for name, tensor in tensors.items()}
        converted: Any = StableDiffusionLoraLoaderMixin.lora_state_dict(known_to_diffusers)
    except ValueError as error:
        raise UserError(f"{path} names modules that no Stable Diffusion has: {error}") from error
    converted, stated = converted
    state = _dotted(converted)
    if len(state) != sum(not name.endswith(".alpha") for name in tensors):
        raise UserError(f"{path} names a module in two ways: keep one of them")
    if unread := [key for key in state if not key.endswith((".lora_A.weight", ".lora_B.weight", MAGNITUDE))]:
        raise UserError(
            f"{path} names {len(unread)} of {len(state)} tensors in a way that is not read (first: {unread[0]}): "
            "save the LoRA again with a newer diffusers"
        )
    ranks = _ranks(state)
    alphas = {key.removesuffix(".lora_A.weight"): alpha for key, alpha in _stated(stated or {}).items()}
    alphas |= _alphas_of_settings(header.adapters, ranks)
    known = {module: float(alphas.get(module, rank)) for module, rank in ranks.items()}
    trained = {module: alpha for module, alpha in header.alphas.items() if module in known}
    return LoRAFile(state, known, path, form, header.metadata).with_alphas(trained)


def _load(file: Path) -> dict[str, Any]:
    """The tensors of a file by their plain names, in a precision that can be computed with."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        check_tensors(file)
        tensors = {
            key: tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
            for key, tensor in load_file(file).items()
        }
    except HeaderError as error:
        raise UserError(f"{file} is damaged ({error}): fetch or export it again") from error
    except (SafetensorError, KeyError, NotImplementedError) as error:
        raise UserError(
            f"{file} holds numbers that cannot be read ({error}): store them as float16 or float32"
        ) from error
    names = plain_names(tensors)
    return {names[key]: tensor for key, tensor in tensors.items()}


def _ranks(state: Mapping[str, Any]) -> dict[str, int]:
    return {key.removesuffix(".lora_A.weight"): len(a) for key, a in state.items() if key.endswith(".lora_A.weight")}


def _for_diffusers(name: str) -> str:
    """A name that diffusers' reader understands; it knows `add_embedding` by Stability's name only, and mistakes
    Stability's blocks 1 and 10 of an SD 1 for each other."""
    module, dot, ending = name.partition(".")
    return re.sub(r"add_embedding_linear_([12])", _label_emb, from_sgm(module)) + dot + ending


def _label_emb(match: re.Match[str]) -> str:
    return f"label_emb_0_{2 * int(match[1]) - 2}"


def _stated(alphas: Mapping[str, float]) -> dict[str, Any]:
    return _dotted({key.removesuffix(".alpha"): alpha for key, alpha in alphas.items()})


def _dotted(named: Mapping[str, Any]) -> dict[str, Any]:
    """The same values under canonical names of modules with PEFT's endings, from any names that diffusers has used."""
    from diffusers.utils.state_dict_utils import (
        StateDictType,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    result = {}
    for network in NETWORKS:
        part = {name.removeprefix(f"{network}."): v for name, v in named.items() if _network(name) == network}
        if network != "unet":
            part = convert_state_dict_to_peft(part, StateDictType.DIFFUSERS_OLD)
        part = convert_unet_state_dict_to_peft(part)
        result |= {canonical(network, name): value for name, value in part.items()}
    return result


def _network(name: str) -> str:
    first = name.partition(".")[0]
    return first if first in NETWORKS else "unet"  # files with nothing but a UNet's LoRA name no network


def _alphas_of_settings(settings: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    """Alphas of modules, from the settings of PEFT adapters, which may name a network or none."""
    from peft.utils.other import get_pattern_key

    alphas = {}
    for module, rank in ranks.items():
        prefix = f"{_network(module)}."
        own = {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)} or settings
        pattern = own.get("alpha_pattern") or {}
        if own.get("lora_alpha") is not None or pattern:
            alpha = pattern.get(get_pattern_key(list(pattern), module), own.get("lora_alpha", rank))
            # rank-stabilised LoRA divides by the root of the rank
            alphas[module] = alpha * math.sqrt(rank) if own.get("use_rslora") else alpha
    return alphas


def _read_checkpoint(path: Path) -> LoRAFile:
    """The policy of a training of ours at that checkpoint."""
    import torch

    content = torch.load(path, map_location="cpu", weights_only=True)
    policy = content["average"]["weights"] if "average" in content else content["adapters"]["policy"]
    return LoRAFile(policy, content["alphas"], path, "diffusers", {})


def _read_peft(folder: Path) -> LoRAFile:
    state: dict[str, Any] = {}
    alphas: dict[str, float] = {}
    for network, part in peft_parts(folder).items():
        found = {
            canonical(network, key.removeprefix(PEFT_PREFIX)): tensor
            for key, tensor in _load(part / PEFT_WEIGHTS).items()
        }
        ranks = _ranks(found)
        stated = _alphas_of_settings({f"{network}.{key}": value for key, value in peft_config(part).items()}, ranks)
        state |= found
        alphas |= {module: float(stated.get(module, rank)) for module, rank in ranks.items()}
    return LoRAFile(state, alphas, folder, "peft", {})
