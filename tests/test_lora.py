"""Adapters on a small random UNet: what is frozen, what moves, and that files carry the same LoRA everywhere."""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dpo_sd.errors import UserError
from dpo_sd.lora import (
    ATTENTION,
    LoRA,
    adapter_state,
    load_adapter_state,
    policy_parameters,
    read_lora,
    reference,
    save_diffusers,
    save_kohya,
    summary,
    using,
)

TRANSFORMER = [*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"]
FULL = [*TRANSFORMER, *CONVOLUTIONS, "time_emb_proj"]
TO_Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONV1 = "mid_block.resnets.0.conv1"


def make_unet(cross_attention_dim: int = 32) -> UNet2DConditionModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=cross_attention_dim,
            attention_head_dim=8,
            norm_num_groups=8,
        ).eval()


def inputs(width: int = 32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    return latents, torch.tensor([20, 700]), torch.randn(2, 5, width, generator=generator)


def predict(unet: UNet2DConditionModel) -> torch.Tensor:
    latents, timesteps, embeds = inputs()
    return unet(latents, timesteps, embeds).sample


@torch.no_grad()
def output(unet: UNet2DConditionModel) -> torch.Tensor:
    return predict(unet)


def loss(unet: UNet2DConditionModel) -> torch.Tensor:
    return predict(unet).pow(2).mean()


def train(unet: UNet2DConditionModel, steps: int = 2) -> None:
    """Two steps of plain SGD: B moves in the first, A in the second."""
    optimizer = torch.optim.SGD(policy_parameters(unet), lr=3.0)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(unet).backward()
        optimizer.step()


def trained(lora: LoRA) -> UNet2DConditionModel:
    """A UNet with a policy that has random B."""
    unet = make_unet()
    lora.attach(unet)
    generator = torch.Generator().manual_seed(2)
    state = adapter_state(unet, "policy")
    for key, value in state.items():
        if "lora_B" in key:
            value.copy_(torch.randn(value.shape, generator=generator) * 0.2)
    load_adapter_state(unet, "policy", state)
    return unet


def flags(unet: UNet2DConditionModel) -> dict[str, Any]:
    grads = {f"grad {name}": parameter.requires_grad for name, parameter in unet.named_parameters()}
    modes = {f"mode {name}": module.training for name, module in unet.named_modules()}
    switches = {
        f"switch {name}": (list(module.active_adapters), module.disable_adapters)
        for name, module in unet.named_modules()
        if isinstance(module, LoraLayer)
    }
    return grads | modes | switches


def bits(unet: UNet2DConditionModel, *parts: str) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in unet.named_parameters() if any(part in k for part in parts)}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of rank 4 and alpha 2 on all targets, in diffusers form, in a run's folder."""
    run = tmp_path_factory.mktemp("run")
    save_diffusers(trained(LoRA(rank=4, alpha=2, target_modules=FULL)), run / "lora")
    return run


# settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"alpha": 0.0}, "alpha must be positive, got 0.0"),
        ({"alpha": -2.0}, "alpha must be positive, got -2.0"),
        ({"alpha": float("nan")}, "alpha must be positive, got nan"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"dropout": -0.1}, "dropout must be at least 0 and below 1, got -0.1"),
        ({"target_modules": []}, "target_modules must name at least one module"),
        ({"target_modules": "to_q"}, "target_modules must be a list of module names, got 'to_q'"),
        ({"target_modules": [""]}, "target_modules must be a list of module names"),
    ],
)
def test_a_setting_out_of_range_is_refused_with_its_value(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        LoRA(**settings)


def test_importing_lora_costs_neither_torch_nor_diffusers() -> None:
    code = "import sys, dpo_sd.lora; sys.exit(any(m in sys.modules for m in ('torch', 'diffusers', 'peft')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_checking_the_file_to_start_from_costs_neither_torch_nor_diffusers(start: Path) -> None:
    code = (
        f"import sys; from dpo_sd.lora import LoRA; LoRA(init_from={str(start)!r}).check(); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'diffusers', 'peft')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_misspelt_target_names_the_nearest_modules() -> None:
    with pytest.raises(UserError, match=r"'to_qq' matches no module of this UNet; nearest: .*to_q\b"):
        LoRA(target_modules=["to_k", "to_qq"]).attach(make_unet())


def test_a_target_that_is_no_linear_or_convolution_is_refused() -> None:
    with pytest.raises(UserError, match="'attn1' names no linear or convolution module of this UNet; nearest:"):
        LoRA(target_modules=["attn1"]).attach(make_unet())


# attaching


@pytest.mark.parametrize("targets", [ATTENTION, TRANSFORMER, FULL], ids=["attention", "transformer", "full"])
def test_a_fresh_policy_equals_the_base_to_the_bit(targets: list[str]) -> None:
    unet = make_unet()
    LoRA(rank=4, target_modules=targets).attach(unet)
    assert torch.equal(output(unet), output(make_unet()))


def test_only_the_policy_is_trainable_and_it_is_float32_on_a_bfloat16_base() -> None:
    unet = make_unet().bfloat16()
    LoRA(rank=4, target_modules=FULL).attach(unet)
    trainable = {id(p) for p in unet.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in policy_parameters(unet)}
    assert {p.dtype for p in policy_parameters(unet)} == {torch.float32}
    assert {p.dtype for p in bits(unet, "base_layer").values()} == {torch.bfloat16}


def test_the_first_weights_depend_on_the_seed_and_leave_the_global_random_state_alone() -> None:
    def state(seed: int) -> dict[str, torch.Tensor]:
        unet = make_unet()
        LoRA(rank=2).attach(unet, seed)
        return adapter_state(unet)

    before = torch.get_rng_state()
    first = state(1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    second, other = state(1), state(2)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first if "lora_A" in key)


def test_the_summary_states_rank_alpha_scale_and_size() -> None:
    unet = make_unet()
    line = LoRA(rank=4, alpha=2, target_modules=["attn1.to_q"]).attach(unet)
    assert line == "rank 4, alpha 2, scale 0.5, 4 modules, 1280 parameters"
    assert sum(p.numel() for p in policy_parameters(unet)) == 1280


def test_a_step_moves_every_policy_parameter_and_nothing_else(start: Path) -> None:
    unet = make_unet()
    LoRA(init_from=str(start)).attach(unet)
    policy, rest = bits(unet, ".policy."), bits(unet, "")
    train(unet, steps=1)
    now = dict(unet.named_parameters())
    assert policy and not any(torch.equal(value, now[name]) for name, value in policy.items())
    assert all(torch.equal(value, now[name]) for name, value in rest.items() if name not in policy)


def test_two_steps_move_every_parameter_of_a_fresh_policy() -> None:
    unet = make_unet()
    LoRA(rank=4, target_modules=FULL).attach(unet)
    policy = bits(unet, ".policy.")
    train(unet)
    now = dict(unet.named_parameters())
    assert not any(torch.equal(value, now[name]) for name, value in policy.items())


def test_new_dropouts_take_the_mode_of_the_unet() -> None:
    unet = make_unet()
    LoRA(rank=2, dropout=0.5).attach(unet)
    assert not any(module.training for module in unet.modules())


# base, reference, policy


def test_adapters_off_equals_the_untouched_base_to_the_bit(start: Path) -> None:
    untouched = output(make_unet())
    fresh, continued = trained(LoRA(rank=4, target_modules=FULL)), make_unet()
    LoRA(init_from=str(start)).attach(continued)
    for unet in (fresh, continued):
        assert not torch.equal(output(unet), untouched)
        with using(unet, "base"):
            assert torch.equal(output(unet), untouched)
    with reference(fresh):
        assert torch.equal(output(fresh), untouched)


def test_the_reference_stays_where_the_policy_started(start: Path) -> None:
    unet = make_unet()
    LoRA(init_from=str(start)).attach(unet)
    first = output(unet)
    with reference(unet):
        assert torch.equal(output(unet), first)
    train(unet)
    assert not torch.equal(output(unet), first)
    with reference(unet):
        assert torch.equal(output(unet), first)
    with using(unet, "base"):
        assert torch.equal(output(unet), output(make_unet()))


@pytest.mark.parametrize("from_file", [False, True], ids=["reference=base", "reference=adapter"])
@pytest.mark.parametrize("which", ["base", "reference", "policy"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_context_restores_every_flag_also_after_an_exception(
    start: Path, from_file: bool, which: str, training: bool
) -> None:
    unet = make_unet()
    LoRA(dropout=0.5, init_from=str(start) if from_file else None).attach(unet)
    unet.train(training)
    policy_parameters(unet)[0].requires_grad_(False)  # an unusual state, to be found again
    before = flags(unet)
    with using(unet, which):  # type: ignore[arg-type]
        inside = flags(unet)
        with using(unet, "policy"), using(unet, "base"):
            pass
        assert flags(unet) == inside
    assert flags(unet) == before
    with pytest.raises(KeyError), using(unet, which), reference(unet):  # type: ignore[arg-type]
        raise KeyError
    assert flags(unet) == before


def test_the_reference_runs_without_dropout_while_the_policy_trains_with_it(start: Path) -> None:
    unet = make_unet()
    LoRA(dropout=0.5, init_from=str(start)).attach(unet)
    expected = output(unet)
    unet.train()
    assert not torch.equal(output(unet), output(unet))
    with reference(unet):
        assert torch.equal(output(unet), expected)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("from_file", [False, True], ids=["reference=base", "reference=adapter"])
def test_a_reference_pass_between_forward_and_backward_changes_no_gradient(
    start: Path, from_file: bool, checkpointing: bool
) -> None:
    def gradients(look_aside: bool) -> list[torch.Tensor]:
        unet = make_unet()
        LoRA(init_from=str(start) if from_file else None).attach(unet)
        unet.train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        value = loss(unet)
        if look_aside:
            with torch.no_grad(), reference(unet):
                predict(unet)
        value.backward()
        assert all(p.grad is None for name, p in unet.named_parameters() if ".policy." not in name)
        return [p.grad for p in policy_parameters(unet) if p.grad is not None]

    alone, beside = gradients(False), gradients(True)
    assert len(alone) == len(beside) > 0
    assert all(torch.equal(a, b) for a, b in zip(alone, beside, strict=True))


def test_a_policy_that_was_never_attached_is_named() -> None:
    with pytest.raises(ValueError, match="no adapter 'policy'"):
        policy_parameters(make_unet())
    with pytest.raises(ValueError, match="no adapter 'policy'"), using(make_unet(), "policy"):
        pass


# states


def test_a_state_loads_back_to_the_bit_and_is_a_copy() -> None:
    unet = trained(LoRA(rank=4, target_modules=FULL))
    state, expected = adapter_state(unet), output(unet)
    train(unet)
    assert not torch.equal(output(unet), expected)
    load_adapter_state(unet, "policy", state)
    assert torch.equal(output(unet), expected)


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    unet = trained(LoRA(rank=4))
    before = adapter_state(unet)
    key, *others = before
    wrong = {"other.lora_A.weight": before[key]} | {k: before[k] + 1 for k in others[1:]}
    wrong[others[-1]] = torch.zeros(3)
    with pytest.raises(UserError, match=r"2 missing \(first: .*\), 1 unknown \(first: other.*\), 1 of another shape"):
        load_adapter_state(unet, "policy", wrong)
    assert all(torch.equal(value, before[k]) for k, value in adapter_state(unet).items())


# files


def with_pattern(alphas: dict[str, float], ranks: dict[str, int], folder: Path) -> UNet2DConditionModel:
    """A UNet whose policy has rank 4 and alpha 2 but for the modules named."""
    from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin

    state = {}
    for key, value in adapter_state(trained(LoRA(rank=4, alpha=2, target_modules=FULL))).items():
        rank = ranks.get(key.rsplit(".lora_", 1)[0], 4)
        state[key] = value[:rank].contiguous() if "lora_A" in key else value[:, :rank].contiguous()
    metadata = {"r": 4, "lora_alpha": 2, "rank_pattern": ranks, "alpha_pattern": alphas, "target_modules": FULL}
    StableDiffusionLoraLoaderMixin.save_lora_weights(
        folder, unet_lora_layers=state, unet_lora_adapter_metadata=metadata
    )
    unet = make_unet()
    LoRA(init_from=str(folder)).attach(unet)
    return unet


def load_with_diffusers(path: Path) -> UNet2DConditionModel:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    unet = make_unet()
    parts: dict[str, Any] = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    parts |= {"unet": unet, "scheduler": DDIMScheduler(steps_offset=1, clip_sample=False)}
    pipeline = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name, local_files_only=True)
    return unet


CASES = {
    "attention": LoRA(rank=4, target_modules=ATTENTION),
    "alpha below rank": LoRA(rank=4, alpha=1, target_modules=TRANSFORMER),
    "convolutions too": LoRA(rank=4, alpha=8, target_modules=FULL),
    "convolutions only": LoRA(rank=3, alpha=0.5, target_modules=CONVOLUTIONS),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("form", ["diffusers", "kohya"])
@pytest.mark.parametrize("case", CASES)
def test_an_export_gives_the_outputs_of_the_policy_in_a_fresh_pipeline(tmp_path: Path, case: str, form: str) -> None:
    unet = trained(CASES[case])
    path = save_diffusers(unet, tmp_path) if form == "diffusers" else save_kohya(unet, tmp_path / "x.safetensors")
    assert torch.equal(output(load_with_diffusers(path)), output(unet))


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
@pytest.mark.parametrize("pattern", [{CONV1: 8.0}, {TO_Q: 8.0}], ids=["a convolution", "an attention projection"])
def test_ranks_and_alphas_that_vary_by_module_survive_in_a_fresh_pipeline(
    tmp_path: Path, pattern: dict[str, float], form: str
) -> None:
    unet = with_pattern(pattern, {TO_Q: 2, CONV1: 3}, tmp_path / "start")
    path = save_diffusers(unet, tmp_path) if form == "diffusers" else save_kohya(unet, tmp_path / "x.safetensors")
    assert torch.equal(output(load_with_diffusers(path)), output(unet))
    again = make_unet()
    LoRA(init_from=str(path)).attach(again)
    assert torch.equal(output(again), output(unet))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_an_export_reads_back_to_the_same_state_rank_and_alpha(tmp_path: Path, case: str, form: str) -> None:
    unet, lora = trained(CASES[case]), CASES[case]
    path = save_diffusers(unet, tmp_path) if form == "diffusers" else save_kohya(unet, tmp_path / "x.safetensors")
    file, state = read_lora(path), adapter_state(unet)
    assert file.state.keys() == state.keys()
    assert all(torch.equal(file.state[key], state[key]) for key in state)
    assert (file.format, file.rank, file.alpha, file.rank_pattern, file.alpha_pattern) == (
        form, lora.rank, lora.alpha, {}, {},
    )  # fmt: skip


def test_alphas_of_convolutions_stand_as_they_are_in_both_forms(tmp_path: Path) -> None:
    unet = with_pattern({CONV1: 8.0}, {TO_Q: 2, CONV1: 3}, tmp_path / "start")
    for path in (save_diffusers(unet, tmp_path), save_kohya(unet, tmp_path / "x.safetensors")):
        file = read_lora(path)
        assert (file.rank, file.rank_pattern) == (4, {TO_Q: 2, CONV1: 3})
        assert (file.alpha, file.alpha_pattern) == (2, {CONV1: 8})
    assert load_file(path)["lora_unet_mid_block_resnets_0_conv1.alpha"] == 8
    assert "scale 0.5 to 2.66667" in summary(unet)


def test_kohya_files_carry_the_metadata_that_other_tools_read(tmp_path: Path) -> None:
    unet = trained(LoRA(rank=4, alpha=2))
    path = save_kohya(
        unet, tmp_path / "style.safetensors", base_model_version="sd_v2_v", resolution=768,
        prediction_type="v_prediction", extra={"ss_steps": "300"},
    )  # fmt: skip
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata.pop("modelspec.date")
    assert metadata == {
        "ss_v2": "True",
        "ss_base_model_version": "sd_v2_v",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "2",
        "ss_network_args": "{}",
        "ss_output_name": "style",
        "ss_resolution": "(768, 768)",
        "ss_steps": "300",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v2-768-v/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "style",
        "modelspec.resolution": "768x768",
        "modelspec.prediction_type": "v",
    }
    with pytest.raises(UserError, match=r"base_model_version must be one of sd_v1, .*, got 'sd3'"):
        save_kohya(unet, path, base_model_version="sd3")  # type: ignore[arg-type]


def test_the_reference_can_be_exported_by_name(start: Path, tmp_path: Path) -> None:
    unet = make_unet()
    LoRA(init_from=str(start)).attach(unet)
    train(unet)
    with reference(unet):
        expected = output(unet)
    assert torch.equal(output(load_with_diffusers(save_diffusers(unet, tmp_path, "reference"))), expected)


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_a_full_disk_leaves_the_former_file_and_nothing_else(tmp_path: Path, form: str) -> None:
    unet = trained(LoRA(rank=4))

    def save() -> Path:
        return save_diffusers(unet, tmp_path) if form == "diffusers" else save_kohya(unet, tmp_path / "x.safetensors")

    path = save()
    before = path.read_bytes()
    train(unet)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        with pytest.raises(UserError, match=f"cannot write {path}"):
            save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


# starting from a file


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_a_file_to_start_from_keeps_its_strength_and_the_settings_it_overrules_are_said(
    tmp_path: Path, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    origin = trained(LoRA(rank=4, alpha=1, target_modules=FULL))
    path = save_diffusers(origin, tmp_path) if form == "diffusers" else save_kohya(origin, tmp_path / "x.safetensors")
    unet = make_unet()
    with caplog.at_level(logging.WARNING, "dpo_sd.lora"):
        line = LoRA(rank=8, init_from=str(path)).attach(unet)
    assert torch.equal(output(unet), output(origin))
    assert line.startswith("rank 4, alpha 1, scale 0.25, 79 modules")
    assert caplog.messages == [f"{path} decides: {line}; not the settings: rank 8, alpha 8, 32 modules"]


def test_a_file_that_agrees_with_the_settings_is_taken_without_a_word(
    start: Path, caplog: pytest.LogCaptureFixture
) -> None:
    LoRA(rank=4, alpha=2, target_modules=FULL, init_from=str(start)).attach(make_unet())
    assert not caplog.messages


def test_a_float16_file_trains_in_float32(tmp_path: Path) -> None:
    path = save_kohya(trained(LoRA(rank=4)), tmp_path / "x.safetensors")
    save_file({key: value.half() for key, value in load_file(path).items()}, path)
    unet = make_unet()
    LoRA(init_from=str(path)).attach(unet)
    assert {p.dtype for p in policy_parameters(unet)} == {torch.float32}
    file = read_lora(path)
    assert all(torch.equal(value, file.state[key].float()) for key, value in adapter_state(unet).items())


def test_files_in_the_older_diffusers_names_are_read(tmp_path: Path) -> None:
    from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers

    unet = trained(LoRA(rank=4, target_modules=FULL))
    older = convert_state_dict_to_diffusers({f"unet.{key}": value for key, value in adapter_state(unet).items()})
    assert any("to_q.lora.down" in key for key in older) and any("lora_A" in key for key in older)
    save_file(older, tmp_path / "x.safetensors")
    again = make_unet()
    LoRA(init_from=str(tmp_path / "x.safetensors")).attach(again)
    assert torch.equal(output(again), output(unet))


def test_rank_stabilised_metadata_keeps_its_strength(tmp_path: Path) -> None:
    path = save_diffusers(trained(LoRA(rank=4, alpha=2)), tmp_path)
    metadata = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 2, "unet.use_rslora": True})}
    save_file(load_file(path), path, metadata=metadata)
    assert read_lora(path).alpha == 4  # 2 / sqrt(4) = 4 / 4


def test_sgm_names_of_sdxl_are_read_as_diffusers_names(tmp_path: Path) -> None:
    names = {
        "input_blocks_4_1_transformer_blocks_0_ff_net_2": "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2",
        "input_blocks_2_0_in_layers_2": "down_blocks.0.resnets.1.conv1",
        "middle_block_1_proj_in": "mid_block.attentions.0.proj_in",
        "output_blocks_0_1_transformer_blocks_3_ff_net_2": "up_blocks.0.attentions.0.transformer_blocks.3.ff.net.2",
    }
    state = {}
    for name in names:
        state[f"lora_unet_{name}.lora_down.weight"] = torch.zeros(4, 8)
        state[f"lora_unet_{name}.lora_up.weight"] = torch.zeros(8, 4)
        state[f"lora_unet_{name}.alpha"] = torch.tensor(2.0)
    save_file(state, tmp_path / "sdxl.safetensors")
    file = read_lora(tmp_path / "sdxl.safetensors")
    assert set(file.modules) == set(names.values())
    assert (file.rank, file.alpha, file.alpha_pattern) == (4, 2, {})


# bad files


def refused(path: Path, message: str) -> None:
    """The cheap check refuses as the reader does."""
    for read in (lambda: LoRA(init_from=str(path)).check(), lambda: read_lora(path)):
        with pytest.raises(UserError, match=message):
            read()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda value: value * math.nan, "no matrix of finite numbers"),
        (lambda value: value.to(torch.int32), "no matrix of finite numbers"),
        (lambda value: value[:0], "no matrix of finite numbers"),
        (lambda value: value.flatten(), "no matrix of finite numbers"),
    ],
)
def test_tensors_that_are_no_weights_are_refused(start: Path, tmp_path: Path, spoil: Any, message: str) -> None:
    state = load_file(start / "lora" / "pytorch_lora_weights.safetensors")
    state[next(iter(state))] = spoil(state[next(iter(state))])
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=message):
        read_lora(tmp_path / "x.safetensors")


