"""The LoRA that a path means, if it is one: names and headers are read, no tensors."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo_sd.errors import UserError
from dpo_sd.files import tensors
from dpo_sd.lora.names import KEYS
from dpo_sd.lora.weights import PEFT_CONFIG, PEFT_WEIGHTS, WEIGHTS_NAME
from dpo_sd.models.families import NETWORKS
from dpo_sd.models.places import PICKLES

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


def find_lora(path: str | Path) -> Path:
    """The LoRA file that a path means, or the folder of a LoRA in PEFT's form, after a look at headers.

    Args:
        path: a .safetensors file, the folder of a run, or a folder that PEFT or `save_peft` wrote.

    Raises:
        UserError: if it is no LoRA that can be read; see `reading.read_lora`.
    """
    path = _locate(path)
    for part in peft_parts(path).values():
        peft_config(part)
        _check_keys(part / PEFT_WEIGHTS, read_header(part / PEFT_WEIGHTS).keys, "peft")
    if path.is_file():
        keys = read_header(path).keys
        _check_keys(path, keys, form_of(keys))
    return path


def lora_digest(path: str | Path) -> str:
    """SHA-256 of the LoRA that a path means: of its file, or in PEFT's form of all files in turn; see `find_lora`."""
    path = find_lora(path)
    files = [part / name for part in peft_parts(path).values() for name in (PEFT_WEIGHTS, PEFT_CONFIG)] or [path]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _locate(path: str | Path) -> Path:
    if not str(path):
        raise UserError("the path of the LoRA is empty: name a .safetensors file or a run folder")
    path = Path(path).expanduser()
    if path.name == PEFT_WEIGHTS and (path.parent / PEFT_CONFIG).is_file():
        path = path.parent  # the file alone does not say its alphas
    if path.is_dir():
        inside = [path / "lora" / WEIGHTS_NAME, path / WEIGHTS_NAME]
        found = next((file for file in inside if file.is_file()), path if peft_parts(path) else None)
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


class Header(NamedTuple):
    """The header of a LoRA file.

    Args:
        keys: names of the tensors, sorted.
        metadata: strings by name.
        adapters: settings of the adapters, which diffusers' form keeps in its metadata.
    """

    keys: list[str]
    metadata: dict[str, str]
    adapters: dict[str, Any]


def peft_parts(path: Path) -> dict[str, Path]:
    """The folders of PEFT's form by network: a UNet's alone, or one for each network inside of it."""
    if (path / PEFT_CONFIG).is_file():
        return {"unet": path}
    return {network: path / network for network in NETWORKS if (path / network / PEFT_CONFIG).is_file()}


def peft_config(folder: Path) -> dict[str, Any]:
    """The settings of one network's adapter in PEFT's form; raises UserError if they are no plain LoRA's."""
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


def read_header(path: Path) -> Header:
    """The header of a safetensors file; raises UserError if it is none, or a pickle."""
    with open(path, "rb") as file:
        start = file.read(9)
    if not start:
        raise UserError(f"{path} is empty")
    # eight bytes of length and a brace open a safetensors file, whatever it is called
    if not start.endswith(b"{") and (path.suffix in PICKLES or start.startswith((b"PK\x03\x04", b"\x80"))):
        _refuse_pickle(path)
    try:
        header = tensors.read_header(path)
        adapters = json.loads(header.metadata.get("lora_adapter_metadata", "{}"))
        _check_numbers(adapters, ["", *(f"{network}." for network in NETWORKS)])
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is corrupt or no safetensors file ({error}): fetch or export it again") from error
    return Header(sorted(header.names), header.metadata, adapters)


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


def form_of(keys: list[str]) -> Form:
    """Kohya's or diffusers' form, by the names of a file's tensors."""
    return "kohya" if any(key.startswith(("lora_unet_", "lora_te")) for key in keys) else "diffusers"


def _check_keys(path: Path, keys: list[str], form: Form) -> None:
    def complain(what: str, named: list[str]) -> None:
        if named:
            raise UserError(f"{path} {what}: {len(named)} of {len(keys)} tensors (first: {named[0]})")

    if not keys:
        raise UserError(f"{path} holds no tensors")
    for mark, kind in _OTHER_KINDS.items():
        complain(f"is {kind}, and without these the rest would draw other pictures", [k for k in keys if mark in k])
    found = {key: match[1] for key in keys if (match := KEYS[form].fullmatch(key))}
    if not found:
        complain("is no LoRA in diffusers', Kohya's or PEFT's form", keys)
    complain(f"holds more than a LoRA in {form} form", [key for key in keys if key not in found])
    halves = Counter(module for key, module in found.items() if not key.endswith(".alpha"))
    complain("lacks the other half of a pair", [key for key, module in found.items() if halves[module] != 2])
    sgm = [key for key in keys if re.search("_(input_blocks|middle_block|output_blocks)_", key)]
    if any(re.search("_(down_blocks|mid_block|up_blocks)_", key) for key in keys):  # diffusers would drop the sgm ones
        complain("mixes sgm names with diffusers names", sgm)
