"""LoRA files in the forms of Kohya, diffusers and PEFT, written from one shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_sd.errors import UserError
from dpo_sd.files.atomic import replacing, write_json
from dpo_sd.lora.names import kohya_name, modules_of
from dpo_sd.lora.weights import ATTENTION, PEFT_CONFIG, PEFT_PREFIX, PEFT_WEIGHTS, LoRAWeights
from dpo_sd.losses import PredictionType
from dpo_sd.models.families import FAMILIES, Family, FamilyName
from dpo_sd.models.stable_diffusion import StableDiffusion

if TYPE_CHECKING:
    from torch import Tensor


def save_diffusers(lora: LoRAWeights, path: str | Path) -> Path:
    """Write a LoRA in diffusers' form, for `pipeline.load_lora_weights`, with ranks and alphas in its metadata.

    The file appears whole or not at all; if writing fails, a former one stays.

    Raises:
        UserError: if the file cannot be written.
    """
    from diffusers.loaders.lora_pipeline import StableDiffusionXLLoraLoaderMixin

    path, layers = Path(path), {}
    for network in lora.networks:
        part = lora.of(network)
        # peft's own names: of a file that also has `to_q.lora.down`, diffusers 0.42 reads one
        layers[f"{network}_lora_layers"] = {k.removeprefix(f"{network}."): v for k, v in _contiguous(part).items()}
        # only what decides the strength: a peft of another version refuses the settings that it does not know
        layers[f"{network}_lora_adapter_metadata"] = lora.peft_settings(network)
    with _replacing(path) as temporary:
        StableDiffusionXLLoraLoaderMixin.save_lora_weights(temporary.parent, weight_name=temporary.name, **layers)
    return path


def save_kohya(
    lora: LoRAWeights,
    path: str | Path,
    family: FamilyName,
    *,
    prediction_type: PredictionType = "epsilon",
    resolution: int | None = None,
    extra: Mapping[str, str] | None = None,
) -> Path:
    """Write a LoRA in Kohya's form, for ComfyUI, A1111 and InvokeAI, with its alphas and metadata.

    Alphas that diffusers would misread are replaced by one for the whole network, and B is scaled to make up for it.
    The file appears whole or not at all; if writing fails, a former one stays.

    Args:
        path: the file, ending in .safetensors; its stem is what the LoRA calls itself.
        family: the base's; one that other programs do not know is written as an SD 1.
        prediction_type: what the base predicts.
        resolution: side of the training images in pixels, if it is known.
        extra: further metadata, such as `ss_seed`, `ss_steps`, `ss_learning_rate`.

    Raises:
        UserError: if the file cannot be written.
    """
    import torch
    from safetensors.torch import save_file

    path = Path(path)
    lora = _every_loader_reads(lora)
    state = {}
    for module, alpha in lora.alphas.items():
        name = kohya_name(module, FAMILIES[family])
        state[f"{name}.lora_down.weight"] = lora.state[f"{module}.lora_A.weight"].contiguous()
        state[f"{name}.lora_up.weight"] = lora.state[f"{module}.lora_B.weight"].contiguous()
        state[f"{name}.alpha"] = torch.tensor(alpha)
    metadata = dict(extra or {}) | _kohya_metadata(lora, path.stem, FAMILIES[family], prediction_type, resolution)
    with _replacing(path) as temporary:
        save_file(state, temporary, metadata=metadata)
    return path


def save_peft(lora: LoRAWeights, folder: str | Path, model: StableDiffusion) -> Path:
    """Write a LoRA in PEFT's form: `<folder>/unet/` and so on, each for `PeftModel.from_pretrained(pipe.unet, …)`.

    Args:
        model: one of the shape that the LoRA is for, without adapters: PEFT's form names modules as its networks do.

    Raises:
        UserError: if a file cannot be written.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    folder, inside = Path(folder), modules_of(model)
    for network in lora.networks:
        part = lora.of(network)
        state = {}
        for key, tensor in _contiguous(part).items():
            module, _, half = key.rpartition(".lora_")
            state[f"{PEFT_PREFIX}{inside[module]}.lora_{half}"] = tensor
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
    base = family.base_names(prediction_type)

    def only(values: set[Any]) -> str:
        return f"{values.pop():g}" if len(values) == 1 else "Dynamic"

    metadata = {
        "ss_v2": str(family.kohya_v2),
        "ss_base_model_version": base.version,
        "ss_network_module": "networks.lora",
        "ss_network_dim": only(set(lora.ranks.values())),
        "ss_network_alpha": only(set(lora.alphas.values())),
        "ss_network_args": "{}",
        "ss_output_name": name,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{base.architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": name,
        "modelspec.date": datetime.now(UTC).isoformat(timespec="seconds"),
        "modelspec.prediction_type": "v" if prediction_type == "v_prediction" else "epsilon",
    }
    if resolution is not None:
        metadata |= {
            "ss_resolution": f"({resolution}, {resolution})",
            "modelspec.resolution": f"{resolution}x{resolution}",
        }
    return metadata


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    from safetensors import SafetensorError

    try:
        with replacing(path) as temporary:
            yield temporary
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {error}") from error
