"""LoRA files in the forms of Kohya, diffusers and PEFT, read into one shape."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dpo_sd.errors import UserError
from dpo_sd.lora.finding import find_lora, form_of, peft_config, peft_parts, read_header
from dpo_sd.lora.names import canonical
from dpo_sd.lora.weights import PEFT_PREFIX, PEFT_WEIGHTS, LoRAFile
from dpo_sd.models.families import NETWORKS


def read_lora(path: str | Path) -> LoRAFile:
    """Reads a LoRA in diffusers', Kohya's (with diffusers' or Stability's names) or PEFT's form.

    A module without a stated alpha has its rank for alpha, as every loader takes it.

    Args:
        path: as in `find_lora`.

    Raises:
        UserError: if the file is missing, empty, corrupt or a pickle, is no LoRA or one of another kind (DoRA, LoHa,
            LoKr), or has tensors or alphas that can be no LoRA's.
    """
    path = find_lora(path)
    file = _read_peft(path) if path.is_dir() else _read_file(path)
    for key, tensor in file.state.items():
        if tensor.ndim < 2 or not tensor.is_floating_point() or not tensor.numel() or not tensor.isfinite().all():
            raise UserError(f"{path}: {key} is no matrix of finite numbers ({tensor.dtype}, {tuple(tensor.shape)})")
    if any(not 0 < alpha < math.inf for alpha in file.alphas.values()):
        raise UserError(f"{path} has an alpha that is not positive: it would change nothing")
    return file


def _read_file(path: Path) -> LoRAFile:
    from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin
    from safetensors.torch import load_file

    header = read_header(path)
    form = form_of(header.keys)
    # diffusers cannot read these two modules of SDXL by their names in diffusers
    tensors = {re.sub(r"add_embedding_linear_([12])", _label_emb, key): t for key, t in load_file(path).items()}
    try:
        # every Stable Diffusion has two layers per block; this is read for Stability's names only
        config = SimpleNamespace(layers_per_block=2)
        converted: Any = StableDiffusionLoraLoaderMixin.lora_state_dict(tensors, unet_config=config)
    except (ValueError, IndexError) as error:
        raise UserError(f"{path} names modules that no Stable Diffusion has: {error}") from error
    tensors, stated = converted
    state = _dotted(tensors)
    ranks = {key.removesuffix(".lora_A.weight"): len(a) for key, a in state.items() if key.endswith(".lora_A.weight")}
    alphas = {key.removesuffix(".lora_A.weight"): alpha for key, alpha in _stated(stated or {}).items()}
    alphas |= _alphas_of_settings(header.adapters, ranks)
    known = {module: float(alphas.get(module, rank)) for module, rank in ranks.items()}
    return LoRAFile(state, known, path, form, header.metadata)


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


def _read_peft(folder: Path) -> LoRAFile:
    from safetensors.torch import load_file

    state: dict[str, Any] = {}
    alphas: dict[str, float] = {}
    for network, part in peft_parts(folder).items():
        found = {
            canonical(network, key.removeprefix(PEFT_PREFIX)): tensor
            for key, tensor in load_file(part / PEFT_WEIGHTS).items()
        }
        ranks = {k.removesuffix(".lora_A.weight"): len(a) for k, a in found.items() if k.endswith(".lora_A.weight")}
        stated = _alphas_of_settings({f"{network}.{key}": value for key, value in peft_config(part).items()}, ranks)
        state |= found
        alphas |= {module: float(stated.get(module, rank)) for module, rank in ranks.items()}
    return LoRAFile(state, alphas, folder, "peft", {})
