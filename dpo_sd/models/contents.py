"""What the files of a base hold, told from headers and settings: another thing than a family's base is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo_sd.errors import UserError
from dpo_sd.files.tensors import Header, HeaderError, read_header
from dpo_sd.models.families import family_of_file, family_of_unet
from dpo_sd.models.places import IS_A_LORA, PICKLES, check_family

if TYPE_CHECKING:
    from dpo_sd.models.families import Family
    from dpo_sd.models.files import WeightFiles

LATENT_CHANNELS = 4
# what a UNet of other input channels is given beside the noisy latent
_BESIDE = {5: "depth", 7: "a small image to enlarge", 8: "an image to edit", 9: "a mask and an image to inpaint"}
# settings of a UNet that is told more than the time and the text
_TOLD = ("class_embed_type", "num_class_embeds", "time_cond_proj_dim", "encoder_hid_dim_type", "encoder_hid_dim")
_BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")  # the schedules of DDPM, as diffusers names them
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_FORMS = (  # of weights that are more than their names say, and what to do
    (
        re.compile(r"\.(base_layer|original_module|modules_to_save|processor)\.|(^|[._])(lora|hada|lokr|oft|ia3)_"),
        "adapters are attached to it: merge them into its weights, and save it again without",
    ),
    (
        re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|^module\."),
        "it was saved inside a wrapper, as torch.compile's is one: save the network in it again",
    ),
    (
        re.compile(
            r"(^|[._])(scale_(weight|input)|(weight|input|output)_scale\w*|scaled_fp8|comfy_quant|absmax|quant_map"
            r"|quant_state\b.*|SCB|weight_format|qweight|qzeros|scales|wscales|g_idx|_scale|_data|qdata)$"
        ),
        "its weights are quantised, and scaled by numbers of their own: use the file in half or single precision",
    ),
)
_NOT_READ = ("model_ema.", "optimizer")  # beginnings of names of what a trainer keeps beside the weights
_UNET = "model.diffusion_model."
_VAE = ("first_stage_model.", "vae.")
# cross-attention of the first block that has any, by whose width a single file is told
_CROSS_ATTENTION = re.compile(
    r"model\.diffusion_model\.input_blocks\.\d+\.1\.transformer_blocks\.0\.attn2\.to_k\.weight"
)
_PREDICTIONS = {  # in metadata of single files
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "x0": "sample",
    "sample": "sample",
    "flow": "flow_prediction",
    "flow_matching": "flow_prediction",
    "rectified_flow": "flow_prediction",
}
_VELOCITY = {"true": "v_prediction", "1": "v_prediction", "false": "epsilon", "0": "epsilon"}


class Told(NamedTuple):
    """A file's statement on the training of its UNet; None where it says nothing.

    Args:
        prediction_type: what the UNet predicts, as diffusers names it.
        zero_terminal_snr: whether the schedule ends in pure noise.
        by: the names of the tensors or texts that say so.
    """

    prediction_type: str | None = None
    zero_terminal_snr: bool | None = None
    by: str = ""


def told(header: Header, family: Family) -> Told:
    """The statement of a single file: by empty tensors, which A1111, Forge, ComfyUI and InvokeAI know, or by texts."""
    by_texts = told_by_texts(header.metadata)
    kind, key = by_texts.prediction_type, by_texts.by
    if "v_pred" in header.shapes:
        kind, key = "v_prediction", "v_pred"
    elif kind is None and family.kohya_velocity is not None:  # otherwise one name is for both
        kinds = {family.kohya.architecture: "epsilon", family.kohya_velocity.architecture: "v_prediction"}
        kind = kinds.get(header.metadata.get("modelspec.architecture", ""))
        key = " and ".join(filter(None, ("modelspec.architecture" if kind else "", key)))
    if "ztsnr" in header.shapes:
        return Told(kind, True, f"{key} and ztsnr" if kind else "ztsnr")
    return Told(kind, by_texts.zero_terminal_snr, key)


def told_by_texts(metadata: Mapping[str, str]) -> Told:
    """The statement of the metadata of a single file or of a LoRA."""
    texts = {key: text.strip().lower().replace("-", "_") for key, text in metadata.items()}
    said = {  # the first that says something is believed
        # one that is unknown is refused by its name
        "modelspec.prediction_type": _PREDICTIONS.get(kind := texts.get("modelspec.prediction_type", ""), kind or None),
        "ss_v_parameterization": _VELOCITY.get(texts.get("ss_v_parameterization", "")),
    }
    key = next((key for key, kind in said.items() if kind is not None), "")
    ends = texts.get("ss_zero_terminal_snr") == "true"
    return Told(said.get(key), ends or None, " and ".join(filter(None, (key, "ss_zero_terminal_snr" if ends else ""))))


def check_header(header: Header, file: Path) -> None:
    """Refuses weights that are more than their names say: with adapters, inside wrappers, or quantised.

    Raises:
        UserError: if a tensor is of such a kind.
    """
    check_names(header.shapes, file)
    for name, kind in header.dtypes.items():
        if name.endswith((".weight", ".bias")) and kind not in _FLOATS and not name.startswith(_NOT_READ):
            raise UserError(f"{file} holds {name} as {kind}: its weights are quantised: use a file that is not")


def check_names(names: Iterable[str], file: Path) -> None:
    """As `check_header`, by names alone."""
    for name in names:
        for form, meaning in _FORMS:
            if form.search(name) and not name.startswith(_NOT_READ):
                raise UserError(f"{file} holds {name}: {meaning}")


def header_of(file: Path) -> Header:
    """The header of a safetensors file; raises UserError if it has none."""
    try:
        return read_header(file)
    except (OSError, HeaderError) as error:
        raise UserError(f"{file} is no safetensors file, or damaged ({error}): fetch it again") from error


def check_family_of_file(file: Path, family: Family) -> None:
    """Refuses a single file that is a LoRA, of another family or of none, in Stability's layout."""
    header = header_of(file)
    shapes = header.shapes
    widths = {shape[-1] for name, shape in shapes.items() if _CROSS_ATTENTION.fullmatch(name)}
    if not widths:
        if any(".lora_" in name or name.startswith("lora_") for name in shapes) and _UNET not in "".join(shapes):
            raise UserError(f"{file} {IS_A_LORA}")
        check_header(header, file)
        raise UserError(f"{file} holds no Stable Diffusion 1, 2 or XL in Stability's layout: use such a checkpoint")
    check_family(family_of_file(shapes, widths.pop()), family, str(file))


