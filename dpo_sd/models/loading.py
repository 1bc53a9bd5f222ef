"""The parts of a base read from a diffusers folder or a single file, with one line for whatever goes wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_sd.errors import UserError
from dpo_sd.models.families import tokenizer_of

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler

    from dpo_sd.losses import PredictionType
    from dpo_sd.models.families import Family
    from dpo_sd.models.files import WeightFiles


@contextmanager
def loading(what: Path) -> Iterator[None]:
    """Turns what goes wrong in loading a file into one line."""
    from diffusers.loaders.single_file_utils import SingleFileComponentError
    from safetensors import SafetensorError

    damage = (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError, SingleFileComponentError)
    try:
        yield
    except UserError:
        raise
    except damage as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{what} cannot be loaded: {reason}") from error


def read_folder(
    folder: Path, family: Family, dtype: torch.dtype, files: WeightFiles, note: Callable[[str], None]
) -> dict[str, Any]:
    """All parts of a pipeline in diffusers' layout: the UNet in `dtype`, the other networks in fp32.

    Args:
        files: which weights are read.
        note: is told where a part has not the variant that is preferred.
    """
    import diffusers
    import torch
    import transformers

    def weights(cls: Any, name: str, dtype: torch.dtype = torch.float32) -> Any:
        with loading(folder / name):
            kind = json.loads((folder / name / "config.json").read_text()).get("_class_name", cls.__name__)
            if kind != cls.__name__:
                raise ValueError(f"it is a {kind}, not a {cls.__name__}")
            return read_weights(cls, folder / name, dtype, files, note)

    def plain(cls: Any, name: str) -> Any:
        with loading(folder / name):
            return cls.from_pretrained(folder / name, local_files_only=True)

    parts = {
        "scheduler": plain(diffusers.DDPMScheduler, "scheduler"),
        "unet": weights(diffusers.UNet2DConditionModel, "unet", dtype),
        "vae": weights(diffusers.AutoencoderKL, "vae"),
    }
    for name, encoder in family.encoders.items():
        tokenizer = tokenizer_of(name)
        parts[name] = weights(getattr(transformers, encoder.kind), name)
        parts[tokenizer] = plain(transformers.CLIPTokenizer, tokenizer)
    return parts


def read_weights(cls: Any, folder: Path, dtype: torch.dtype, files: WeightFiles, note: Callable[[str], None]) -> Any:
    """A network of a class of diffusers or transformers, from its folder in diffusers' layout; as `read_folder`."""
    variant, _ = files.taken(folder)
    if variant != files.variant:
        lacking, taken = (f"variant {name}" if name else "plain weights" for name in (files.variant, variant))
        note(f"{folder} has no {lacking}: {taken} taken")
    safe = None if files.pickle else True
    how: dict[str, Any] = {"torch_dtype": dtype, "variant": variant, "use_safetensors": safe}
    return cls.from_pretrained(folder, local_files_only=True, **how)


def read_single_file(file: Path, settings: Path, family: Family, dtype: torch.dtype) -> dict[str, Any]:
    """All parts of a checkpoint in Stability's layout: the UNet in `dtype`, the other networks in fp32.

    Args:
        settings: folder with the settings and the vocabulary, which the file lacks.
    """
    import diffusers

    with loading(file):
        pipeline = getattr(diffusers, family.pipeline).from_single_file(
            file, config=str(settings), local_files_only=True, safety_checker=None, feature_extractor=None
        )
    parts = {name: getattr(pipeline, name) for name in family.parts}
    parts["unet"].to(dtype)
    return parts


def read_vae(place: Path, config: Path, files: WeightFiles, note: Callable[[str], None]) -> AutoencoderKL:
    """Another VAE than the base's own, in fp32.

    Args:
        place: folder in diffusers' layout, or single file.
        config: folder with the settings that a single file lacks.
        files, note: as in `read_folder`.
    """
    import torch
    from diffusers import AutoencoderKL

    with loading(place):
        if place.is_dir():
            return read_weights(AutoencoderKL, place, torch.float32, files, note)
        how: dict[str, Any] = {"local_files_only": True, "torch_dtype": torch.float32}
        return AutoencoderKL.from_single_file(str(place), config=str(config), **how)


def training_schedule(
    scheduler: Any, path: str, prediction_type: PredictionType | None, zero_terminal_snr: bool | None
) -> DDPMScheduler:
    """The schedule that a base is trained on, as its files say or as the settings override it.

    Raises:
        UserError: if it predicts neither noise nor velocity, or noise from pure noise.
    """
    from diffusers import DDPMScheduler

    config = dict(scheduler.config)
    if prediction_type is not None:
        config["prediction_type"] = prediction_type
    if zero_terminal_snr is not None:
        config["rescale_betas_zero_snr"] = zero_terminal_snr
    schedule: Any = DDPMScheduler.from_config(config)
    predicted = schedule.config["prediction_type"]
    if predicted not in ("epsilon", "v_prediction"):
        raise UserError(f"{path} predicts {predicted!r}: only epsilon and v_prediction can be trained")
    if schedule.config["rescale_betas_zero_snr"] and predicted == "epsilon":
        raise UserError(
            f"{path} has a schedule that ends in pure noise, from which noise cannot be predicted: "
            "use model.prediction_type=v_prediction, or model.zero_terminal_snr=false"
        )
    return schedule
