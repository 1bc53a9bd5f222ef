"""What other programs read of a LoRA file, at the real shapes of the families, without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_model import make_model, ones, trained

from dpo_sd.lora.adapters import weights_of
from dpo_sd.lora.attaching import LoRA
from dpo_sd.lora.names import kohya_name, modules_of, sgm_name
from dpo_sd.lora.programs import diffusers_scales, loader_report, unmatched
from dpo_sd.lora.weights import LoRAWeights
from dpo_sd.lora.writing import save_diffusers, save_kohya
from dpo_sd.models.families import FAMILIES, FamilyName
from dpo_sd.models.skeletons import blank, on_meta

REAL = pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])


def stems(keys: list[str]) -> set[str]:
    return {key.partition(".")[0] for key in keys}


def save_by_names_of_diffusers(lora: LoRAWeights, file: Path, te: str = "lora_te_") -> Path:
    """A Kohya file that calls all modules as diffusers does."""
    state = {}
    for module in lora.modules:
        network, _, inside = module.partition(".")
        prefix = {"unet": "lora_unet_", "text_encoder": te, "text_encoder_2": "lora_te2_"}[network]
        name = prefix + inside.replace(".", "_")
        state[f"{name}.lora_down.weight"] = lora.state[f"{module}.lora_A.weight"]
        state[f"{name}.lora_up.weight"] = lora.state[f"{module}.lora_B.weight"]
        state[f"{name}.alpha"] = torch.tensor(lora.alphas[module])
    save_file(state, file)
    return file


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("conv_in", "input_blocks.0.0"),
        ("time_embedding.linear_2", "time_embed.2"),
        ("add_embedding.linear_1", "label_emb.0.0"),
        ("down_blocks.0.resnets.1.conv1", "input_blocks.2.0.in_layers.2"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
        (
            "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2",
            "input_blocks.4.1.transformer_blocks.0.ff.net.2",
        ),
        ("down_blocks.2.resnets.0.conv_shortcut", "input_blocks.7.0.skip_connection"),
        ("mid_block.resnets.1.time_emb_proj", "middle_block.2.emb_layers.1"),
        ("mid_block.attentions.0.proj_in", "middle_block.1.proj_in"),
        ("up_blocks.0.attentions.2.proj_out", "output_blocks.2.1.proj_out"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv"),
        ("up_blocks.2.resnets.2.conv2", "output_blocks.8.0.out_layers.3"),
        ("conv_out", "out.2"),
    ],
)
def test_modules_of_sdxl_have_the_names_of_stabilitys_code(module: str, name: str) -> None:
    assert sgm_name(module) == name


def test_no_two_modules_of_sdxl_share_a_name() -> None:
    modules = modules_of(on_meta("sdxl"))
    assert len({kohya_name(module, FAMILIES["sdxl"]) for module in modules}) == len(modules)


@REAL
def test_every_key_of_every_module_is_read_by_every_program(tmp_path: Path, family: FamilyName) -> None:
    """All but A1111, which has no place for the projection of SDXL's second text encoder, and diffusers with SD 2,
    whose projections Kohya's trainer has as convolutions."""
    file = save_kohya(ones(family), tmp_path / "x.safetensors", family)
    total = len(load_file(file))
    left = unmatched(file, on_meta(family))
    assert list(left) == ["ComfyUI", "A1111", "InvokeAI", "diffusers"]
    stated = {"sdxl": {"A1111": {"lora_te2_text_projection"}}, "sd21": {"diffusers": stems([*load_file(file)])}}
    assert {program: stems(keys) for program, keys in left.items() if keys} == stated.get(family, {})
    assert loader_report(file, on_meta(family))[0] == f"ComfyUI   0 unmatched keys of {total}"


