"""LoRA files: every form carries the same LoRA, as other programs load it, and what is none is refused."""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_model import CONVOLUTIONS, FULL, TRANSFORMER, make_model, ones, output, trained

from dpo_sd.errors import UserError
from dpo_sd.lora.adapters import weights_of
from dpo_sd.lora.attaching import TEXT_ATTENTION, LoRA, check_base, load_for_drawing
from dpo_sd.lora.finding import find_lora, lora_digest
from dpo_sd.lora.names import sgm_name
from dpo_sd.lora.reading import read_lora
from dpo_sd.lora.weights import ATTENTION, PEFT_CONFIG, PEFT_WEIGHTS, WEIGHTS_NAME, LoRAWeights
from dpo_sd.lora.writing import save_diffusers, save_kohya, save_peft
from dpo_sd.models.families import FamilyName
from dpo_sd.models.skeletons import on_meta
from dpo_sd.models.stable_diffusion import StableDiffusion

TO_Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONV1 = "unet.mid_block.resnets.0.conv1"
LAYERS = "text_encoder.text_model.encoder.layers"
Q_PROJ = f"{LAYERS}.1.self_attn.q_proj"
FORMS = ["diffusers", "kohya", "peft"]


def save(lora: LoRAWeights, form: str, folder: Path, family: FamilyName = "tiny") -> Path:
    if form == "kohya":
        return save_kohya(lora, folder / "style.safetensors", family)
    return (
        save_peft(lora, folder / "peft", on_meta(family))
        if form == "peft"
        else save_diffusers(lora, folder / WEIGHTS_NAME)
    )


def varied(lora: LoRAWeights, ranks: dict[str, int], alphas: dict[str, float]) -> LoRAWeights:
    """The same LoRA with other ranks and alphas in some modules."""
    state = dict(lora.state)
    for module, rank in ranks.items():
        state[f"{module}.lora_A.weight"] = state[f"{module}.lora_A.weight"][:rank]
        state[f"{module}.lora_B.weight"] = state[f"{module}.lora_B.weight"][:, :rank]
    return LoRAWeights(state, lora.alphas | alphas)


def same(one: LoRAWeights, other: LoRAWeights) -> bool:
    return (
        one.state.keys() == other.state.keys()
        and all(torch.equal(tensor, other.state[key]) for key, tensor in one.state.items())
        and one.alphas == other.alphas
    )


def alike(one: LoRAWeights, other: LoRAWeights) -> bool:
    """Whether two are the same but for the rounding of B, where factors are no powers of two."""
    return one.alphas == other.alphas and all(
        torch.equal(tensor, other.state[key]) if exact(one) else torch.allclose(tensor, other.state[key], rtol=3e-7)
        for key, tensor in one.state.items()
    )


def exact(lora: LoRAWeights) -> bool:
    return all(math.log2(alpha / lora.ranks[module]).is_integer() for module, alpha in lora.alphas.items())


def drawing_with(path: Path) -> StableDiffusion:
    model = make_model()
    load_for_drawing(model, [(path, 1.0)])
    return model


def drawing_by_the_library(path: Path, form: str) -> StableDiffusion:
    """A model that diffusers or PEFT has loaded a LoRA into."""
    from peft import PeftModel

    model = make_model()
    if form == "peft":
        for name, network in model.networks.items():
            if (path / name).is_dir():
                PeftModel.from_pretrained(network, path / name)
    else:
        pipeline: Any = model.pipeline()
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name, local_files_only=True)
    return model


