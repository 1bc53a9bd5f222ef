"""Small Stable Diffusions of random weights in the layouts of real ones: diffusers folders and single files."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dpo_sd.models.families import TINY


class SingleFile(NamedTuple):
    """A checkpoint in one file, the folder with its settings, and the same model in diffusers' layout."""

    file: Path
    config: Path
    folder: Path


def make_folder(folder: Path, family: str, text_width: int = 32) -> Path:
    """A diffusers folder of a small model; `text_width` is that of its only, or of SDXL's first, text encoder."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        pipeline = _sdxl(text_width) if family == "sdxl" else _sd(family, text_width)
    pipeline.save_pretrained(folder)
    return folder


def make_single_file(folder: Path, family: str) -> SingleFile:
    """A checkpoint in Stability's layout; its UNet has the family's text width, by which a family is told."""
    whole = make_folder(folder / "whole", family, text_width=768 if family == "sd15" else 32)
    state = {}
    for part, prefix, rename in (
        ("unet", "model.diffusion_model.", _unet_name),
        ("vae", "first_stage_model.", _vae_name),
    ):
        for name, tensor in _weights(whole / part).items():
            key = prefix + rename(name)
            squares = ".attn_1." in key and tensor.ndim == 2  # Stability's VAE has attention of 1x1 convolutions
            state[key] = tensor[:, :, None, None] if squares else tensor
    nested = "cond_stage_model.transformer." if family == "sd15" else "conditioner.embedders.0.transformer."
    for name, tensor in _weights(whole / "text_encoder").items():
        state[nested + (name if name.startswith("text_model.") else f"text_model.{name}")] = tensor
    if family == "sdxl":
        state |= _open_clip(_weights(whole / "text_encoder_2"), "conditioner.embedders.1.model.")
    file = folder / f"{family}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, file)
    config = shutil.copytree(whole, folder / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    return SingleFile(file, config, whole)


def _unet(**settings: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=2,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        **settings,
    )


def _text(cls: Any, width: int, **settings: Any) -> Any:
    return cls(
        CLIPTextConfig(
            vocab_size=626,
            hidden_size=width,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            bos_token_id=512,
            eos_token_id=513,
            pad_token_id=513,
            **settings,
        )
    )


def _scheduler(**settings: Any) -> DDIMScheduler:
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    return DDIMScheduler(**schedule, clip_sample=False, set_alpha_to_one=False, **settings)


def _sd(family: str, text_width: int) -> Any:
    second = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True} if family == "sd21" else {}
    parts: dict[str, Any] = {
        "unet": _unet(cross_attention_dim=text_width),
        "text_encoder": _text(CLIPTextModel, text_width),
        "scheduler": _scheduler(**second),
    }
    nothing: dict[str, Any] = {"safety_checker": None, "feature_extractor": None}
    return StableDiffusionPipeline(**parts, **_of_tiny(), **nothing, requires_safety_checker=False)


def _sdxl(text_width: int) -> Any:
    parts: dict[str, Any] = {
        "unet": _unet(
            cross_attention_dim=text_width + 48,
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=48 + 6 * 8,
        ),
        "text_encoder": _text(CLIPTextModel, text_width),
        "text_encoder_2": _text(CLIPTextModelWithProjection, 48, projection_dim=48),
        "scheduler": _scheduler(),
    }
    shared = _of_tiny()
    return StableDiffusionXLPipeline(**parts, **shared, tokenizer_2=shared["tokenizer"], add_watermarker=False)


def _of_tiny() -> dict[str, Any]:
    """The VAE and the vocabulary of the model that ships with the package."""
    vae = AutoencoderKL.from_pretrained(TINY / "vae", local_files_only=True)
    return {"vae": vae, "tokenizer": CLIPTokenizer.from_pretrained(TINY / "tokenizer", local_files_only=True)}


def _weights(folder: Path) -> dict[str, Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


Rule = tuple[str, str | Callable[[re.Match[str]], str]]

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_UNET: list[Rule] = [
    (r"conv_in\.", "input_blocks.0.0."),
    (r"conv_norm_out\.", "out.0."),
    (r"conv_out\.", "out.2."),
    (r"time_embedding\.linear_(\d)", lambda m: f"time_embed.{2 * int(m[1]) - 2}"),
    (r"add_embedding\.linear_(\d)", lambda m: f"label_emb.0.{2 * int(m[1]) - 2}"),
    (r"down_blocks\.(\d)\.resnets\.(\d)", lambda m: f"input_blocks.{3 * int(m[1]) + int(m[2]) + 1}.0"),
    (r"down_blocks\.(\d)\.attentions\.(\d)", lambda m: f"input_blocks.{3 * int(m[1]) + int(m[2]) + 1}.1"),
    (r"down_blocks\.(\d)\.downsamplers\.0\.conv", lambda m: f"input_blocks.{3 * int(m[1]) + 3}.0.op"),
    (r"mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}"),
    (r"mid_block\.attentions\.0", "middle_block.1"),
    (r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"output_blocks.{3 * int(m[1]) + int(m[2])}.0"),
    (r"up_blocks\.(\d)\.attentions\.(\d)", lambda m: f"output_blocks.{3 * int(m[1]) + int(m[2])}.1"),
    (r"up_blocks\.(\d)\.upsamplers\.0\.conv", lambda m: f"output_blocks.{3 * int(m[1]) + 2}.2.conv"),
]
_VAE: list[Rule] = [
    (r"encoder\.down_blocks\.(\d)\.resnets\.(\d)", r"encoder.down.\1.block.\2"),
    (r"encoder\.down_blocks\.(\d)\.downsamplers\.0", r"encoder.down.\1.downsample"),
    (r"decoder\.up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"decoder.up.{3 - int(m[1])}.block.{m[2]}"),
    (r"decoder\.up_blocks\.(\d)\.upsamplers\.0", lambda m: f"decoder.up.{3 - int(m[1])}.upsample"),
    (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
]


def _unet_name(name: str) -> str:
    if ".resnets." in name:
        *head, module, kind = name.split(".")
        name = ".".join([*head, _RESNET[module], kind])
    return _renamed(name, _UNET)


def _vae_name(name: str) -> str:
    return _renamed(name, _VAE)


def _renamed(name: str, rules: list[Rule]) -> str:
    for pattern, new in rules:
        name = re.sub(f"(?<![a-z_]){pattern}", new, name)
    return name


def _open_clip(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """OpenCLIP's names for a CLIPTextModelWithProjection, with q, k and v in one matrix."""
    named = {
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
    }
    inside = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    out = {prefix + named[name]: tensor for name, tensor in state.items() if name in named}
    out[f"{prefix}text_projection"] = state["text_projection.weight"].T
    for name, tensor in state.items():
        if not (match := re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)):
            continue
        layer, module, kind = match.groups()
        block = f"{prefix}transformer.resblocks.{layer}."
        if module == "self_attn.q_proj":
            parts = [state[name.replace("q_proj", f"{which}_proj")] for which in "qkv"]
            out[f"{block}attn.in_proj_{kind}"] = torch.cat(parts)
        elif module == "self_attn.out_proj":
            out[f"{block}attn.out_proj.{kind}"] = tensor
        elif module in inside:
            out[f"{block}{inside[module]}.{kind}"] = tensor
    return out
