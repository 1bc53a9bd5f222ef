"""The LoRA that a path means, if it is one: names and headers are read, no tensors."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo_sd.errors import UserError
from dpo_sd.files import tensors
from dpo_sd.files.checksums import is_whole
from dpo_sd.files.texts import read_text
from dpo_sd.lora.names import KEYS, part_of, plain_names
from dpo_sd.lora.weights import ALPHAS_KEY, PEFT_CONFIG, PEFT_PREFIX, PEFT_WEIGHTS, SETTINGS_KEY, WEIGHTS_NAME
from dpo_sd.models.families import NETWORKS
from dpo_sd.models.places import PICKLES

if TYPE_CHECKING:
    from dpo_sd.lora.weights import Form

# of which a file's tensors tell that it is no plain LoRA, by patterns of their names
_OTHER_KINDS = {
    r"dora_scale": "is a DoRA in Kohya's form, whose scales mean one thing to one program and another to the next",
    r"\.hada_": "is a LoHa",
    r"\.lokr_": "is a LoKr",
    r"\.oft_": "is an OFT",
    r"\.(on_input|ia3_l\b)": "is an IA3",
    r"\.[ab][12]\.weight": "is a GLoRA",
    r"\.lora_E\b": "is an AdaLoRA",
    r"vera_lambda": "is a VeRA",
    r"\.lora_mid\.": "is a LoRA in three factors (Tucker)",
    r"\.(diff|diff_b|w_norm|b_norm|set_weight)$": "holds differences of whole weights (.diff)",
    r"bundle_emb|string_to_param|emb_params": "holds embeddings of words (textual inversion)",
    r"scale_weight|weight_scale|scaled_fp8|scale_input|input_scale": "is stored in scaled float8",
}
# and that it was made for something else than a Stable Diffusion with a UNet
_OTHER_BASES = {
    r"(double|single|single_transformer)_blocks[._]\d": "Flux or a model built like it",
    r"joint_(transformer_)?blocks[._]\d|(lora_te3|text_encoder_3|t5xxl)[._]": "Stable Diffusion 3",
    r"^(\w+\.|lora_unet_)?blocks[._]\d+[._](self|cross)_attn[._]": "Wan or a model built like it",
    r"^lora_prior_": "Stable Cascade",
    r"^(lora_)?transformer[._]|^(lora_unet_|diffusion_model\.)(transformer_)?(blocks|layers)[._]\d": (
        "a diffusion transformer (Stable Diffusion 3, Flux, Qwen-Image, …)"
    ),
}


# settings of PEFT's under which an adapter adds more than its two factors, or other ones
_NOT_PLAIN = (
    *("use_qalora", "use_bdlora", "lora_bias", "modules_to_save", "layer_replication", "target_parameters"),
    *("trainable_token_indices", "alora_invocation_tokens", "arrow_config"),
)
_MOVED_BASES = ("pissa", "olora", "loftq", "corda")  # beginnings of `init_lora_weights` that change the base's weights


def find_lora(path: str | Path) -> Path:
    """The LoRA file that a path means, or the folder of a LoRA in PEFT's form, after a look at headers.

    Args:
        path: a .safetensors file, the folder of a run, one of its checkpoints, or a folder that PEFT or `save_peft`
            wrote.

    Raises:
        UserError: if it is no LoRA that can be read; see `reading.read_lora`.
    """
    path = _locate(path)
    if is_checkpoint(path):
        return path
    for part in peft_parts(path).values():
        dora = bool(peft_config(part).get("use_dora"))
        _check(part / PEFT_WEIGHTS, read_header(part / PEFT_WEIGHTS).shapes, "peft", dora)
    if path.is_file():
        header = read_header(path)
        dora = any(value for name, value in header.adapters.items() if name.endswith("use_dora"))
        _check(path, header.shapes, form_of(plain_names(header.shapes).values()), dora)
    return path


def lora_digest(path: str | Path) -> str:
    """SHA-256 of the LoRA that a path means: of its file, or in PEFT's form of all files in turn; see `find_lora`."""
    path = find_lora(path)
    files = [part / name for part in peft_parts(path).values() for name in (PEFT_WEIGHTS, PEFT_CONFIG)] or [path]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def is_checkpoint(path: Path) -> bool:
    """Whether a file is a checkpoint of a training of ours, and whole; then it holds tensors and plain values only."""
    return path.suffix == ".ckpt" and is_whole(path)


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
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no regular file: name a .safetensors file or a run folder")
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
        shapes: sizes of the tensors by their names, which are sorted.
        metadata: strings by name.
        adapters: settings of the adapters, which diffusers' form keeps in its metadata.
        alphas: by module, those that a LoRA of diffusers' form was trained with, where it holds others.
    """

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]
    adapters: dict[str, Any]
    alphas: dict[str, float]

    @property
    def keys(self) -> list[str]:
        return list(self.shapes)


def peft_parts(path: Path) -> dict[str, Path]:
    """The folders of PEFT's form by network: a UNet's alone, or one for each network inside of it."""
    if (path / PEFT_CONFIG).is_file():
        return {"unet": path}
    return {network: path / network for network in NETWORKS if (path / network / PEFT_CONFIG).is_file()}


def peft_config(folder: Path) -> dict[str, Any]:
    """The settings of one network's adapter in PEFT's form; raises UserError if they are no plain LoRA's."""
    file, weights = folder / PEFT_CONFIG, folder / PEFT_WEIGHTS
    try:
        config = json.loads(read_text(file))
        kind = config.get("peft_type", "LORA")
        _check_settings(config, [""], file)
    except UserError:
        raise
    except (ValueError, AttributeError, OSError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error}): fetch or export it again") from error
    if kind != "LORA":
        raise UserError(f"{folder} holds {kind}, not a plain LoRA: only those are read")
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
        adapters = json.loads(header.metadata.get(SETTINGS_KEY, "{}"))
        _check_settings(adapters, ["", *(f"{network}." for network in NETWORKS)], path)
        alphas = {name: float(alpha) for name, alpha in json.loads(header.metadata.get(ALPHAS_KEY, "{}")).items()}
        if not all(0 < alpha < math.inf for alpha in alphas.values()):
            raise ValueError(f"{ALPHAS_KEY} is {alphas}")
    except UserError:
        raise
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is corrupt or no safetensors file ({error}): fetch or export it again") from error
    return Header(dict(sorted(header.shapes.items())), header.metadata, adapters, alphas)