CASES = {
    "attention": LoRA(rank=4, target_modules=ATTENTION),
    "alpha below rank": LoRA(rank=4, alpha=1, target_modules=TRANSFORMER),
    "text encoder": LoRA(rank=4, alpha=6, text_encoder=True),
    "convolutions too": LoRA(rank=4, alpha=8, target_modules=FULL, text_encoder=True),
    "convolutions only": LoRA(rank=3, alpha=0.5, target_modules=CONVOLUTIONS),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_an_export_gives_the_outputs_of_the_policy_in_the_library_it_is_for(
    tmp_path: Path, case: str, form: str
) -> None:
    model = trained(CASES[case])
    path = save(weights_of(model), form, tmp_path)
    drawn = output(drawing_by_the_library(path, form))
    if form == "diffusers" and not exact(weights_of(model)):
        torch.testing.assert_close(drawn, output(model))
    else:
        assert torch.equal(drawn, output(model))


@pytest.mark.parametrize("case", CASES)
def test_a_lora_goes_from_peft_to_kohya_to_diffusers_to_peft_without_a_change(tmp_path: Path, case: str) -> None:
    lora = weights_of(trained(CASES[case]))
    for form in ["peft", "kohya", "diffusers", "peft"]:
        file = read_lora(save(lora, form, tmp_path))
        assert alike(file, lora) and file.form == form
        lora = file


VARIED = {
    "a convolution": ({CONV1: 3, TO_Q: 2}, {CONV1: 8.0}),
    "an attention projection": ({TO_Q: 2}, {TO_Q: 8.0}),
    "a text encoder": ({Q_PROJ: 3}, {Q_PROJ: 1.0}),
    "a network of its own": ({}, {f"{LAYERS}.{n}.self_attn.{p}": 1.0 for n in (0, 1) for p in TEXT_ATTENTION}),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", VARIED)
def test_ranks_and_alphas_that_vary_keep_their_strength_in_every_form(tmp_path: Path, case: str, form: str) -> None:
    whole = weights_of(trained(LoRA(rank=4, alpha=2, target_modules=FULL, text_encoder=True)))
    lora = varied(whole, *VARIED[case])
    expected = make_model()
    for name in lora.modules:
        network, _, inside = name.partition(".")
        module: Any = expected.networks[network].get_submodule(inside.removeprefix("text_model."))
        module.weight += lora.change(name)
    path = save(lora, form, tmp_path)
    for drawn in (drawing_with(path), drawing_by_the_library(path, form)):
        torch.testing.assert_close(output(drawn), output(expected), rtol=1e-4, atol=1e-5)
    assert read_lora(path).ranks == lora.ranks


def test_alphas_stand_as_they_are_where_every_loader_reads_them(tmp_path: Path) -> None:
    lora = varied(weights_of(trained(LoRA(rank=4, alpha=2, target_modules=FULL))), {TO_Q: 2, CONV1: 3}, {CONV1: 8.0})
    for form in FORMS:
        assert alike(read_lora(save(lora, form, tmp_path)), lora)
    assert load_file(tmp_path / "style.safetensors")["lora_unet_mid_block_resnets_0_conv1.alpha"] == 8
    assert "rank 2 to 4, alpha 2 to 8, scale 0.5 to 2.66667" in lora.summary()


def test_alphas_that_diffusers_would_misread_become_one_and_b_makes_up_for_it(tmp_path: Path) -> None:
    lora = varied(weights_of(trained(LoRA(rank=4, alpha=2, text_encoder=True))), {}, {Q_PROJ: 3.0})
    file = read_lora(save(lora, "kohya", tmp_path))
    assert set(file.alphas.values()) == {2}
    for module in lora.modules:
        torch.testing.assert_close(file.change(module), lora.change(module))
    assert same(file.of("unet"), lora.of("unet"))


# families at their real shapes


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_every_module_of_a_real_model_keeps_its_name_in_every_form(
    tmp_path: Path, family: FamilyName, form: str
) -> None:
    lora = ones(family)
    assert same(check_base(on_meta(family), read_lora(save(lora, form, tmp_path, family))), lora)


@pytest.mark.parametrize(
    ("family", "prediction_type", "version", "architecture"),
    [
        ("tiny", "epsilon", "sd_v1", "stable-diffusion-v1/lora"),
        ("sd15", "epsilon", "sd_v1", "stable-diffusion-v1/lora"),
        ("sd21", "epsilon", "sd_v2", "stable-diffusion-v2-512/lora"),
        ("sd21", "v_prediction", "sd_v2_v", "stable-diffusion-v2-768-v/lora"),
        ("sdxl", "epsilon", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
    ],
)
def test_kohya_files_carry_the_metadata_that_other_tools_read(
    tmp_path: Path, family: FamilyName, prediction_type: Any, version: str, architecture: str
) -> None:
    lora = ones(family, "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    path = save_kohya(
        lora, tmp_path / "style.safetensors", family, prediction_type=prediction_type, resolution=768,
        extra={"ss_steps": "300"},
    )  # fmt: skip
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert {key: text for key, text in metadata.items() if not key.startswith("dpo_sd.")} == {
        "ss_v2": str(family == "sd21"),
        "ss_base_model_version": version,
        "ss_network_module": "networks.lora",
        "ss_network_dim": "2",
        "ss_network_alpha": "1",
        "ss_network_args": "{}",
        "ss_output_name": "style",
        "ss_resolution": "(768, 768)",
        "ss_steps": "300",
        "ss_zero_terminal_snr": "False",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "diffusers",
        "modelspec.title": "style",
        "modelspec.resolution": "768x768",
        "modelspec.prediction_type": {"epsilon": "epsilon", "v_prediction": "v"}[prediction_type],
    }


@pytest.mark.parametrize("zero", [False, True])
def test_kohya_files_say_whether_the_schedule_ends_in_pure_noise(tmp_path: Path, zero: bool) -> None:
    path = save_kohya(
        ones("sdxl", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"), tmp_path / "x.safetensors", "sdxl",
        prediction_type="v_prediction", zero_terminal_snr=zero, extra={"ss_zero_terminal_snr": str(not zero)},
    )  # fmt: skip
    metadata = read_lora(path).metadata
    assert (metadata["modelspec.prediction_type"], metadata["ss_zero_terminal_snr"]) == ("v", str(zero))


def test_sdxl_is_read_by_diffusers_names_too(tmp_path: Path) -> None:
    lora = ones("sdxl", "add_embedding.linear_1", "attn2.to_k", "upsamplers.0.conv", "proj_in")
    kohya = {}
    for key, tensor in lora.state.items():
        module, _, half = key.rpartition(".lora_")
        name = module.replace("unet.", "lora_unet_").replace(".", "_")
        kohya[f"{name}.lora_{'down' if half[0] == 'A' else 'up'}.weight"] = tensor
        kohya[f"{name}.alpha"] = torch.tensor(1.0)
    save_file(kohya, tmp_path / "x.safetensors")
    assert same(read_lora(tmp_path / "x.safetensors"), lora)


@pytest.mark.parametrize(("alpha", "equal"), [(1.0, True), (3.0, False), (6.0, False), (4.0, True)])
def test_the_diffusers_form_needs_no_alphas_and_keeps_those_that_were_trained_with(
    tmp_path: Path, alpha: float, equal: bool
) -> None:
    lora = weights_of(trained(LoRA(rank=4, alpha=alpha, target_modules=FULL, text_encoder=True)))
    path = save(lora, "diffusers", tmp_path)
    with safe_open(path, framework="pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    assert {key: value for key, value in settings.items() if "alpha" in key} == {
        "unet.lora_alpha": 4, "unet.alpha_pattern": {}, "text_encoder.lora_alpha": 4, "text_encoder.alpha_pattern": {},
    }  # fmt: skip
    bare = tmp_path / "bare.safetensors"  # as a program sees it that knows no metadata
    save_file(load_file(path), bare)
    for module in lora.modules:
        torch.testing.assert_close(read_lora(bare).change(module), lora.change(module), rtol=1e-6, atol=1e-7)
    again = read_lora(path)
    assert again.alphas == lora.alphas
    assert same(again, lora) or not equal


def test_a_half_precision_lora_is_not_rounded_by_its_alpha(tmp_path: Path) -> None:
    lora = weights_of(trained(LoRA(rank=4, alpha=3)))
    half = LoRAWeights({key: tensor.half() for key, tensor in lora.state.items()}, lora.alphas)
    save(half, "diffusers", tmp_path)
    for module in half.modules:
        change = read_lora(tmp_path / WEIGHTS_NAME).change(module)
        torch.testing.assert_close(change, half.change(module), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("part", ["proj_in", "proj_out"])
def test_projections_of_sd_2_have_the_shape_of_kohyas_trainer_in_its_form(tmp_path: Path, part: str) -> None:
    module = f"unet.mid_block.attentions.0.{part}"
    lora = ones("sd21", f"mid_block.attentions.0.{part}", "attn1.to_q")
    state = load_file(save(lora, "kohya", tmp_path, "sd21"))
    down, up = (state[f"lora_{module.replace('.', '_')}.lora_{half}.weight"] for half in ("down", "up"))
    assert (down.shape, up.shape) == ((2, 1280, 1, 1), (1280, 2, 1, 1))
    product = torch.mm(up.flatten(start_dim=1), down.flatten(start_dim=1))  # as other programs multiply them
    assert torch.equal(product.reshape(1280, 1280) * (1.0 / 2), lora.change(module))
    assert state["lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight"].ndim == 2
    assert load_file(save(lora, "diffusers", tmp_path, "sd21"))[f"{module}.lora_A.weight"].ndim == 2


@pytest.mark.parametrize("nested", [False, True], ids=["encoder", "text_model.encoder"])
def test_the_text_encoder_in_pefts_form_is_read_by_every_version_of_transformers(tmp_path: Path, nested: bool) -> None:
    """transformers has moved the modules of CLIP's text model out of `text_model`."""
    from peft import PeftModel, get_peft_model_state_dict

    lora = weights_of(trained(LoRA(rank=4, alpha=2, text_encoder=True)))
    folder = save(lora, "peft", tmp_path) / "text_encoder"
    encoder: Any = make_model().text_encoders[0]
    if nested:
        encoder = torch.nn.ModuleDict({"text_model": encoder})
    read = get_peft_model_state_dict(PeftModel.from_pretrained(encoder, folder))
    assert len(read) == len(lora.of("text_encoder").state)
    for key, tensor in lora.of("text_encoder").state.items():
        inside = key.removeprefix("text_encoder." if nested else "text_encoder.text_model.")
        assert torch.equal(read[f"base_model.model.{inside}"], tensor)


def test_the_same_lora_gives_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    code = (
        "import sys, torch; from dpo_sd.lora.weights import LoRAWeights; "
        "from dpo_sd.lora.writing import save_diffusers, save_kohya; "
        "name = 'unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q'; "
        "lora = LoRAWeights({name + f'.lora_{half}.weight': torch.ones(4, 4) for half in 'AB'}, {name: 2.0}); "
        "save_kohya(lora, sys.argv[1] + '/k.safetensors', 'sd15', resolution=512, extra={'ss_steps': '3'}); "
        "save_diffusers(lora, sys.argv[1] + '/d.safetensors')"
    )
    for number in "12":
        subprocess.run([sys.executable, "-c", code, str(tmp_path / number)], check=True)
    for name in ("k.safetensors", "d.safetensors"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
        assert len(load_file(tmp_path / "1" / name)) == {"k": 3, "d": 2}[name[0]]


# what others have written


def renamed(lora: LoRAWeights, names: Any, file: Path, halves: str = "down up", alpha: Any = None) -> Path:
    """A file with a name of its own for every module, given by network and module."""
    state = {}
    for module in lora.modules:
        network, _, inside = module.partition(".")
        name = names(network, inside)
        for half, key in zip(halves.split(), "AB", strict=True):
            state[f"{name}.lora_{half}.weight"] = lora.state[f"{module}.lora_{key}.weight"].clone()
        if alpha is not None:
            state[f"{name}.alpha"] = alpha(lora.alphas[module])
    save_file(state, file)
    return file


DIALECTS = {
    "one trainer": {"unet": "unet", "text_encoder": "clip_l", "text_encoder_2": "clip_g"},
    "one trainer, older": {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
    "mixed": {"unet": "unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
    "comfyui": {
        "unet": "diffusion_model",
        "text_encoder": "text_encoders.clip_l.transformer",
        "text_encoder_2": "text_encoders.clip_g.transformer",
    },
    "diffusers": {"unet": "unet", "text_encoder": "text_encoder", "text_encoder_2": "text_encoder_2"},
}


@pytest.mark.parametrize("sgm", [False, True], ids=["diffusers names", "sgm names"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_modules_are_read_by_the_names_of_other_trainers(tmp_path: Path, dialect: str, sgm: bool) -> None:
    def name(network: str, inside: str) -> str:
        return f"{DIALECTS[dialect][network]}.{sgm_name(inside) if sgm and network == 'unet' else inside}"

    lora = ones("sdxl", "attentions.0.transformer_blocks.0.attn1.to_q", "samplers.0.conv", "layers.0.mlp.fc1", "conv2")
    one_number = renamed(lora, name, tmp_path / "x.safetensors", alpha=lambda alpha: torch.tensor([alpha]))
    assert same(read_lora(one_number), lora)
    file = read_lora(renamed(lora, name, tmp_path / "y.safetensors", halves="A B"))
    assert same(LoRAWeights(file.state, lora.alphas), lora)
    assert set(file.alphas.values()) == {2}


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_every_module_is_read_by_stabilitys_names(tmp_path: Path, family: FamilyName) -> None:
    def name(network: str, inside: str) -> str:
        return f"unet.{sgm_name(inside)}" if network == "unet" else f"{DIALECTS['one trainer'][network]}.{inside}"

    lora = ones(family)
    assert same(read_lora(renamed(lora, name, tmp_path / "x.safetensors", alpha=torch.tensor)), lora)


def test_stabilitys_names_of_an_sd_1_are_read_with_underscores_too(tmp_path: Path) -> None:
    def name(network: str, inside: str) -> str:
        inside = sgm_name(inside) if network == "unet" else inside
        inside = inside.replace("output_blocks.2.2.conv", "output_blocks.2.1.conv")  # there is no attention before it
        return f"lora_{network.replace('text_encoder', 'te')}_{inside.replace('.', '_')}"

    lora = ones("sd15")
    assert same(read_lora(renamed(lora, name, tmp_path / "x.safetensors", alpha=torch.tensor)), lora)


@pytest.mark.parametrize("start", ["unet.", "", "unet.base_model.model."])
def test_a_named_adapter_is_read(tmp_path: Path, start: str) -> None:
    lora = ones("sd15", "attn1.to_q", "conv1").of("unet")
    named = renamed(lora, lambda _, inside: f"{start}{inside}", tmp_path / "x.safetensors", "A.default B.default")
    assert same(LoRAWeights(read_lora(named).state, lora.alphas), lora)
    state = load_file(named)
    save_file(state | {key.replace("default", "other"): value.clone() for key, value in state.items()}, named)
    refused(named, "holds more than one LoRA for a module")


def test_a_named_adapter_in_pefts_form_is_read(tmp_path: Path) -> None:
    lora = weights_of(trained(LoRA(rank=4, alpha=2, target_modules=FULL)))
    file = save(lora, "peft", tmp_path) / "unet" / PEFT_WEIGHTS
    save_file({key.replace(".weight", ".default.weight"): value for key, value in load_file(file).items()}, file)
    assert same(read_lora(file), lora)


def test_pefts_weights_without_their_settings_are_refused_because_their_strength_is_unknown(tmp_path: Path) -> None:
    folder = save(weights_of(trained(LoRA(rank=4, alpha=2))), "peft", tmp_path) / "unet"
    (folder / PEFT_CONFIG).unlink()
    refused(folder / PEFT_WEIGHTS, r"is PEFT's adapter_model.safetensors without the adapter_config.json beside it")


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float64]
)
def test_a_lora_is_read_in_every_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    lora = ones("sd15", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.resnets.0.conv1")
    lora = LoRAWeights({key: (tensor * 1.1).to(dtype) for key, tensor in lora.state.items()}, lora.alphas)
    file = read_lora(save(lora, "kohya", tmp_path, "sd15"))
    assert file.alphas == lora.alphas
    for key, tensor in lora.state.items():
        assert file.state[key].dtype == (torch.float32 if dtype.itemsize == 1 else dtype)
        assert torch.equal(file.state[key].float(), tensor.float())


def test_numbers_that_torch_cannot_compute_with_are_refused(tmp_path: Path) -> None:
    for dtype, size in (("F4", 8), ("F2_ODD", 4)):
        header = {
            f"unet.a.lora_{half}.weight": {"dtype": dtype, "shape": [4, 4], "data_offsets": [start, start + size]}
            for half, start in (("A", 0), ("B", size))
        }
        text = json.dumps(header).encode()
        (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"0" * 2 * size)
        with pytest.raises(UserError, match=r"holds numbers that cannot be read .*: store them as float16 or float32"):
            read_lora(tmp_path / "x.safetensors")


def test_a_float8_lora_that_holds_no_number_is_refused(tmp_path: Path) -> None:
    state = load_file(save(ones("sd15", "attn1.to_q"), "kohya", tmp_path, "sd15"))
    key = next(key for key in state if key.endswith("lora_up.weight"))
    save_file(state | {key: (state[key] * math.nan).to(torch.float8_e4m3fn)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="no matrix of finite numbers"):
        read_lora(tmp_path / "x.safetensors")


@pytest.mark.parametrize("family", ["sd15", "sd21"])
def test_matrices_and_convolutions_of_one_pixel_take_the_shape_of_the_model(tmp_path: Path, family: FamilyName) -> None:
    lora = ones(family, "attn1.to_q", "proj_in", "conv1", "conv_shortcut", "q_proj")

    def other(tensor: torch.Tensor) -> torch.Tensor:
        small = tensor.ndim == 4 and tensor.shape[2:] == (1, 1)
        return tensor[..., 0, 0] if small else tensor[..., None, None] if tensor.ndim == 2 else tensor

    state = load_file(save(lora, "kohya", tmp_path, family))
    state = {key: value if "alpha" in key else other(value).contiguous() for key, value in state.items()}
    save_file(state, tmp_path / "x.safetensors")
    assert same(check_base(on_meta(family), read_lora(tmp_path / "x.safetensors")), lora)


def test_files_in_the_older_diffusers_names_are_read(tmp_path: Path) -> None:
    from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers

    lora = weights_of(trained(LoRA(rank=4, target_modules=FULL, text_encoder=True)))
    older = convert_state_dict_to_diffusers(dict(lora.state))
    for kind in ("to_q.lora.down", "q_proj.lora_linear_layer.down", "proj_in.lora_A"):
        assert any(kind in key for key in older)
    save_file(older, tmp_path / "x.safetensors")
    assert same(read_lora(tmp_path / "x.safetensors"), lora)


def test_a_unet_alone_is_read_without_its_prefix(tmp_path: Path) -> None:
    lora = weights_of(trained(LoRA(rank=4)))
    save_file({key.removeprefix("unet."): value for key, value in lora.state.items()}, tmp_path / "x.safetensors")
    assert same(read_lora(tmp_path / "x.safetensors"), lora)


@pytest.mark.parametrize("part", ["unet", "unet/adapter_model.safetensors"])
def test_what_peft_writes_of_a_unet_alone_is_read_with_its_alphas(tmp_path: Path, part: str) -> None:
    lora = varied(weights_of(trained(LoRA(rank=4, alpha=2, target_modules=FULL))), {TO_Q: 2}, {CONV1: 8.0})
    assert same(read_lora(save(lora, "peft", tmp_path) / part), lora)


def test_rank_stabilised_metadata_keeps_its_strength(tmp_path: Path) -> None:
    path = save(weights_of(trained(LoRA(rank=4, alpha=2))), "diffusers", tmp_path)
    metadata = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 2, "unet.use_rslora": True})}
    save_file(load_file(path), path, metadata=metadata)
    assert set(read_lora(path).alphas.values()) == {4}  # 2 / sqrt(4) = 4 / 4


def test_without_alphas_the_scale_is_1(tmp_path: Path) -> None:
    lora = weights_of(trained(LoRA(rank=4, alpha=1, text_encoder=True)))
    state = load_file(save(lora, "kohya", tmp_path))
    save_file({key: value for key, value in state.items() if "alpha" not in key}, tmp_path / "x.safetensors")
    assert set(read_lora(tmp_path / "x.safetensors").alphas.values()) == {4}


def test_the_digest_tells_loras_of_every_form_apart(tmp_path: Path) -> None:
    model = trained(LoRA(rank=4, text_encoder=True))
    paths = [save(weights_of(model), form, tmp_path) for form in FORMS]
    before = [lora_digest(path) for path in paths]
    weights_of(model).state[f"{Q_PROJ}.lora_A.weight"].zero_()
    after = [lora_digest(save(weights_of(model), form, tmp_path)) for form in FORMS]
    assert len({*before, *after}) == 6
    assert after == [lora_digest(path) for path in paths]


# writing


@pytest.mark.parametrize("form", FORMS)
def test_a_full_disk_leaves_the_former_file_and_nothing_else(tmp_path: Path, form: str) -> None:
    lora = weights_of(trained(LoRA(rank=4)))
    path = save(lora, form, tmp_path)
    files = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        with pytest.raises(UserError, match=f"cannot write {path}"):
            save(varied(lora, {}, {TO_Q: 9.0}), form, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == files


@pytest.mark.parametrize("form", FORMS)
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, form: str) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/file/"):
        save(weights_of(trained(LoRA(rank=2))), form, tmp_path / "file")


# what is no LoRA


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of rank 4 and alpha 2 on all targets, in diffusers' form, in a run's folder."""
    run = tmp_path_factory.mktemp("run")
    save_diffusers(weights_of(trained(LoRA(rank=4, alpha=2, target_modules=FULL))), run / "lora" / WEIGHTS_NAME)
    return run


def refused(path: Path, message: str) -> None:
    """The cheap check refuses as the reader does."""
    for read in (find_lora, read_lora):
        with pytest.raises(UserError, match=message):
            read(path)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda value: value * math.nan,
        lambda value: value.to(torch.int32),
        lambda value: value[:0],
        lambda value: value.flatten(),
    ],
)
def test_tensors_that_are_no_weights_are_refused(start: Path, tmp_path: Path, spoil: Any) -> None:
    state = load_file(start / "lora" / WEIGHTS_NAME)
    state[next(iter(state))] = spoil(state[next(iter(state))])
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="no matrix of finite numbers"):
        read_lora(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "metadata", ["[1, 2]", '{"unet.lora_alpha": "y"}', '{"unet.alpha_pattern": {"to_q": "y"}}', "{"]
)
def test_damaged_metadata_is_refused(start: Path, tmp_path: Path, metadata: str) -> None:
    state = load_file(start / "lora" / WEIGHTS_NAME)
    save_file(state, tmp_path / "x.safetensors", metadata={"lora_adapter_metadata": metadata})
    refused(tmp_path / "x.safetensors", "is corrupt")


@pytest.mark.parametrize("metadata", ["[1, 2]", '{"unet.a": "y"}', '{"unet.a": NaN}', '{"unet.a": 0}', "{"])
def test_damaged_alphas_of_the_training_are_refused(start: Path, tmp_path: Path, metadata: str) -> None:
    state = load_file(start / "lora" / WEIGHTS_NAME)
    save_file(state, tmp_path / "x.safetensors", metadata={"dpo_sd.alphas": metadata})
    refused(tmp_path / "x.safetensors", "is corrupt")


def test_an_alpha_of_zero_is_refused_because_it_would_change_nothing(start: Path, tmp_path: Path) -> None:
    state = load_file(start / "lora" / WEIGHTS_NAME)
    save_file(state, tmp_path / "x.safetensors", metadata={"lora_adapter_metadata": '{"unet.lora_alpha": 0}'})
    with pytest.raises(UserError, match="an alpha that is not positive"):
        read_lora(tmp_path / "x.safetensors")


def test_a_missing_file_names_the_nearest(start: Path) -> None:
    refused(start / "lora" / "pytorch_lora_weight.safetensors", "does not exist; nearest: .*pytorch_lora_weights.safet")
    refused(start / "lora" / "q.safetensors", "does not exist; nothing in that folder has a similar name")
    refused(start / "nowhere" / "x.safetensors", "does not exist; that folder does not exist")
    refused(start.parent, "is a folder without lora/pytorch_lora_weights.safetensors")


def test_an_unreadable_file_is_named_with_the_reason(start: Path, tmp_path: Path) -> None:
    path, whole = tmp_path / "x.safetensors", (start / "lora" / WEIGHTS_NAME).read_bytes()
    path.write_bytes(b"")
    refused(path, "x.safetensors is empty")
    path.write_bytes(whole[: len(whole) // 2])
    refused(path, "x.safetensors is corrupt or no safetensors file")
    path.write_bytes(b"<!DOCTYPE html><html>not found</html>")
    refused(path, "x.safetensors is corrupt or no safetensors file")


@pytest.mark.parametrize("name", ["x.pt", "x.ckpt", "x.bin", "disguised.safetensors"])
def test_a_pickle_is_refused_with_the_way_to_convert_it(tmp_path: Path, name: str) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / name)
    refused(
        tmp_path / name,
        r"is a pickle, or a damaged checkpoint: .* Convert a pickle once: python -c .*weights_only=True",
    )


def test_the_way_to_convert_a_pickle_works(tmp_path: Path) -> None:
    lora = weights_of(trained(LoRA(rank=4, alpha=1)))
    torch.save(load_file(save(lora, "kohya", tmp_path)), tmp_path / "old.pt")
    with pytest.raises(UserError) as caught:
        find_lora(tmp_path / "old.pt")
    exec(str(caught.value).partition('python -c "')[2].removesuffix('"'))
    assert same(read_lora(tmp_path / "old.safetensors"), lora)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([], "holds no tensors"),
        (["conv_in.weight", "conv_in.bias"], r"is no LoRA .*: 2 of 2 tensors \(first: conv_in.bias\)"),
        (
            ["lora_unet_a.lora_down.weight", "lora_unet_a.dora_scale"],
            r"is a DoRA in Kohya's form, .*\(first: lora_unet_a.dora_scale\)",
        ),
        (["unet.a.lora_magnitude_vector"], r"lacks the other half .*\(first: .*magnitude_vector\)"),
        (["lora_unet_a.hada_w1_a", "lora_unet_a.alpha"], "is a LoHa, .*: 1 of 2 tensors"),
        (["lora_unet_a.lokr_w1", "lora_unet_a.lokr_w2"], "is a LoKr, .*: 2 of 2 tensors"),
        (["lora_unet_a.lora_mid.weight", "lora_unet_a.lora_up.weight"], "is a LoRA in three factors"),
        (["unet.a.lora_A.weight", "unet.a.lora_B.bias"], r"holds more than a LoRA .*\(first: unet.a.lora_B.bias\)"),
        (["lora_unet_a.lora_down.weight", "lora_unet_a.alpha"], r"lacks the other half .*\(first: lora_unet_a.alpha\)"),
        (["lora_te_a.lora_down.weight"], "lacks the other half of a pair: 1 of 1 tensors"),
        (["unet.a.lora_A.weight"], "lacks the other half of a pair: 1 of 1 tensors"),
        (["lora_unet_a.oft_blocks"], "is an OFT"),
        (["lora_unet_a.on_input", "lora_unet_a.weight"], "is an IA3"),
        (["base_model.model.a.ia3_l"], "is an IA3"),
        (["lora_unet_a.a1.weight", "lora_unet_a.b2.weight"], "is a GLoRA"),
        (
            ["lora_unet_a.lora_down.weight", "lora_unet_a.lora_up.weight", "lora_unet_b.diff"],
            "whole weights .*: 1 of 3",
        ),
        (["lora_unet_a.diff_b"], "holds differences of whole weights"),
        (["bundle_emb.word.clip_l", "lora_unet_a.lora_down.weight"], "holds embeddings of words"),
        (["emb_params"], "holds embeddings of words"),
        (["lora_unet_a.lora_down.weight", "lora_unet_a.lora_down.scale_weight"], "is stored in scaled float8"),
        (["lora_unet_double_blocks_0_img_attn_proj.lora_down.weight"], "was made for Flux or"),
        (["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"], "was made for Flux or"),
        (["lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight"], "was made for Stable Diffusion 3"),
        (["lora_te3_encoder_block_0_layer_0_SelfAttention_q.alpha"], "was made for Stable Diffusion 3"),
        (["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"], "was made for a diffusion transformer"),
        (["diffusion_model.blocks.0.self_attn.q.lora_A.weight"], "was made for Wan or"),
        (["lora_unet_blocks_0_cross_attn_k.lora_down.weight"], "was made for Wan or"),
        (["lora_prior_unet_down_blocks_0_0_attention_attn_to_q.lora_down.weight"], "was made for Stable Cascade"),
        (
            [f"lora_unet_{n}.lora_{h}.weight" for n in ("input_blocks_1_0_a", "down_blocks_0") for h in ("up", "down")],
            "mixes sgm names with diffusers names: 2 of 4 tensors",
        ),
    ],
)
def test_a_file_that_is_no_plain_lora_is_refused_and_says_what_it_is(
    tmp_path: Path, keys: list[str], message: str
) -> None:
    save_file({key: torch.zeros(1) for key in keys}, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", message)


def test_an_alpha_of_several_numbers_is_refused(start: Path, tmp_path: Path) -> None:
    state = load_file(save(ones("sd15", "attn1.to_q"), "kohya", tmp_path, "sd15"))
    key = next(key for key in state if key.endswith(".alpha"))
    save_file(state | {key: torch.ones(2)}, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", f"has an alpha that is not one number: 1 of {len(state)}")


def test_halves_of_different_ranks_are_refused(tmp_path: Path) -> None:
    state = load_file(save(ones("sd15", "attn1.to_q"), "kohya", tmp_path, "sd15"))
    key = next(key for key in state if key.endswith("lora_up.weight"))
    save_file(state | {key: torch.ones(len(state[key]), 3)}, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", "has pairs whose halves differ in rank")


def test_modules_that_no_stable_diffusion_has_are_refused(tmp_path: Path) -> None:
    names = [f"lora_unet_input_blocks_x.lora_{half}.weight" for half in ("up", "down")]
    save_file({name: torch.zeros(4, 4) for name in names}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="names modules that no Stable Diffusion has"):
        read_lora(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "adapter_config.json is damaged"),
        ('{"peft_type": "LORA", "lora_alpha": "y"}', "adapter_config.json is damaged"),
        ('{"peft_type": "LOHA"}', "holds LOHA, not a plain LoRA"),
        ('{"peft_type": "LORA", "use_dora": true}', "says that it is a DoRA, and has no magnitudes"),
        ('{"peft_type": "LORA", "lora_bias": true}', "sets lora_bias=True, so it holds no plain LoRA"),
    ],
)
def test_a_folder_of_pefts_form_that_is_no_plain_lora_is_refused(tmp_path: Path, config: str, message: str) -> None:
    folder = save(weights_of(trained(LoRA(rank=2))), "peft", tmp_path)
    (folder / "unet" / PEFT_CONFIG).write_text(config)
    refused(folder, message)


def test_a_folder_of_pefts_form_without_its_weights_is_refused(tmp_path: Path) -> None:
    folder = save(weights_of(trained(LoRA(rank=2))), "peft", tmp_path)
    os.rename(folder / "unet" / PEFT_WEIGHTS, tmp_path / "aside")
    refused(folder, "has a adapter_config.json without adapter_model.safetensors")
    (folder / "unet" / "adapter_model.bin").write_bytes(b"PK\x03\x04")
    refused(folder, "is a pickle")


def test_a_dora_that_lacks_some_of_its_magnitudes_is_refused(tmp_path: Path) -> None:
    lora = weights_of(trained(LoRA(rank=2, dora=True)))
    first = f"{lora.modules[0]}.lora_magnitude_vector"
    path = save(replace(lora, state={key: t for key, t in lora.state.items() if key != first}), "diffusers", tmp_path)
    with pytest.raises(UserError, match=r"is a DoRA without the magnitudes of 1 modules"):
        read_lora(path)


@pytest.mark.parametrize("form", ["diffusers", "peft"])
def test_the_library_of_a_form_draws_with_a_dora_as_its_training_did(tmp_path: Path, form: str) -> None:
    model = trained(LoRA(rank=4, alpha=2.0, dora=True, target_modules=FULL, text_encoder=True))
    drawn = output(drawing_by_the_library(save(weights_of(model), form, tmp_path), form))
    torch.testing.assert_close(drawn, output(model))
    assert (drawn - output(make_model())).abs().max() > 1e-3
