"""A small random Stable Diffusion for tests of adapters: no vocabulary, no VAE, built in milliseconds."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from transformers import CLIPTextConfig, CLIPTextModel

from dpo_sd.lora.adapters import adapter_state, load_adapter_state
from dpo_sd.lora.attaching import LoRA
from dpo_sd.lora.names import modules_of
from dpo_sd.lora.weights import ATTENTION, LoRAWeights
from dpo_sd.models.families import FamilyName
from dpo_sd.models.skeletons import on_meta
from dpo_sd.models.stable_diffusion import Fingerprints, StableDiffusion

TRANSFORMER = [*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"]
FULL = [*TRANSFORMER, *CONVOLUTIONS, "time_emb_proj"]


def make_model(width: int = 32) -> StableDiffusion:
    """A model whose text embeddings have that width; its modules have names that `tiny` has too."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=width,
            attention_head_dim=8,
            norm_num_groups=8,
        )
        config = CLIPTextConfig(
            vocab_size=20,
            hidden_size=width,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=5,
            bos_token_id=0,
            eos_token_id=1,
        )
        encoder = CLIPTextModel(config)
    for network in (unet, encoder):
        network.eval().requires_grad_(False)
    nothing: Any = None
    scheduler = DDPMScheduler(steps_offset=1, clip_sample=False)
    return StableDiffusion("tiny", unet, nothing, [encoder], [nothing], scheduler, Fingerprints("", "", ""), "cpu")


def predict(model: StableDiffusion) -> torch.Tensor:
    """The UNet's prediction for two fixed inputs and two prompts."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    embeds = model.text_encoders[0](torch.tensor([[0, 5, 9, 3, 1], [0, 7, 2, 1, 1]])).last_hidden_state
    return model.unet(latents, torch.tensor([20, 700]), embeds).sample


@torch.no_grad()
def output(model: StableDiffusion) -> torch.Tensor:
    return predict(model)


def trained(lora: LoRA, model: StableDiffusion | None = None) -> StableDiffusion:
    """A model whose policy has moved: its B is random."""
    model = make_model() if model is None else model
    lora.attach(model)
    generator = torch.Generator().manual_seed(2)
    state = adapter_state(model, "policy")
    for key, value in state.items():
        if "lora_B" in key:
            value.copy_(torch.randn(value.shape, generator=generator) * 0.2)
    load_adapter_state(model, "policy", state)
    return model


def ones(family: FamilyName, *ends: str) -> LoRAWeights:
    """A LoRA of rank 2 and alpha 1 on all modules of a family, or on those whose names end so."""
    networks, state = (model := on_meta(family)).networks, {}
    modules = {name: inside for name, inside in modules_of(model).items() if not ends or name.endswith(ends)}
    for number, (name, inside) in enumerate(modules.items()):
        module: Any = networks[name.partition(".")[0]].get_submodule(inside)
        out, width, *kernel = module.weight.shape
        state[f"{name}.lora_A.weight"] = torch.full((2, width, *kernel), 1.0 + number)
        state[f"{name}.lora_B.weight"] = torch.full((out, 2, *(1 for _ in kernel)), 1.0 + number)
    return LoRAWeights(state, dict.fromkeys(modules, 1.0))