@pytest.mark.parametrize("metadata", ["[1, 2]", '{"unet.lora_alpha": "y"}', "{"])
def test_damaged_metadata_is_refused(start: Path, tmp_path: Path, metadata: str) -> None:
    state = load_file(start / "lora" / "pytorch_lora_weights.safetensors")
    save_file(state, tmp_path / "x.safetensors", metadata={"lora_adapter_metadata": metadata})
    refused(tmp_path / "x.safetensors", "is corrupt")


def test_an_alpha_of_zero_is_refused_because_it_would_change_nothing(start: Path, tmp_path: Path) -> None:
    state = load_file(start / "lora" / "pytorch_lora_weights.safetensors")
    save_file(state, tmp_path / "x.safetensors", metadata={"lora_adapter_metadata": '{"unet.lora_alpha": 0}'})
    with pytest.raises(UserError, match="an alpha that is not positive"):
        read_lora(tmp_path / "x.safetensors")


def test_a_rank_above_every_width_is_refused() -> None:
    with pytest.raises(UserError, match="rank 1000000 is above the width of every module"):
        LoRA(rank=1_000_000).attach(make_unet())


def test_a_missing_file_names_the_nearest(start: Path) -> None:
    refused(start / "lora" / "pytorch_lora_weight.safetensors", "does not exist; nearest: .*pytorch_lora_weights.safet")
    refused(start / "lora" / "q.safetensors", "does not exist; nothing in that folder has a similar name")
    refused(start / "nowhere" / "x.safetensors", "does not exist; that folder does not exist")
    refused(start.parent, "is a folder without lora/pytorch_lora_weights.safetensors")


