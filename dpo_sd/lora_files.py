"""LoRA files in the forms of Kohya, diffusers and PEFT: all are read into one shape, and written from it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from dpo_sd.errors import UserError
from dpo_sd.files import replacing, write_json
from dpo_sd.loaders import ADAPTED, canonical, kohya_name, modules_of
from dpo_sd.models import PICKLES, Family, PredictionType, StableDiffusion

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]  # of a UNet

Form = Literal["diffusers", "kohya", "peft"]
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


@dataclass(frozen=True)
class LoRAWeights:
    """A LoRA of one or more networks of a Stable Diffusion.

    Args:
        state: tensors by `<network>.<module>.lora_A.weight` and `….lora_B.weight`, network and module as diffusers
            names them: `text_encoder.text_model.encoder.layers.0.self_attn.q_proj`. A is (r, in) for linear modules
            and (r, in, k, k) for convolutions; B is (out, r) and (out, r, 1, 1).
        alphas: by `<network>.<module>`; what a module adds is multiplied by alpha / r.
    """

    state: dict[str, Tensor]
    alphas: dict[str, float]

    @property
    def modules(self) -> list[str]:
        return list(self.alphas)

    @property
    def ranks(self) -> dict[str, int]:
        return {module: len(self.state[f"{module}.lora_A.weight"]) for module in self.alphas}

    @property
    def networks(self) -> list[str]:
        return [name for name in ADAPTED if any(module.startswith(f"{name}.") for module in self.alphas)]

    def of(self, network: str) -> LoRAWeights:
        """The part of one network."""

        def part(values: Mapping[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in values.items() if name.startswith(f"{network}.")}

        return LoRAWeights(part(self.state), part(self.alphas))

    def change(self, module: str) -> Tensor:
        """What the LoRA adds to the weight of a module: (out, in), or (out, in, k, k) of a convolution; fp32."""
        a, b = (self.state[f"{module}.lora_{half}.weight"].float() for half in "AB")
        return (self.alphas[module] / len(a) * (b.flatten(1) @ a.flatten(1))).view(len(b), *a.shape[1:])

    def summary(self) -> str:
        """`rank 8, alpha 4, scale 0.5, 32 modules, 36864 parameters`, ranges where modules differ, for each network."""
        parts = [self.of(network) for network in self.networks]
        lines = [part._summary() for part in parts]
        return "; ".join(line if n == "unet" else f"{n} {line}" for n, line in zip(self.networks, lines, strict=True))

    def _summary(self) -> str:
        def span(values: list[float]) -> str:
            low, high = min(values), max(values)
            return f"{low:g}" if low == high else f"{low:g} to {high:g}"

        ranks, alphas = list(self.ranks.values()), list(self.alphas.values())
        scale = span([alpha / rank for alpha, rank in zip(alphas, ranks, strict=True)])
        parameters = sum(tensor.numel() for tensor in self.state.values())
        return (
            f"rank {span([*ranks])}, alpha {span(alphas)}, scale {scale}, {len(ranks)} modules, {parameters} parameters"
        )

    def peft_settings(self, network: str) -> dict[str, Any]:
        """What decides one network's adapter, as `peft.LoraConfig` takes it.

        Modules of text encoders are named from `encoder` on, which fits every version of transformers.
        """
        part, start = self.of(network), re.compile(rf"{network}\.(text_model\.)?")
        rank, rank_pattern = _most_common({start.sub("", name, 1): rank for name, rank in part.ranks.items()})
        alpha, alpha_pattern = _most_common({start.sub("", name, 1): alpha for name, alpha in part.alphas.items()})
        return {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": rank_pattern,
            "alpha_pattern": alpha_pattern,
            "target_modules": sorted(start.sub("", name, 1) for name in part.modules),
        }


@dataclass(frozen=True)
class LoRAFile(LoRAWeights):
    """A LoRA as read from a file.

    Args:
        path: the file, or the folder of one in PEFT's form.
        form: it was written in.
        metadata: the file's header, strings only.
    """

    path: Path
    form: Form
    metadata: dict[str, str]


# -------------------------------------------------------------------------------------------------------------- reading


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
    from safetensors import SafetensorError, safe_open

    with open(path, "rb") as file:
        start = file.read(9)
    if not start:
        raise UserError(f"{path} is empty")
    # eight bytes of length and a brace open a safetensors file, whatever it is called
    if not start.endswith(b"{") and (path.suffix in PICKLES or start.startswith((b"PK\x03\x04", b"\x80"))):
        _refuse_pickle(path)
    try:
        with safe_open(path, framework="numpy") as file:
            keys, metadata = sorted(file.keys()), file.metadata() or {}
            adapters = json.loads(metadata.get("lora_adapter_metadata", "{}"))
            _check_numbers(adapters, ["", *(f"{network}." for network in ADAPTED)])
    except (SafetensorError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is corrupt or no safetensors file ({error}): fetch or export it again") from error
    return _Header(keys, metadata, adapters)


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


# -------------------------------------------------------------------------------------------------------------- writing


def save_diffusers(lora: LoRAWeights, path: str | Path) -> Path:
    """Write a LoRA in diffusers' form, for `pipeline.load_lora_weights`, with ranks and alphas in its metadata.

    The file appears whole or not at all; when writing fails, a former one stays.

    Raises:
        UserError: when the file cannot be written.
    """
    from diffusers.loaders.lora_pipeline import StableDiffusionXLLoraLoaderMixin

    path, layers = Path(path), {}
    for (
        network
    ) in lora.networks:  # peft's own names: of a file that also has `to_q.lora.down`, diffusers 0.42 reads one
        part = lora.of(network)
        layers[f"{network}_lora_layers"] = {k.removeprefix(f"{network}."): v for k, v in _contiguous(part).items()}
        # only what decides the strength: a peft of another version refuses the settings that it does not know
        layers[f"{network}_lora_adapter_metadata"] = lora.peft_settings(network)
    with _replacing(path) as temporary:
        StableDiffusionXLLoraLoaderMixin.save_lora_weights(temporary.parent, weight_name=temporary.name, **layers)
    return path


def save_kohya(
    lora: LoRAWeights,
    path: str | Path,
    family: Family,
    *,
    prediction_type: PredictionType = "epsilon",
    resolution: int | None = None,
    extra: Mapping[str, str] | None = None,
) -> Path:
    """Write a LoRA in Kohya's form, for ComfyUI, A1111 and InvokeAI, with its alphas and metadata.

    Alphas that diffusers would misread are replaced by one for the whole network, and B is scaled to make up for it.
    The file appears whole or not at all; when writing fails, a former one stays.

    Args:
        path: the file, ending in .safetensors; its stem is what the LoRA calls itself.
        family: of the base; `tiny` is written as an SD 1.
        prediction_type: of the base.
        resolution: side of the training pictures in pixels, when known.
        extra: further metadata, such as `ss_seed`, `ss_steps`, `ss_learning_rate`.

    Raises:
        UserError: when the file cannot be written.
    """
    import torch
    from safetensors.torch import save_file

    path = Path(path)
    lora = _every_loader_reads(lora)
    state = {}
    for module, alpha in lora.alphas.items():
        name = kohya_name(module, family)
        state[f"{name}.lora_down.weight"] = lora.state[f"{module}.lora_A.weight"].contiguous()
        state[f"{name}.lora_up.weight"] = lora.state[f"{module}.lora_B.weight"].contiguous()
        state[f"{name}.alpha"] = torch.tensor(alpha)
    metadata = dict(extra or {}) | _kohya_metadata(lora, path.stem, family, prediction_type, resolution)
    with _replacing(path) as temporary:
        save_file(state, temporary, metadata=metadata)
    return path


def save_peft(lora: LoRAWeights, folder: str | Path, model: StableDiffusion) -> Path:
    """Write a LoRA in PEFT's form: `<folder>/unet/` and so on, each for `PeftModel.from_pretrained(pipe.unet, …)`.

    Args:
        model: of the shape that the LoRA is for, without adapters; PEFT wants modules named as in its networks.

    Raises:
        UserError: when a file cannot be written.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    folder, inside = Path(folder), modules_of(model)
    for network in lora.networks:
        part = lora.of(network)
        state = {}
        for key, tensor in _contiguous(part).items():
            module, _, half = key.rpartition(".lora_")
            state[f"base_model.model.{inside[module]}.lora_{half}"] = tensor
        config = LoraConfig(**lora.peft_settings(network)).to_dict()  # pyright: ignore[reportArgumentType]
        config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
        with _replacing(folder / network / PEFT_WEIGHTS) as temporary:
            save_file(state, temporary, metadata={"format": "pt"})
        write_json(folder / network / PEFT_CONFIG, config)
    return folder


