"""The parts of a base read from a diffusers folder or a single file, with one line for whatever goes wrong."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_sd.errors import UserError
from dpo_sd.files.tensors import Header, read_header
from dpo_sd.models.contents import check_names, header_of
from dpo_sd.models.families import VOCABULARY, tokenizer_of
from dpo_sd.models.places import PICKLES

if TYPE_CHECKING:
    import torch
    from diffusers import DDPMScheduler
    from torch import Tensor, nn
    from transformers import CLIPTextConfig, CLIPTokenizer

    from dpo_sd.models.families import Family
    from dpo_sd.models.files import WeightFiles
    from dpo_sd.models.quantization import Weights


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


class Reader:
    """Reads the networks and vocabularies of one base, from folders in diffusers' layout and single files.

    Args:
        family: of the base.
        files: which weights are read from folders.
        weights: how the UNet is stored, as in `Base.load`; the other networks are fp32.
        note: is told where a folder has not the variant that is preferred.
        hollow: leaves the weights in the files, and the networks on the `meta` device.
    """

    def __init__(
        self, family: Family, files: WeightFiles, weights: Weights, note: Callable[[str], None], hollow: bool
    ) -> None:
        self.family, self.files, self.note, self.hollow = family, files, note, hollow
        self.weights: Weights = weights
        self._states: dict[Path, dict[str, Tensor]] = {}

    def header(self, file: Path) -> Header:
        """The header of a single file; of a pickle, what it would be, with "F32" for all kinds of floating numbers."""
        if file.suffix not in PICKLES:
            return header_of(file)
        state = self._state(file)
        kinds = {name: "F32" if tensor.is_floating_point() else str(tensor.dtype) for name, tensor in state.items()}
        return Header({name: tuple(tensor.shape) for name, tensor in state.items()}, kinds, {}, {})

    def network(self, name: str, place: Path, settings: Path) -> Any:
        """A network that has all of its tensors from its files, and numbers in them.

        Args:
            name: as diffusers names it.
            place: its folder in diffusers' layout, or a single file in Stability's.
            settings: the folder with the settings that a single file lacks.

        Raises:
            UserError: if it cannot be loaded, a tensor is not in the files, or one holds NaN.
        """
        import diffusers
        import torch
        import transformers

        from dpo_sd.models.quantization import stored_in

        encoder = self.family.encoders.get(name)
        classes = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}
        cls = getattr(transformers, encoder.kind) if encoder else classes[name]
        dtype = stored_in(self.weights) if name == "unet" else torch.float32
        if place.is_dir():
            network = self._of_folder(place, cls, dtype)
        else:
            network = self._of_file(place, cls, dtype, settings, encoder.prefix if encoder else "")
        if not self.hollow:
            check_finite(network, place)
        return network

    def tokenizers(self, settings: Path, networks: Mapping[str, Any]) -> dict[str, CLIPTokenizer]:
        """The vocabularies by their names, which cut prompts at one length: hidden states are put side by side.

        Raises:
            UserError: if one cannot be loaded, or has tokens that its text encoder does not know.
        """
        read = {
            tokenizer_of(name): read_tokenizer(
                self.family.place_of(settings, tokenizer_of(name)), networks[name].config, encoder.pad
            )
            for name, encoder in self.family.encoders.items()
        }
        limit = min(tokenizer.model_max_length for tokenizer in read.values())
        for tokenizer in read.values():
            tokenizer.model_max_length = limit
        return read

    def _state(self, file: Path) -> dict[str, Tensor]:
        """The tensors of a single file by their names; those of a safetensors file on the `meta` device if hollow."""
        import torch
        from diffusers.loaders.single_file_utils import load_single_file_checkpoint

        if file in self._states:
            return self._states[file]
        with loading(file):
            if self.hollow and file.suffix not in PICKLES:
                state = {name: torch.empty(shape, device="meta") for name, shape in read_header(file).shapes.items()}
            else:
                state: Any = load_single_file_checkpoint(str(file), local_files_only=True)
        self._states[file] = {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
        return self._states[file]

    def _of_folder(self, folder: Path, cls: Any, dtype: torch.dtype) -> Any:
        variant, weights = self.files.taken(folder)
        if variant != self.files.variant:
            lacking, taken = (f"variant {name}" if name else "plain weights" for name in (self.files.variant, variant))
            self.note(f"{folder} has no {lacking}: {taken} taken")
        safe = None if self.files.pickle else True
        how: dict[str, Any] = {"torch_dtype": dtype, "variant": variant, "use_safetensors": safe}
        if self.hollow:
            how |= {"device_map": "meta", "torch_dtype": next(map(_kept_in, weights), dtype)}
        how |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # so that transformers names them
        with loading(folder):
            network, found = cls.from_pretrained(folder, local_files_only=True, **how)
            for misfit in found["mismatched_keys"]:
                raise _misfit(*misfit)
        check_complete(found["missing_keys"], found["unexpected_keys"], folder)
        layers = {_any_layer(name) for name in network.state_dict()}
        if beyond := [name for name in found["unexpected_keys"] if _any_layer(name) in layers]:
            raise UserError(f"{folder} holds {beyond[0]}, a layer more than its config.json says: they are not of one")
        return network

    def _of_file(self, file: Path, cls: Any, dtype: torch.dtype, settings: Path, prefix: str) -> Any:
        from accelerate import init_empty_weights
        from transformers import CLIPTextConfig

        with loading(file):
            with init_empty_weights(include_buffers=False):
                if prefix:
                    network = cls(CLIPTextConfig.from_pretrained(settings, local_files_only=True))
                else:
                    network = cls.from_config(cls.load_config(settings, local_files_only=True))
            own, needed = _in_diffusers_names(network, self._state(file), prefix), network.state_dict()
            for name in own.keys() & needed:
                if own[name].shape != needed[name].shape:
                    raise _misfit(name, own[name].shape, needed[name].shape)
            lacking, unknown = network.load_state_dict(own, strict=False, assign=True)
            check_complete(lacking, unknown, file)
            return network.to(dtype)


def _any_layer(name: str) -> str:
    """The name of a tensor without the numbers of its layers."""
    return re.sub(r"\.\d+\.", ".N.", name)


def _kept_in(file: Path) -> torch.dtype | None:
    """The precision of a file's weights, in which none of them needs to be read."""
    import torch

    kinds = [] if file.suffix in PICKLES else read_header(file).dtypes.values()
    named = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return next((named[kind] for kind in kinds if kind in named), None)


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
    """Refuses weights that are NaN or infinite; for the UNet of SDXL it takes less than a second.

    Args:
        network: on the CPU.
        where: the file or folder that it was read from.
    """
    import torch

    for name, tensor in network.state_dict().items():
        if not torch.stack(tensor.aminmax()).isfinite().all():
            raise UserError(f"{where} holds NaN or infinity in {name}: fetch it again, or use another model")