def check_family_of_folder(folder: Path, family: Family, named: str | None = None) -> None:
    """Refuses a folder in diffusers' layout that is of another family; `named` is what the user calls it."""
    try:
        found = family_of_unet(_read(folder / "unet", "config.json"))
    except UserError:
        return  # loading says what is wrong with it
    check_family(found, family, named or str(folder))


def check_file(header: Header, file: Path, family: Family, own_vae: bool) -> None:
    """Refuses a single file that is no whole base of the family.

    Args:
        header: of the file; of a pickle, its tensors' names and shapes in that form.
        own_vae: whether the VAE is read from it too.

    Raises:
        UserError: if it is more than a base, such as one that inpaints or is quantised, or lacks a part.
    """
    shapes = header.shapes
    check_header(header, file)
    if marks := [name for name in shapes if re.match(r"edm_(mean|std|vpred)", name)]:
        raise _other_noise(f"{file} holds {marks[0]}, so its noise is that of EDM")
    for name, end in (("input_blocks.0.0.weight", 1), ("out.2.weight", 0)):
        if len(shape := shapes.get(_UNET + name, ())) == 4:
            _check_channels(shape[end], "input" if end else "output", file)
    for name, what in (("label_emb.weight", "classes"), ("time_embed.cond_proj.weight", "the guidance")):
        if _UNET + name in shapes:
            raise _told_more(file, what)
    prefixes = {name: (how.prefix,) for name, how in family.encoders.items()} | ({"vae": _VAE} if own_vae else {})
    if lacking := [part for part, begin in prefixes.items() if not any(name.startswith(begin) for name in shapes)]:
        named = ", ".join(f"{part} ({prefixes[part][0]}*)" for part in lacking)
        way = "give one as model.vae, or use" if lacking == ["vae"] else "use"
        raise UserError(f"{file} cannot be loaded: it lacks {named}: {way} a whole checkpoint")


def check_folder(folder: Path, names: Iterable[str], family: Family, files: WeightFiles) -> None:
    """Refuses networks in diffusers' layout that are not a base of the family, by settings and headers.

    Args:
        folder: of the pipeline.
        names: the networks that are read from it, "unet" among them.
        files: which weights are read.

    Raises:
        UserError: if one is of another kind or family, or its weights are more than their names say.
    """
    check_settings(folder, names, family)
    for name in names:
        check_weights(folder / name, files.taken(folder / name)[1])


def check_settings(folder: Path, names: Iterable[str], family: Family, key: str = "path") -> None:
    """As `check_folder`, by settings alone, those of the schedule included; `key` is the setting that gives it."""
    settings = {name: _read(folder / name, "config.json") for name in names}
    check_family(family_of_unet(settings["unet"]), family, str(folder), key)
    check_unet(settings["unet"], family, folder / "unet")
    if "vae" in settings:
        check_vae(settings["vae"], folder / "vae")
    for name in family.encoders:
        _check_kind(settings[name], None, folder / name)
    given = sum(settings[name].get("hidden_size", 0) for name in family.encoders)
    if given != settings["unet"].get("cross_attention_dim", given):
        raise UserError(
            f"{folder / 'unet'} reads text of width {settings['unet']['cross_attention_dim']}, but the text encoders "
            f"of {folder} give {given}: they are not of one model"
        )
    check_schedule(_read(folder / "scheduler", "scheduler_config.json"), folder / "scheduler")


