"""LoRA files in the forms of Kohya, diffusers and PEFT, written from one shape."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpo_sd.errors import UserError
from dpo_sd.files.atomic import write_json
from dpo_sd.files.tensors import write_tensors
from dpo_sd.lora.names import kohya_convolutions, kohya_name, modules_of
from dpo_sd.lora.weights import (
    ALPHAS_KEY,
    ATTENTION,
    PEFT_CONFIG,
    PEFT_PREFIX,
    PEFT_WEIGHTS,
    SETTINGS_KEY,
    LoRAWeights,
)
from dpo_sd.losses import PredictionType
from dpo_sd.models.families import FAMILIES, Family, FamilyName, Reading
from dpo_sd.models.stable_diffusion import StableDiffusion


def save_diffusers(lora: LoRAWeights, path: str | Path) -> Path:
    """Write a LoRA in diffusers' form, for `pipeline.load_lora_weights`.

    Every module's alpha is its rank, and B makes up for it: ComfyUI assumes that in this form, as diffusers did before
    it read the metadata. There `read_lora` finds the alphas that were trained with, so that a training that starts from
    the file goes on with them: where alpha / rank is a power of two, to the bit.
    The file appears whole or not at all; if writing fails, a former one stays.

    Raises:
        UserError: if the file cannot be written.
    """
    path, state, settings = Path(path), {}, {}
    written = lora.with_alphas({module: float(rank) for module, rank in lora.ranks.items()})
    for network in written.networks:
        # peft's own names: of a file that also has `to_q.lora.down`, diffusers 0.42 reads one
        state |= written.of(network).state
        # only what decides the strength: a peft of another version refuses the settings that it does not know
        settings |= {f"{network}.{name}": value for name, value in written.peft_settings(network).items()}
    metadata = {"format": "pt", SETTINGS_KEY: json.dumps(settings, indent=2, sort_keys=True)}
    trained = {module: alpha for module, alpha in lora.alphas.items() if alpha != written.alphas[module]}
    if trained:
        metadata[ALPHAS_KEY] = json.dumps(trained, sort_keys=True)
    with _writing(path):
        write_tensors(path, state, metadata)
    return path


def save_kohya(
    lora: LoRAWeights,
    path: str | Path,
    family: FamilyName,
    *,
    prediction_type: PredictionType = "epsilon",
    zero_terminal_snr: bool = False,
    resolution: int | None = None,
    extra: Mapping[str, str] | None = None,
) -> Path:
    """Write a LoRA in Kohya's form, for ComfyUI, A1111, InvokeAI and Kohya's trainer, with its alphas and metadata.

    Alphas that diffusers would misread are replaced by one for the whole network, and B is scaled to make up for it.
    The file bears no date: the same LoRA of a run gives the same bytes.
    The file appears whole or not at all; if writing fails, a former one stays.

    Args:
        path: the file, ending in .safetensors; its stem is what the LoRA calls itself.
        family: the base's; one that other programs do not know is written as an SD 1.
        prediction_type: what the base predicts.
        zero_terminal_snr: whether its schedule ends in noise alone.
        resolution: side of the training images in pixels, if it is known.
        extra: further metadata, such as `ss_seed`, `ss_steps`, `ss_learning_rate`.

    Raises:
        UserError: if the file cannot be written, or as `check_kohya`.
    """
    import torch

    path = Path(path)
    check_kohya(lora)
    lora = _every_loader_reads(lora)
    state, convolutions = {}, kohya_convolutions(lora.modules, FAMILIES[family])
    for module, alpha in lora.alphas.items():
        name = kohya_name(module, FAMILIES[family])
        for half, key in (("down", "A"), ("up", "B")):
            tensor = lora.state[f"{module}.lora_{key}.weight"]
            shape = (*tensor.shape[:2], 1, 1) if module in convolutions else tensor.shape
            state[f"{name}.lora_{half}.weight"] = tensor.reshape(shape)
        state[f"{name}.alpha"] = torch.tensor(alpha)
    metadata = dict(extra or {}) | _kohya_metadata(lora, path.stem, FAMILIES[family], prediction_type, resolution)
    metadata["ss_zero_terminal_snr"] = str(zero_terminal_snr)
    with _writing(path):
        write_tensors(path, state, metadata)
    return path


def check_kohya(lora: LoRAWeights) -> None:
    """Refuses what Kohya's form cannot hold.

    Its `dora_scale` is of each input to A1111, Forge and InvokeAI; where it is of each output, ComfyUI divides by the
    lengths of the base's weights, and not by those of the adapted ones; diffusers passes over it.

    Raises:
        UserError: if it is a DoRA.
    """
    if lora.dora:
        raise UserError(
            "ComfyUI, A1111 and InvokeAI would draw other pictures with this DoRA, so it has no Kohya form: "
            "use format=diffusers or peft, or format=merged for a model that every program reads"
        )


def reading_metadata(family: Family, reading: Reading) -> dict[str, str]:
    """How prompts were read, in Kohya's words, where that is not as usual."""
    metadata = {}
    if reading.chunks > 1:
        metadata["ss_max_token_length"] = str(reading.chunks * family.chunk)
    if reading.clip_skip > 1:
        metadata["ss_clip_skip"] = str(reading.clip_skip)
    return metadata