def test_an_unreadable_file_is_named_with_the_reason(start: Path, tmp_path: Path) -> None:
    path, whole = tmp_path / "x.safetensors", (start / "lora" / "pytorch_lora_weights.safetensors").read_bytes()
    path.write_bytes(b"")
    refused(path, "x.safetensors is empty")
    path.write_bytes(whole[: len(whole) // 2])
    refused(path, "x.safetensors is corrupt or no safetensors file")
    path.write_bytes(b"<!DOCTYPE html><html>not found</html>")
    refused(path, "x.safetensors is corrupt or no safetensors file")
    save_file({"unet.a.lora_A.weight": torch.zeros(1)}, path, metadata={"lora_adapter_metadata": "{"})
    refused(path, "x.safetensors is corrupt or no safetensors file")


@pytest.mark.parametrize("name", ["x.pt", "x.ckpt", "x.bin", "disguised.safetensors"])
def test_a_pickle_is_refused_with_the_way_to_convert_it(tmp_path: Path, name: str) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / name)
    refused(tmp_path / name, r"is a pickle, which can run any code .* Convert it once: python -c .*weights_only=True")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([], "holds no tensors"),
        (["conv_in.weight", "conv_in.bias"], r"is no LoRA .*: 2 of 2 tensors \(first: conv_in.bias\)"),
        (["lora_te_a.lora_down.weight", "lora_unet_a.alpha"], "also adapts text encoders.*: 1 of 2 tensors"),
        (["text_encoder.a.lora_A.weight", "unet.a.lora_A.weight"], "also adapts text encoders.*: 1 of 2 tensors"),
        (["lora_unet_a.lora_down.weight", "lora_unet_a.dora_scale"], r"DoRA, LoHa, LoKr.*\(first: .*dora_scale\)"),
        (["unet.a.lora_A.weight", "unet.a.lora_magnitude_vector"], r"DoRA, LoHa, LoKr.*\(first: .*magnitude_vector\)"),
        (["lora_unet_a.lora_down.weight", "lora_unet_a.alpha"], r"lacks the other half .*\(first: lora_unet_a.alpha\)"),
        (["unet.a.lora_A.weight"], "lacks the other half of a pair: 1 of 1 tensors"),
        (
            [f"lora_unet_{n}.lora_{h}.weight" for n in ("input_blocks_1_0_a", "down_blocks_0") for h in ("up", "down")],
            "mixes sgm names with diffusers names: 2 of 4 tensors",
        ),
    ],
)
def test_a_file_that_is_not_a_plain_unet_lora_is_refused(tmp_path: Path, keys: list[str], message: str) -> None:
    save_file({key: torch.zeros(1) for key in keys}, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", message)


def test_a_lora_of_another_base_is_refused_and_says_what_it_looks_like(tmp_path: Path) -> None:
    other = make_unet(cross_attention_dim=1024)
    LoRA(rank=4).attach(other)
    path = save_kohya(other, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="of 32 modules have another shape") as caught:
        LoRA(init_from=str(path)).attach(make_unet())
    assert "it looks like SD2 (cross-attention width 1024)" in str(caught.value)
    assert "this UNet is a small model (cross-attention width 32)" in str(caught.value)


def test_modules_that_the_unet_does_not_have_are_counted_and_named(start: Path, tmp_path: Path) -> None:
    state = load_file(start / "lora" / "pytorch_lora_weights.safetensors")
    save_file(
        {key.replace("mid_block", "mid_blocks"): value for key, value in state.items()}, tmp_path / "x.safetensors"
    )
    unet = make_unet()
    with pytest.raises(UserError, match=r"of 79 modules are unknown to this UNet \(first: mid_blocks"):
        LoRA(init_from=str(tmp_path / "x.safetensors")).attach(unet)
    assert torch.equal(output(unet), output(make_unet()))


def test_modules_that_no_stable_diffusion_has_are_refused(tmp_path: Path) -> None:
    names = [f"lora_unet_input_blocks_x.lora_{half}.weight" for half in ("up", "down")]
    save_file({name: torch.zeros(4, 4) for name in names}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="names modules that no Stable Diffusion has"):
        read_lora(tmp_path / "x.safetensors")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    unet = make_unet()
    LoRA(rank=2).attach(unet)
    for save in (lambda: save_diffusers(unet, tmp_path / "file"), lambda: save_kohya(unet, tmp_path / "file" / "x")):
        with pytest.raises(UserError, match=f"cannot write {tmp_path}/file/"):
            save()
