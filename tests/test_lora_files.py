"""LoRA files: every form carries the same LoRA, as other programs load it, and what is none is refused."""

from __future__ import annotations

import json
import math
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_model import CONVOLUTIONS, FULL, TRANSFORMER, make_model, ones, output, trained

from dpo_sd.errors import UserError
from dpo_sd.lora.adapters import weights_of
from dpo_sd.lora.attaching import TEXT_ATTENTION, LoRA, load_for_drawing
from dpo_sd.lora.finding import find_lora, lora_digest
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
    assert torch.equal(output(drawing_by_the_library(path, form)), output(model))


@pytest.mark.parametrize("case", CASES)
def test_a_lora_goes_from_peft_to_kohya_to_diffusers_to_peft_without_a_change(tmp_path: Path, case: str) -> None:
    lora = weights_of(trained(CASES[case]))
    for form in ["peft", "kohya", "diffusers", "peft"]:
        file = read_lora(save(lora, form, tmp_path))
        assert same(file, lora) and file.form == form
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
    expected = output(drawing_with(save(lora, "diffusers", tmp_path / "start")))
    path = save(lora, form, tmp_path)
    assert torch.equal(output(drawing_with(path)), expected)
    assert torch.equal(output(drawing_by_the_library(path, form)), expected)
    assert read_lora(path).ranks == lora.ranks


def test_alphas_stand_as_they_are_where_every_loader_reads_them(tmp_path: Path) -> None:
    lora = varied(weights_of(trained(LoRA(rank=4, alpha=2, target_modules=FULL))), {TO_Q: 2, CONV1: 3}, {CONV1: 8.0})
    for form in FORMS:
        assert same(read_lora(save(lora, form, tmp_path)), lora)
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
    assert same(read_lora(save(lora, form, tmp_path, family)), lora)


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
    assert metadata.pop("modelspec.date")
    assert metadata == {
        "ss_v2": str(family == "sd21"),
        "ss_base_model_version": version,
        "ss_network_module": "networks.lora",
        "ss_network_dim": "2",
        "ss_network_alpha": "1",
        "ss_network_args": "{}",
        "ss_output_name": "style",
        "ss_resolution": "(768, 768)",
        "ss_steps": "300",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "diffusers",
        "modelspec.title": "style",
        "modelspec.resolution": "768x768",
        "modelspec.prediction_type": {"epsilon": "epsilon", "v_prediction": "v"}[prediction_type],
    }


def test_sdxl_is_read_by_diffusers_names_too(tmp_path: Path) -> None:
    lora = ones("sdxl", "add_embedding.linear_1", "attn2.to_k", "upsamplers.0.conv", "proj_in")
    state = load_file(save(lora, "diffusers", tmp_path))
    kohya = {}
    for key, tensor in state.items():
        module, _, half = key.rpartition(".lora_")
        name = module.replace("unet.", "lora_unet_").replace(".", "_")
        kohya[f"{name}.lora_{'down' if half[0] == 'A' else 'up'}.weight"] = tensor
        kohya[f"{name}.alpha"] = torch.tensor(1.0)
    save_file(kohya, tmp_path / "x.safetensors")
    assert same(read_lora(tmp_path / "x.safetensors"), lora)


# what others have written


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
    refused(tmp_path / name, r"is a pickle, which can run any code .* Convert it once: python -c .*weights_only=True")


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
        (["lora_unet_a.lora_down.weight", "lora_unet_a.dora_scale"], r"is a DoRA, .*\(first: lora_unet_a.dora_scale\)"),
        (["unet.a.lora_A.weight", "unet.a.lora_magnitude_vector"], r"is a DoRA, .*\(first: .*magnitude_vector\)"),
        (["lora_unet_a.hada_w1_a", "lora_unet_a.alpha"], "is a LoHa, .*: 1 of 2 tensors"),
        (["lora_unet_a.lokr_w1", "lora_unet_a.lokr_w2"], "is a LoKr, .*: 2 of 2 tensors"),
        (["lora_unet_a.lora_mid.weight", "lora_unet_a.lora_up.weight"], "is a LoRA in three factors"),
        (["unet.a.lora_A.weight", "unet.a.lora_B.bias"], r"holds more than a LoRA .*\(first: unet.a.lora_B.bias\)"),
        (["lora_unet_a.lora_down.weight", "lora_unet_a.alpha"], r"lacks the other half .*\(first: lora_unet_a.alpha\)"),
        (["lora_te_a.lora_down.weight"], "lacks the other half of a pair: 1 of 1 tensors"),
        (["unet.a.lora_A.weight"], "lacks the other half of a pair: 1 of 1 tensors"),
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
        ('{"peft_type": "LORA", "use_dora": true}', "holds DoRA, not a plain LoRA"),
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