def save_peft(lora: LoRAWeights, folder: str | Path, model: StableDiffusion) -> Path:
    """Write a LoRA in PEFT's form: `<folder>/unet/` and so on, each for `PeftModel.from_pretrained(pipe.unet, …)`.

    A text encoder's tensors are there twice, as `encoder…` and as `text_model.encoder…`: versions of transformers name
    its modules in the one way or in the other, and PEFT passes over what it does not find without a word.

    Args:
        model: one of the shape that the LoRA is for, without adapters: PEFT's form names modules as its networks do.

    Raises:
        UserError: if a file cannot be written.
    """
    from peft import LoraConfig

    folder, inside = Path(folder), modules_of(model)
    for network in lora.networks:
        part = lora.of(network)
        state = {}
        for key, tensor in part.state.items():
            module, _, half = key.rpartition(".lora_")
            for name in {inside[module], _in_other_versions(inside[module])}:
                state[f"{PEFT_PREFIX}{name}.lora_{half}"] = tensor.clone()
        config = LoraConfig(**lora.peft_settings(network)).to_dict()  # pyright: ignore[reportArgumentType]
        config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
        with _writing(file := folder / network / PEFT_WEIGHTS):
            write_tensors(file, state, {"format": "pt"})
            write_json(folder / network / PEFT_CONFIG, config)
    return folder


def _in_other_versions(module: str) -> str:
    """The name that other versions of transformers give a module of a text encoder."""
    if module.startswith("encoder."):
        return f"text_model.{module}"
    return module.removeprefix("text_model.")


def _every_loader_reads(lora: LoRAWeights) -> LoRAWeights:
    """The same LoRA, with one alpha for all modules of a network where diffusers would misread theirs.

    diffusers 0.42 gives attention projections and text encoders in a Kohya file the most common alpha of their network,
    whatever theirs is.
    """
    alphas: dict[str, float] = {}
    for network in lora.networks:
        part = lora.of(network).alphas
        (common, count), *others = Counter(part.values()).most_common()
        misread = [alpha for module, alpha in part.items() if network != "unet" or module.endswith(tuple(ATTENTION))]
        if (others and others[0][1] == count) or any(alpha != common for alpha in misread):
            alphas |= dict.fromkeys(part, common)
    return lora.with_alphas(alphas)


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
        "modelspec.prediction_type": "v" if prediction_type == "v_prediction" else "epsilon",
    }
    if resolution is not None:
        metadata |= {
            "ss_resolution": f"({resolution}, {resolution})",
            "modelspec.resolution": f"{resolution}x{resolution}",
        }
    return metadata


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {error}") from error