def _contiguous(lora: LoRAWeights) -> dict[str, Tensor]:
    return {key: tensor.contiguous() for key, tensor in lora.state.items()}


def _every_loader_reads(lora: LoRAWeights) -> LoRAWeights:
    """The same LoRA, with one alpha for all modules of a network where diffusers would misread theirs.

    diffusers 0.42 gives attention projections and text encoders in a Kohya file the most common alpha of their network,
    whatever theirs is.
    """
    state, alphas = dict(lora.state), dict(lora.alphas)
    for network in lora.networks:
        part = lora.of(network).alphas
        (common, count), *others = Counter(part.values()).most_common()
        misread = [alpha for module, alpha in part.items() if network != "unet" or module.endswith(tuple(ATTENTION))]
        if (others and others[0][1] == count) or any(alpha != common for alpha in misread):
            for module, alpha in part.items():
                alphas[module] = common
                state[f"{module}.lora_B.weight"] = lora.state[f"{module}.lora_B.weight"] * (alpha / common)
    return LoRAWeights(state, alphas)


def _kohya_metadata(
    lora: LoRAWeights, name: str, family: Family, prediction_type: PredictionType, resolution: int | None
) -> dict[str, str]:
    velocity = prediction_type == "v_prediction"
    version, architecture = {
        "tiny": ("sd_v1", "stable-diffusion-v1"),
        "sd15": ("sd_v1", "stable-diffusion-v1"),
        "sd21": ("sd_v2_v", "stable-diffusion-v2-768-v") if velocity else ("sd_v2", "stable-diffusion-v2-512"),
        "sdxl": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
    }[family]

    def only(values: set[Any]) -> str:
        return f"{values.pop():g}" if len(values) == 1 else "Dynamic"

    metadata = {
        "ss_v2": str(family == "sd21"),
        "ss_base_model_version": version,
        "ss_network_module": "networks.lora",
        "ss_network_dim": only(set(lora.ranks.values())),
        "ss_network_alpha": only(set(lora.alphas.values())),
        "ss_network_args": "{}",
        "ss_output_name": name,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": name,
        "modelspec.date": datetime.now(UTC).isoformat(timespec="seconds"),
        "modelspec.prediction_type": "v" if velocity else "epsilon",
    }
    if resolution is not None:
        metadata |= {
            "ss_resolution": f"({resolution}, {resolution})",
            "modelspec.resolution": f"{resolution}x{resolution}",
        }
    return metadata


def _most_common(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {module: value for module, value in values.items() if value != common}


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    from safetensors import SafetensorError

    try:
        with replacing(path) as temporary:
            yield temporary
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {error}") from error
