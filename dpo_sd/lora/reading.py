"""LoRA files in the forms of Kohya, diffusers and PEFT, read into one shape."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo_sd.errors import UserError
from dpo_sd.files.tensors import read_header
from dpo_sd.lora.names import canonical
from dpo_sd.lora.weights import PEFT_CONFIG, PEFT_WEIGHTS, WEIGHTS_NAME, LoRAFile
from dpo_sd.models.base import PICKLES
from dpo_sd.models.families import ADAPTED

if TYPE_CHECKING:
    from dpo_sd.lora.weights import Form

_OTHER_KINDS = {
    "dora_scale": "a DoRA",
    "lora_magnitude_vector": "a DoRA",
    ".hada_": "a LoHa",
    ".lokr_": "a LoKr",
    ".oft_": "an OFT",
    ".lora_mid.": "a LoRA in three factors (Tucker)",
}
_KEYS: dict[Form, re.Pattern[str]] = {
    "diffusers": re.compile(r"(.+?)(?:\.lora_[AB]|[._]lora\.(?:down|up)|\.lora_linear_layer\.(?:down|up))\.weight"),
    "kohya": re.compile(r"(lora_(?:unet|te|te1|te2)_[^.]+)\.(?:lora_(?:down|up)\.weight|alpha)"),
    "peft": re.compile(r"base_model\.model\.(.+)\.lora_[AB]\.weight"),
}


def find_lora(path: str | Path) -> Path:
    """The LoRA file that a path means, or its folder if it has PEFT's form; headers are read.

    Args:
        path: a .safetensors file, the folder of a run, or a folder that PEFT or `save_peft` wrote.

    Raises:
        UserError: as `read_lora`.
    """
    path = _locate(path)
    for part in _peft_parts(path).values():
        _read_peft_config(part)
        _check_keys(part / PEFT_WEIGHTS, _read_header(part / PEFT_WEIGHTS).keys, "peft")
    if path.is_file():
        keys = _read_header(path).keys
        _check_keys(path, keys, _form(keys))
    return path


def lora_digest(path: str | Path) -> str:
    """SHA-256 of the LoRA that a path means, as `find_lora`: of the file, or of all files of PEFT's form in turn."""
    path = find_lora(path)
    files = [part / name for part in _peft_parts(path).values() for name in (PEFT_WEIGHTS, PEFT_CONFIG)] or [path]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def read_lora(path: str | Path) -> LoRAFile:
    """Read a LoRA in diffusers', Kohya's (diffusers' names, or SDXL's own) or PEFT's form.

    Without a stated alpha a module's alpha is its rank, as every loader takes it.

    Args:
        path: as in `find_lora`.

    Raises:
        UserError: when the file is missing, empty, corrupt or a pickle, is no LoRA, is one of another kind (DoRA, LoHa,
            LoKr), or its tensors or alphas can be no LoRA's.
    """
    path = find_lora(path)
    file = _read_peft(path) if path.is_dir() else _read_file(path)
    for key, tensor in file.state.items():
        if tensor.ndim < 2 or not tensor.is_floating_point() or not tensor.numel() or not tensor.isfinite().all():
            raise UserError(f"{path}: {key} is no matrix of finite numbers ({tensor.dtype}, {tuple(tensor.shape)})")
    if any(not 0 < alpha < math.inf for alpha in file.alphas.values()):
        raise UserError(f"{path} has an alpha that is not positive: it would change nothing")
    return file


class _Header(NamedTuple):
    keys: list[str]
    metadata: dict[str, str]
    adapters: dict[str, Any]  # of diffusers' form: the settings of its adapters