@REAL
def test_attention_in_diffusers_form_is_read_by_diffusers_alone(tmp_path: Path, family: FamilyName) -> None:
    lora = ones(family, "attn1.to_q")
    file = save_diffusers(lora, tmp_path / "x.safetensors")
    n = 2 * len(lora.modules)
    assert [line.partition(" (")[0] for line in loader_report(file, on_meta(family))] == [
        f"ComfyUI   {n} unmatched keys of {n}",
        f"A1111     {n} unmatched keys of {n}",
        f"InvokeAI  {n} unmatched keys of {n}",
        f"diffusers 0 unmatched keys of {n}",
    ]


def test_diffusers_names_would_cost_sdxl_the_modules_for_which_stabilitys_are_written(tmp_path: Path) -> None:
    file = save_by_names_of_diffusers(ones("sdxl"), tmp_path / "x.safetensors", te="lora_te1_")
    left = {program: stems(keys) for program, keys in unmatched(file, on_meta("sdxl")).items()}
    embedding = {"lora_unet_add_embedding_linear_1", "lora_unet_add_embedding_linear_2"}
    assert left["ComfyUI"] == left["InvokeAI"] == set()
    assert left["A1111"] == embedding | {"lora_unet_up_blocks_0_upsamplers_0_conv", "lora_te2_text_projection"}
    assert left["diffusers"] >= embedding


def test_a_mixture_of_names_is_refused_by_invokeai_and_halved_by_diffusers(tmp_path: Path) -> None:
    lora = ones("sdxl", "attn1.to_q")
    theirs = load_file(save_by_names_of_diffusers(lora, tmp_path / "x.safetensors"))
    ours = load_file(save_kohya(lora, tmp_path / "y.safetensors", "sdxl"))
    mixed = {key: value for key, value in theirs.items() if "_down_blocks_" in key}
    mixed |= {key: value for key, value in ours.items() if "_output_blocks_" in key}
    save_file(mixed, tmp_path / "z.safetensors")
    left = unmatched(tmp_path / "z.safetensors", on_meta("sdxl"))
    assert left["ComfyUI"] == left["A1111"] == []
    assert left["diffusers"] == sorted(key for key in mixed if "_output_blocks_" in key)
    assert left["InvokeAI"] == sorted(mixed)


@pytest.mark.parametrize(("family", "missing"), [("sd15", {"InvokeAI"}), ("sd21", {"InvokeAI", "A1111"})])
def test_the_prefix_of_sdxl_costs_older_models_their_text_encoder(
    tmp_path: Path, family: FamilyName, missing: set[str]
) -> None:
    lora = ones(family, "self_attn.q_proj", "self_attn.out_proj")
    file = save_by_names_of_diffusers(lora, tmp_path / "x.safetensors", te="lora_te1_")
    assert {program for program, keys in unmatched(file, on_meta(family)).items() if keys} == missing


def test_modules_that_are_nowhere_are_counted_for_every_program(tmp_path: Path) -> None:
    lora = ones("sd15", "attn1.to_q")
    state = load_file(save_kohya(lora, tmp_path / "x.safetensors", "sd15"))
    save_file(
        {key.replace("mid_block", "mid_blocks"): value for key, value in state.items()}, tmp_path / "y.safetensors"
    )
    for program, keys in unmatched(tmp_path / "y.safetensors", on_meta("sd15")).items():
        assert stems(keys) >= {"lora_unet_mid_blocks_attentions_0_transformer_blocks_0_attn1_to_q"}, program


def test_for_a_model_of_no_known_size_only_diffusers_is_asked(tmp_path: Path) -> None:
    model = trained(LoRA(rank=4, alpha=1, text_encoder=True))
    file = save_kohya(weights_of(model), tmp_path / "x.safetensors", "tiny")
    assert loader_report(file, make_model()) == ["diffusers 0 unmatched keys of 120"]
    assert set(diffusers_scales(file, make_model()).values()) == {0.25}


def test_a_blank_copy_has_the_shape_and_neither_weights_nor_adapters() -> None:
    model = trained(LoRA(rank=4, text_encoder=True))
    copy = blank(model)
    assert modules_of(copy) == modules_of(make_model())
    tensors: list[Any] = [tensor for network in copy.networks.values() for tensor in network.parameters()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