def check_unet(settings: Mapping[str, Any], family: Family, where: Path) -> None:
    """Refuses a UNet that is given other things than a noisy latent, the time and the family's text."""
    _check_kind(settings, "UNet2DConditionModel", where)
    for key, end in (("in_channels", "input"), ("out_channels", "output")):
        _check_channels(settings.get(key, LATENT_CHANNELS), end, where)
    size = settings.get("sample_size")
    if type(size) is not int or size < 1:
        raise UserError(f"{where} has sample_size={size!r}: it must be the side of a latent, 64 for 512 pixels")
    for key in _TOLD:
        if settings.get(key) is not None:
            raise _told_more(where, key)
    if settings.get("addition_embed_type") != family.addition:
        raise _told_more(where, f"addition_embed_type={settings.get('addition_embed_type')}")


def check_vae(settings: Mapping[str, Any], where: Path) -> None:
    """Refuses a VAE whose latents are not 4 channels times one scaling factor."""
    _check_kind(settings, "AutoencoderKL", where)
    if (channels := settings.get("latent_channels", LATENT_CHANNELS)) != LATENT_CHANNELS:
        raise UserError(f"{where} has latents of {channels} channels: only VAEs of {LATENT_CHANNELS} can be used")
    factor = settings.get("scaling_factor", 0.18215)
    if not (isinstance(factor, int | float) and 1e-3 <= factor <= 1e3):
        raise UserError(f"{where} has scaling_factor={factor!r}, which latents are multiplied by: SD's is 0.18215")
    for key in ("shift_factor", "latents_mean", "latents_std"):
        if settings.get(key):
            raise UserError(f"{where} moves its latents by {key}, beside its scaling_factor: use another VAE")


def check_vae_place(place: Path, files: WeightFiles) -> None:
    """Refuses another VAE, a folder in diffusers' layout or a single file, as `check_folder` does the base's own."""
    if place.is_dir():
        check_vae(_read(place, "config.json"), place)
    check_weights(place, files.taken(place)[1] if place.is_dir() else [place])


def check_weights(place: Path, files: Iterable[Path]) -> None:
    """Refuses the files of a part as `check_header` does; pickles are looked at when they are loaded."""
    for file in files:
        if file.suffix in PICKLES:
            continue
        try:
            header = read_header(file)
        except (OSError, HeaderError) as error:
            raise UserError(f"{place} cannot be loaded: {file.name} is damaged ({error})") from error
        check_header(header, file)


def check_schedule(settings: Mapping[str, Any], where: Path) -> None:
    """Refuses a schedule that is not DDPM's (Ho et al. 2020, arXiv:2006.11239), such as EDM's and flow matching's."""
    named = f"{where} is {settings.get('_class_name', 'a schedule')}"
    if settings.get("trained_betas") is None and not {"beta_start", "beta_end", "beta_schedule"} <= settings.keys():
        raise _other_noise(f"{named} without betas")
    if settings.get("trained_betas") is None and settings["beta_schedule"] not in _BETAS:
        raise _other_noise(f"{named} with beta_schedule={settings['beta_schedule']}")
    for key in ("use_flow_sigmas", "sigma_min", "sigma_max"):
        if settings.get(key):
            raise _other_noise(f"{named} with {key}={settings[key]}")
    if settings.get("timestep_type", "discrete") != "discrete":
        raise _other_noise(f"{named} with timestep_type={settings['timestep_type']}")


def _other_noise(what: str) -> UserError:
    return UserError(f"{what}: only models of DDPM's noise schedule, which betas give, can be trained")


def _told_more(where: Path, what: str) -> UserError:
    return UserError(
        f"{where} has a UNet that is told more than the time and the text ({what}): use a base without that"
    )


def _check_channels(channels: int, end: str, where: Path) -> None:
    if channels != LATENT_CHANNELS:
        beside = next((f", which is for {what}" for n, what in _BESIDE.items() if (end, channels) == ("input", n)), "")
        raise UserError(
            f"{where} has a UNet of {channels!r} {end} channels{beside}: only one of {LATENT_CHANNELS} can be trained, "
            "such as the base that it was made from"
        )


def _check_kind(settings: Mapping[str, Any], kind: str | None, where: Path) -> None:
    found = settings.get("_class_name", kind)
    if found != kind:
        raise UserError(f"{where} cannot be loaded: it is a {found}, not a {kind}")
    if settings.get("quantization_config"):
        raise UserError(f"{where} is quantised: use weights in half or single precision, and hardware.weights=nf4 here")


def _read(folder: Path, name: str) -> dict[str, Any]:
    """The settings of a part."""
    try:
        settings = json.loads((folder / name).read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError(f"{name} holds no settings")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder} cannot be loaded: {error}") from error
    return settings