def _check_settings(settings: dict[str, Any], prefixes: list[str], where: Path) -> None:
    """Refuses settings of PEFT's by which an adapter is another thing than a plain LoRA on its base."""
    for prefix in prefixes:
        pattern = settings.get(f"{prefix}alpha_pattern") or {}
        numbers = [settings.get(f"{prefix}lora_alpha", 1), *pattern.values()]
        if not all(isinstance(number, int | float) for number in numbers):
            raise ValueError(f"lora_alpha is {numbers}")
        for name in pattern:
            try:
                re.compile(name)
            except re.error as error:
                raise ValueError(f"alpha_pattern has the name {name!r}") from error
        others = [name for name in _NOT_PLAIN if settings.get(f"{prefix}{name}")]
        if str(settings.get(f"{prefix}init_lora_weights")).startswith(_MOVED_BASES):
            others.append("init_lora_weights")
        if others:
            value = settings[f"{prefix}{others[0]}"]
            raise UserError(f"{where} sets {others[0]}={value}, so it holds no plain LoRA: only those are read")


def _refuse_pickle(path: Path) -> None:
    raise UserError(
        f"{path} is a pickle, or a damaged checkpoint: it could run any code when it is opened, so it is not read. "
        "Convert a pickle once: "
        'python -c "import torch, safetensors.torch as s; '
        f"s.save_file(torch.load('{path}', weights_only=True), '{path.with_suffix('.safetensors')}')\""
    )


def form_of(names: Iterable[str]) -> Form:
    """Kohya's or diffusers' form, by the plain names of a file's tensors."""
    return "kohya" if any(name.startswith(("lora_unet_", "lora_te")) for name in names) else "diffusers"


def _check(path: Path, shapes: Mapping[str, tuple[int, ...]], form: Form, dora: bool) -> None:
    def complain(what: str, named: Sequence[str]) -> None:
        if named:
            raise UserError(f"{path} {what}: {len(named)} of {len(shapes)} tensors (first: {named[0]})")

    if not shapes:
        raise UserError(f"{path} holds no tensors")
    for pattern, base in _OTHER_BASES.items():
        complain(f"was made for {base}, and not for SD 1, 2 or XL", [key for key in shapes if re.search(pattern, key)])
    for pattern, kind in _OTHER_KINDS.items():
        others = [key for key in shapes if re.search(pattern, key)]
        complain(f"{kind}, and without these the rest would draw other pictures", others)
    names = plain_names(shapes)
    found = {key: match[1] for key, name in names.items() if (match := KEYS[form].fullmatch(name))}
    if not found:
        complain("is no LoRA in diffusers', Kohya's or PEFT's form", [*shapes])
    if form != "peft":
        alone = [key for key in shapes if key.startswith(PEFT_PREFIX)]
        complain(f"is PEFT's {PEFT_WEIGHTS} without the {PEFT_CONFIG} beside it that says its strength", alone)
    complain(f"holds more than a LoRA in {form} form", [key for key in shapes if key not in found])
    parts = {key: (module, part_of(names[key])) for key, module in found.items()}
    count = Counter(parts.values())
    complain("holds more than one LoRA for a module", [key for key, part in parts.items() if count[part] > 1])
    lacking = [key for key, module in found.items() if not (count[module, "A"] and count[module, "B"])]
    complain("lacks the other half of a pair", lacking)
    if dora and not any(part == "magnitude" for _, part in count):
        complain("says that it is a DoRA, and has no magnitudes", [*shapes])
    several = [key for key, (_, part) in parts.items() if part == "alpha" and math.prod(shapes[key]) != 1]
    complain("has an alpha that is not one number", several)
    ranks = {  # of what is a matrix
        part: shapes[key][part[1] == "B"] for key, part in parts.items() if len(shapes[key]) > 1 and all(shapes[key])
    }
    apart = [
        key for key, (module, _) in parts.items() if len({ranks.get((module, half)) for half in "AB"} - {None}) > 1
    ]
    complain("has pairs whose halves differ in rank", apart)
    sgm = [key for key, name in names.items() if re.search("_(input_blocks|middle_block|output_blocks)_", name)]
    if any(re.search("_(down_blocks|mid_block|up_blocks)_", name) for name in names.values()):
        complain("mixes sgm names with diffusers names", sgm)  # other programs would leave out one of the two kinds