def _read_file(path: Path) -> LoRAFile:
    from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin
    from safetensors.torch import load_file

    header = _read_header(path)
    form = _form(header.keys)
    # diffusers cannot read these two modules of SDXL by their names in diffusers
    tensors = {re.sub(r"add_embedding_linear_([12])", _label_emb, key): t for key, t in load_file(path).items()}
    try:
        converted: Any = StableDiffusionLoraLoaderMixin.lora_state_dict(
            tensors,
            unet_config=SimpleNamespace(
                layers_per_block=2
            ),  # of every Stable Diffusion; read for SDXL's own names only
        )
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
    """PEFT's names under canonical ones of modules, from any that diffusers has used."""
    from diffusers.utils.state_dict_utils import (
        StateDictType,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    result = {}
    for network in ADAPTED:
        part = {name.removeprefix(f"{network}."): v for name, v in named.items() if _network(name) == network}
        if network != "unet":
            part = convert_state_dict_to_peft(part, StateDictType.DIFFUSERS_OLD)
        part = convert_unet_state_dict_to_peft(part)
        result |= {canonical(network, name): value for name, value in part.items()}
    return result


def _network(name: str) -> str:
    first = name.partition(".")[0]
    return first if first in ADAPTED else "unet"  # as of files with a UNet's LoRA only


def _alphas_of_settings(settings: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    """Alphas of modules by the settings of PEFT adapters, which are named with or without their network."""
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
    for network, part in _peft_parts(folder).items():
        found = {
            canonical(network, key.removeprefix("base_model.model.")): tensor
            for key, tensor in load_file(part / PEFT_WEIGHTS).items()
        }
        ranks = {k.removesuffix(".lora_A.weight"): len(a) for k, a in found.items() if k.endswith(".lora_A.weight")}
        stated = _alphas_of_settings(
            {f"{network}.{key}": value for key, value in _read_peft_config(part).items()}, ranks
        )
        state |= found
        alphas |= {module: float(stated.get(module, rank)) for module, rank in ranks.items()}
    return LoRAFile(state, alphas, folder, "peft", {})


def _peft_parts(path: Path) -> dict[str, Path]:
    """The folders of PEFT's form by network: a UNet's alone, or one for each network inside of it."""
    if (path / PEFT_CONFIG).is_file():
        return {"unet": path}
    return {network: path / network for network in ADAPTED if (path / network / PEFT_CONFIG).is_file()}


def _read_peft_config(folder: Path) -> dict[str, Any]:
    file, weights = folder / PEFT_CONFIG, folder / PEFT_WEIGHTS
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind = config.get("peft_type", "LORA")
        _check_numbers(config, [""])
    except (ValueError, AttributeError, OSError) as error:
        raise UserError(f"{file} is damaged ({error}): fetch or export it again") from error
    if kind != "LORA" or config.get("use_dora"):
        raise UserError(f"{folder} holds {'DoRA' if kind == 'LORA' else kind}, not a plain LoRA: only those are read")
    if not weights.is_file():
        if (pickle := weights.with_suffix(".bin")).is_file():
            _refuse_pickle(pickle)
        raise UserError(f"{folder} has a {PEFT_CONFIG} without {PEFT_WEIGHTS}: copy the whole folder")
    return config


def _locate(path: str | Path) -> Path:
    if not str(path):
        raise UserError("the path of the LoRA is empty: name a .safetensors file or a run folder")
    path = Path(path).expanduser()
    if path.name == PEFT_WEIGHTS and (path.parent / PEFT_CONFIG).is_file():
        path = path.parent  # the file alone does not say its alphas
    if path.is_dir():
        inside = [path / "lora" / WEIGHTS_NAME, path / WEIGHTS_NAME]
        found = next((file for file in inside if file.is_file()), path if _peft_parts(path) else None)
        if found is None:
            raise UserError(
                f"{path} is a folder without lora/{WEIGHTS_NAME} and without {PEFT_CONFIG}: "
                "name a .safetensors file, a run folder or a folder of PEFT's form"
            )
        return found
    if not path.is_file():
        folder = path.parent
        names = sorted(os.listdir(folder)) if folder.is_dir() else []
        nearest = get_close_matches(path.name, names, 1)
        where = "that folder does not exist" if not folder.is_dir() else "nothing in that folder has a similar name"
        raise UserError(f"{path} does not exist; " + (f"nearest: {folder / nearest[0]}" if nearest else where))
    return path


def _read_header(path: Path) -> _Header:
    with open(path, "rb") as file:
        start = file.read(9)
    if not start:
        raise UserError(f"{path} is empty")
    # eight bytes of length and a brace open a safetensors file, whatever it is called
    if not start.endswith(b"{") and (path.suffix in PICKLES or start.startswith((b"PK\x03\x04", b"\x80"))):
        _refuse_pickle(path)
    try:
        header = read_header(path)
        adapters = json.loads(header.metadata.get("lora_adapter_metadata", "{}"))
        _check_numbers(adapters, ["", *(f"{network}." for network in ADAPTED)])
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is corrupt or no safetensors file ({error}): fetch or export it again") from error
    return _Header(sorted(header.names), header.metadata, adapters)


def _check_numbers(settings: dict[str, Any], prefixes: list[str]) -> None:
    for prefix in prefixes:
        numbers = [settings.get(f"{prefix}lora_alpha", 1), *(settings.get(f"{prefix}alpha_pattern") or {}).values()]
        if not all(isinstance(number, int | float) for number in numbers):
            raise ValueError(f"lora_alpha is {numbers}")


def _refuse_pickle(path: Path) -> None:
    raise UserError(
        f"{path} is a pickle, which can run any code when it is opened, so it is not read here. Convert it once: "
        'python -c "import torch, safetensors.torch as s; '
        f"s.save_file(torch.load('{path}', weights_only=True), '{path.with_suffix('.safetensors')}')\""
    )


def _form(keys: list[str]) -> Form:
    return "kohya" if any(key.startswith(("lora_unet_", "lora_te")) for key in keys) else "diffusers"


def _check_keys(path: Path, keys: list[str], form: Form) -> None:
    def complain(what: str, named: list[str]) -> None:
        if named:
            raise UserError(f"{path} {what}: {len(named)} of {len(keys)} tensors (first: {named[0]})")

    if not keys:
        raise UserError(f"{path} holds no tensors")
    for mark, kind in _OTHER_KINDS.items():
        complain(f"is {kind}, and without these the rest would draw other pictures", [k for k in keys if mark in k])
    found = {key: match[1] for key in keys if (match := _KEYS[form].fullmatch(key))}
    if not found:
        complain("is no LoRA in diffusers', Kohya's or PEFT's form", keys)
    complain(f"holds more than a LoRA in {form} form", [key for key in keys if key not in found])
    halves = Counter(module for key, module in found.items() if not key.endswith(".alpha"))
    complain("lacks the other half of a pair", [key for key, module in found.items() if halves[module] != 2])
    sgm = [key for key in keys if re.search("_(input_blocks|middle_block|output_blocks)_", key)]
    if any(re.search("_(down_blocks|mid_block|up_blocks)_", key) for key in keys):  # diffusers would drop the sgm ones
        complain("mixes sgm names with diffusers names", sgm)
