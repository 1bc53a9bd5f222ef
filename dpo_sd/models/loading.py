"""The parts of a base read from a diffusers folder or a single file, with one line for whatever goes wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_sd.errors import UserError
from dpo_sd.models.contents import check_names, header_of
from dpo_sd.models.places import PICKLES

if TYPE_CHECKING:
    import torch
    from diffusers import DDPMScheduler
    from torch import Tensor, nn
    from transformers import CLIPTextConfig, CLIPTokenizer

    from dpo_sd.losses import PredictionType
    from dpo_sd.models.families import Family
    from dpo_sd.models.files import WeightFiles


@contextmanager
def loading(what: Path) -> Iterator[None]:
    """Turns what goes wrong in loading a file into one line."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    damage = (OSError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError)
    damage += (RuntimeError, SafetensorError, StrictDataclassError)
    try:
        yield
    except UserError:
        raise
    except damage as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        reason = f"it lacks {reason}" if isinstance(error, KeyError) else reason
        # what diffusers offers next is no setting here
        raise UserError(f"{what} cannot be loaded: {reason.partition('. If you want to instead')[0]}") from error


def kinds(family: Family) -> dict[str, Any]:
    """The classes of a family's networks by their names in diffusers' layout."""
    import diffusers
    import transformers

    encoders = {name: getattr(transformers, how.kind) for name, how in family.encoders.items()}
    return {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL, **encoders}


def read_folder(
    folder: Path, cls: Any, dtype: torch.dtype, files: WeightFiles, note: Callable[[str], None], hollow: bool = False
) -> Any:
    """A network in its folder of diffusers' layout.

    Args:
        cls: its class in diffusers or transformers.
        files: which weights are read.
        note: is told where the part has not the variant that is preferred.
        hollow: leaves the weights in the files, and the network on the `meta` device.

    Raises:
        UserError: if it cannot be loaded, or a tensor is not in the files.
    """
    variant, _ = files.taken(folder)
    if variant != files.variant:
        lacking, taken = (f"variant {name}" if name else "plain weights" for name in (files.variant, variant))
        note(f"{folder} has no {lacking}: {taken} taken")
    safe = None if files.pickle else True
    how: dict[str, Any] = {"torch_dtype": dtype, "variant": variant, "use_safetensors": safe}
    how |= {"device_map": "meta"} if hollow else {}
    how |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # so that transformers names them
    with loading(folder):
        network, told = cls.from_pretrained(folder, local_files_only=True, **how)
        for misfit in told["mismatched_keys"]:
            raise _misfit(*misfit)
    check_complete(told["missing_keys"], told["unexpected_keys"], folder)
    return network


def state_of(file: Path, hollow: bool = False) -> dict[str, Tensor]:
    """The tensors of a single file by their names; if hollow, on the `meta` device."""
    import torch
    from diffusers.loaders.single_file_utils import load_single_file_checkpoint

    if hollow and file.suffix not in PICKLES:
        return {name: torch.empty(shape, device="meta") for name, shape in header_of(file).shapes.items()}
    with loading(file):
        state = load_single_file_checkpoint(str(file), local_files_only=True)
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}


def read_from_state(
    state: dict[str, Tensor], file: Path, cls: Any, dtype: torch.dtype, settings: Path, prefix: str = ""
) -> Any:
    """A network of a single file in Stability's layout.

    Args:
        state: tensors of the file, on the `meta` device if the network is to be there too.
        cls: its class in diffusers or transformers.
        settings: the folder with the network's settings, which the file lacks.
        prefix: beginning of a text encoder's names.

    Raises:
        UserError: if it cannot be loaded, or a tensor is not in the file.
    """
    from accelerate import init_empty_weights
    from transformers import PreTrainedModel

    with loading(file):
        with init_empty_weights(include_buffers=False):
            if issubclass(cls, PreTrainedModel):
                network = cls(cls.config_class.from_pretrained(settings, local_files_only=True))
            else:
                network = cls.from_config(cls.load_config(settings, local_files_only=True))
        own, needed = _in_diffusers_names(network, state, prefix), network.state_dict()
        for name in own.keys() & needed:
            if own[name].shape != needed[name].shape:
                raise _misfit(name, own[name].shape, needed[name].shape)
        lacking, unknown = network.load_state_dict(own, strict=False, assign=True)
        check_complete(lacking, unknown, file)
        return network.to(dtype)


def _misfit(name: str, found: Iterable[int], needed: Iterable[int]) -> ValueError:
    return ValueError(f"{name} has the shape {tuple(found)}, not the network's {tuple(needed)}")


def _in_diffusers_names(network: Any, state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    from diffusers import UNet2DConditionModel
    from diffusers.loaders import single_file_utils

    if network.state_dict().keys() <= state.keys():  # a VAE in a file of its own may have them
        return state
    if isinstance(network, UNet2DConditionModel):
        return single_file_utils.convert_ldm_unet_checkpoint(state, network.config)
    if not prefix:
        return single_file_utils.convert_ldm_vae_checkpoint(state, network.config)
    state = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
    if prefix.endswith(".model."):
        state = single_file_utils.convert_open_clip_checkpoint(network, state, prefix)
    else:
        state = single_file_utils.convert_ldm_clip_checkpoint(state)
    inside = "text_model." if hasattr(network, "text_model") else ""
    return {name.replace("text_model.", inside, 1): tensor for name, tensor in state.items()}


def check_complete(lacking: Iterable[str], unknown: Iterable[str], where: Path) -> None:
    """Refuses a network of which tensors are not in its files, or one of them is an adapter's or a scale.

    Args:
        lacking: names of the tensors that are not there.
        unknown: names of those that are there and not the network's; whatever else they are, they are left out.
    """
    unknown = sorted(unknown)
    check_names(unknown, where)
    if lacking := sorted(lacking):
        beside = f", and holds {unknown[0]}, which is none of it" if unknown else ""
        tensors = "a tensor" if len(lacking) == 1 else f"{len(lacking)} tensors"
        raise UserError(f"{where} lacks {tensors} of the network, {lacking[0]}{beside}: fetch or save it again")


def check_finite(network: nn.Module, where: Path) -> None:
    """Refuses weights that are no numbers; it takes less than half a second for the UNet of SDXL.

    Args:
        network: on the CPU.
        where: the file or folder that it was read from.
    """
    import torch

    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise UserError(f"{where} holds NaN or infinity in {name}: fetch it again, or use another model")


def read_tokenizer(folder: Path, config: CLIPTextConfig) -> CLIPTokenizer:
    """The vocabulary of a text encoder, which cuts prompts at what the encoder reads, or before if it says so.

    Args:
        config: of the encoder.

    Raises:
        UserError: if it cannot be loaded, or has tokens that the encoder does not know.
    """
    from transformers import CLIPTokenizer

    with loading(folder):
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    limit, known = tokenizer.model_max_length, config.vocab_size
    if not isinstance(limit, int | float) or limit < 3:
        raise UserError(f"{folder} has model_max_length={limit!r}: it must be a number of tokens, at least 3")
    if len(tokenizer) > known:
        raise UserError(
            f"{folder} has {len(tokenizer)} tokens, and its text encoder knows {known}: they are not of one model"
        )
    tokenizer.model_max_length = min(int(limit), config.max_position_embeddings)
    return tokenizer


def read_schedule(folder: Path) -> DDPMScheduler:
    """The schedule in its folder of diffusers' layout; raises UserError if it cannot be loaded."""
    from diffusers import DDPMScheduler

    with loading(folder):
        return DDPMScheduler.from_pretrained(folder, local_files_only=True)


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