def read_tokenizer(folder: Path, config: CLIPTextConfig, pad: str) -> CLIPTokenizer:
    """The vocabulary of a text encoder, which cuts prompts at what the encoder reads, or before if it says so.

    Args:
        config: of the encoder.
        pad: the token that fills a prompt up, where the vocabulary is CLIP's, which does not say it.

    Raises:
        UserError: if it cannot be loaded, or has tokens that the encoder does not know.
    """
    from transformers import CLIPTokenizer

    with loading(folder):
        said: dict[str, Any] = {"pad_token": pad} if folder == VOCABULARY else {}
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True, **said)
    limit, known = tokenizer.model_max_length, config.vocab_size
    if not isinstance(limit, int | float) or not limit >= 3:
        raise UserError(f"{folder} has model_max_length={limit!r}: it must be a number of tokens, at least 3")
    if len(tokenizer) > known:
        raise UserError(
            f"{folder} has {len(tokenizer)} tokens, and its text encoder knows {known}: they are not of one model"
        )
    if 2 * len(tokenizer) < known:
        raise UserError(
            f"{folder} has {len(tokenizer)} tokens, and its text encoder knows {known}: copy the whole folder"
        )
    tokenizer.model_max_length = min(int(limit), config.max_position_embeddings)
    return tokenizer


def read_schedule(folder: Path) -> DDPMScheduler:
    """The schedule in its folder of diffusers' layout; raises UserError if it cannot be loaded."""
    from diffusers import DDPMScheduler

    with loading(folder):
        schedule: Any = DDPMScheduler.from_pretrained(folder, local_files_only=True)
    return schedule


def training_schedule(
    scheduler: Any, path: str, prediction_type: str | None, zero_terminal_snr: bool | None
) -> DDPMScheduler:
    """The schedule that a base is trained on, as its files say or as the settings override it.

    Raises:
        UserError: if it predicts neither noise nor velocity, or noise from pure noise, or its betas are none.
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
    betas, steps = schedule.betas, schedule.config["num_train_timesteps"]
    if not (len(betas) == steps > 0 and bool(((betas > 0) & (betas <= 1)).all())):
        raise UserError(f"{path} has a schedule of {steps} steps whose betas are not as many numbers from 0 to 1")
    if schedule.config["rescale_betas_zero_snr"] and predicted == "epsilon":
        raise UserError(
            f"{path} has a schedule that ends in pure noise, from which noise cannot be predicted: "
            "use model.prediction_type=v_prediction, or model.zero_terminal_snr=false"
        )
    return schedule
