"""Adapters on a small random model: what is frozen, what moves, and where a policy starts."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from small_model import FULL, TRANSFORMER, make_model, output, predict, trained

from dpo_sd.errors import UserError
from dpo_sd.lora.adapters import (
    adapter_names,
    adapter_state,
    load_adapter_state,
    policy_parameters,
    reference,
    trains_text,
    using,
    weights_of,
)
from dpo_sd.lora.attaching import LoRA, load_for_drawing
from dpo_sd.lora.names import modules_of
from dpo_sd.lora.reading import read_lora
from dpo_sd.lora.weights import ATTENTION, MAGNITUDE, WEIGHTS_NAME
from dpo_sd.lora.writing import save_diffusers, save_kohya, save_peft
from dpo_sd.models.quantization import Weights, store
from dpo_sd.models.stable_diffusion import StableDiffusion


def all_of(model: StableDiffusion) -> torch.nn.ModuleDict:
    networks = torch.nn.ModuleDict(dict(model.networks))
    networks.training = False
    return networks


def flat(parameters: dict[str, list[torch.nn.Parameter]]) -> list[torch.nn.Parameter]:
    return [parameter for part in parameters.values() for parameter in part]


def save(form: str, model: StableDiffusion, folder: Path) -> Path:
    lora, path = weights_of(model), folder / "x.safetensors"
    return save_kohya(lora, path, "tiny") if form == "kohya" else save_diffusers(lora, path)


def loss(model: StableDiffusion) -> torch.Tensor:
    return predict(model).pow(2).mean()


def train(model: StableDiffusion, steps: int = 2) -> None:
    """Two steps of plain SGD: B moves in the first, A in the second."""
    optimizer = torch.optim.SGD(flat(policy_parameters(model)), lr=3.0)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()


def flags(model: StableDiffusion) -> dict[str, Any]:
    networks = all_of(model)
    grads = {f"grad {name}": parameter.requires_grad for name, parameter in networks.named_parameters()}
    modes = {f"mode {name}": module.training for name, module in networks.named_modules()}
    switches = {
        f"switch {name}": (list(module.active_adapters), module.disable_adapters)
        for name, module in networks.named_modules()
        if isinstance(module, LoraLayer)
    }
    return grads | modes | switches


def bits(model: StableDiffusion, *parts: str) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in all_of(model).named_parameters() if any(part in k for part in parts)}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of rank 4 and alpha 2 on all targets, in diffusers form, in a run's folder."""
    run = tmp_path_factory.mktemp("run")
    save_diffusers(weights_of(trained(LoRA(rank=4, alpha=2, target_modules=FULL))), run / "lora" / WEIGHTS_NAME)
    return run


@pytest.fixture(scope="module")
def with_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of rank 4 and alpha 2 on the attention of UNet and text encoder."""
    path = tmp_path_factory.mktemp("lora") / "style.safetensors"
    return save_kohya(weights_of(trained(LoRA(rank=4, alpha=2, text_encoder=True))), path, "tiny")


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
    code = "import sys, dpo_sd.lora.adapters; sys.exit(any(m in sys.modules for m in ('torch', 'diffusers', 'peft')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_checking_the_file_to_start_from_costs_neither_torch_nor_diffusers(start: Path) -> None:
    code = (
        f"import sys; from dpo_sd.lora.attaching import LoRA; LoRA(init_from={str(start)!r}).check(); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'diffusers', 'peft')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_misspelt_target_names_the_nearest_modules() -> None:
    with pytest.raises(UserError, match=r"'to_qq' matches no module of this UNet; nearest: .*to_q\b"):
        LoRA(target_modules=["to_k", "to_qq"]).attach(make_model())


def test_a_target_that_is_no_linear_or_convolution_is_refused() -> None:
    with pytest.raises(UserError, match="'attn1' names no linear or convolution module of this UNet; nearest:"):
        LoRA(target_modules=["attn1"]).attach(make_model())


# attaching


@pytest.mark.parametrize("text_encoder", [False, True], ids=["", "text encoder"])
@pytest.mark.parametrize("targets", [ATTENTION, TRANSFORMER, FULL], ids=["attention", "transformer", "full"])
def test_a_fresh_policy_equals_the_base_to_the_bit(targets: list[str], text_encoder: bool) -> None:
    model = make_model()
    LoRA(rank=4, target_modules=targets, text_encoder=text_encoder).attach(model)
    assert torch.equal(output(model), output(make_model()))


def test_only_the_policy_is_trainable_and_it_is_float32_on_a_bfloat16_base() -> None:
    model = make_model()
    all_of(model).bfloat16()
    LoRA(rank=4, target_modules=FULL, text_encoder=True).attach(model)
    trainable = {id(p) for p in all_of(model).parameters() if p.requires_grad}
    assert trainable == {id(p) for p in flat(policy_parameters(model))}
    assert {p.dtype for p in flat(policy_parameters(model))} == {torch.float32}
    assert {p.dtype for p in bits(model, "base_layer").values()} == {torch.bfloat16}


def test_the_first_weights_depend_on_the_seed_and_leave_the_global_random_state_alone() -> None:
    def state(seed: int) -> dict[str, torch.Tensor]:
        model = make_model()
        LoRA(rank=2, text_encoder=True).attach(model, seed)
        return adapter_state(model)

    before = torch.get_rng_state()
    first = state(1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    second, other = state(1), state(2)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first if "lora_A" in key)


def test_the_summary_states_rank_alpha_scale_and_size() -> None:
    model = make_model()
    line = LoRA(rank=4, alpha=2, target_modules=["attn1.to_q"]).attach(model)
    assert line == "rank 4, alpha 2, scale 0.5, 4 modules, 1280 parameters"
    assert sum(p.numel() for p in flat(policy_parameters(model))) == 1280
    line = LoRA(rank=4, target_modules=["attn1.to_q"], text_encoder=True).attach(model := make_model())
    assert line == (
        "rank 4, alpha 4, scale 1, 4 modules, 1280 parameters; "
        "text_encoder rank 4, alpha 4, scale 1, 8 modules, 2048 parameters"
    )
    assert {name: sum(p.numel() for p in part) for name, part in policy_parameters(model).items()} == {
        "unet": 1280, "text_encoder": 2048,
    }  # fmt: skip


@pytest.mark.parametrize("source", ["start", "with_text"])
def test_a_step_moves_every_policy_parameter_and_nothing_else(source: str, request: pytest.FixtureRequest) -> None:
    model = make_model()
    LoRA(init_from=str(request.getfixturevalue(source)), text_encoder=source == "with_text").attach(model)
    policy, rest = bits(model, ".policy."), bits(model, "")
    train(model, steps=1)
    now = dict(all_of(model).named_parameters())
    assert policy and not any(torch.equal(value, now[name]) for name, value in policy.items())
    assert all(torch.equal(value, now[name]) for name, value in rest.items() if name not in policy)


def test_two_steps_move_every_parameter_of_a_fresh_policy() -> None:
    model = make_model()
    LoRA(rank=4, target_modules=FULL, text_encoder=True).attach(model)
    policy = bits(model, ".policy.")
    train(model)
    now = dict(all_of(model).named_parameters())
    assert not any(torch.equal(value, now[name]) for name, value in policy.items())


def test_new_dropouts_take_the_mode_of_the_model() -> None:
    model = make_model()
    LoRA(rank=2, dropout=0.5, text_encoder=True).attach(model)
    assert not any(module.training for module in all_of(model).modules())


# base, reference, policy


def test_adapters_off_equals_the_untouched_base_to_the_bit(start: Path) -> None:
    untouched = output(make_model())
    fresh, continued = trained(LoRA(rank=4, target_modules=FULL)), make_model()
    LoRA(init_from=str(start)).attach(continued)
    for model in (fresh, continued):
        assert not torch.equal(output(model), untouched)
        with using(model, "base"):
            assert torch.equal(output(model), untouched)
    with reference(fresh):
        assert torch.equal(output(fresh), untouched)


@pytest.mark.parametrize("text_encoder", [False, True], ids=["text encoder frozen", "text encoder trained"])
@pytest.mark.parametrize("source", ["start", "with_text"])
def test_the_reference_stays_where_the_policy_started(
    source: str, text_encoder: bool, request: pytest.FixtureRequest
) -> None:
    model = make_model()
    LoRA(init_from=str(request.getfixturevalue(source)), text_encoder=text_encoder).attach(model)
    first = output(model)
    with reference(model):
        assert torch.equal(output(model), first)
    train(model)
    assert not torch.equal(output(model), first)
    with reference(model):
        assert torch.equal(output(model), first)
    with using(model, "base"):
        assert torch.equal(output(model), output(make_model()))


SOURCES = pytest.mark.parametrize("source", [None, "start", "with_text"])


@SOURCES
@pytest.mark.parametrize("which", ["base", "reference", "policy"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_context_restores_every_flag_also_after_an_exception(
    source: str | None, which: str, training: bool, request: pytest.FixtureRequest
) -> None:
    model = make_model()
    LoRA(dropout=0.5, init_from=source and str(request.getfixturevalue(source)), text_encoder=True).attach(model)
    all_of(model).train(training)
    policy_parameters(model)["unet"][0].requires_grad_(False)  # an unusual state, to be found again
    before = flags(model)
    with using(model, which):  # type: ignore[arg-type]
        inside = flags(model)
        with using(model, "policy"), using(model, "base"):
            pass
        assert flags(model) == inside
    assert flags(model) == before
    with pytest.raises(KeyError), using(model, which), reference(model):  # type: ignore[arg-type]
        raise KeyError
    assert flags(model) == before


def test_the_reference_runs_without_dropout_while_the_policy_trains_with_it(start: Path) -> None:
    model = make_model()
    LoRA(dropout=0.5, init_from=str(start)).attach(model)
    expected = output(model)
    all_of(model).train()
    assert not torch.equal(output(model), output(model))
    with reference(model):
        assert torch.equal(output(model), expected)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@SOURCES
def test_a_reference_pass_between_forward_and_backward_changes_no_gradient(
    source: str | None, checkpointing: bool, request: pytest.FixtureRequest
) -> None:
    def gradients(look_aside: bool) -> list[torch.Tensor]:
        model = make_model()
        LoRA(init_from=source and str(request.getfixturevalue(source)), text_encoder=True).attach(model)
        all_of(model).train()
        if checkpointing:
            model.unet.enable_gradient_checkpointing()
        value = loss(model)
        if look_aside:
            with torch.no_grad(), reference(model):
                predict(model)
        value.backward()
        assert all(p.grad is None for name, p in all_of(model).named_parameters() if ".policy." not in name)
        return [p.grad for p in flat(policy_parameters(model)) if p.grad is not None]

    alone, beside = gradients(False), gradients(True)
    assert len(alone) == len(beside) > 0
    assert all(torch.equal(a, b) for a, b in zip(alone, beside, strict=True))


def test_a_text_encoder_of_the_file_stays_as_it_is_unless_it_is_trained(
    with_text: Path, caplog: pytest.LogCaptureFixture
) -> None:
    frozen, learning = make_model(), make_model()
    line = LoRA(rank=4, alpha=2, dropout=0.5, init_from=str(with_text)).attach(frozen)
    assert line.endswith("(text_encoder not trained)") and not caplog.messages
    LoRA(rank=4, alpha=2, init_from=str(with_text), text_encoder=True).attach(learning)
    assert (trains_text(frozen), trains_text(learning)) == (False, True)
    assert [*policy_parameters(frozen)] == ["unet"] and [*policy_parameters(learning)] == ["unet", "text_encoder"]
    assert torch.equal(output(frozen), output(learning))
    frozen.text_encoders[0].train()
    assert torch.equal(output(frozen), output(learning))  # what is not trained drops nothing
    train(frozen, steps=1)
    file, state = read_lora(with_text), adapter_state(frozen)
    equal = {key for key in state if torch.equal(state[key], file.state[key])}
    assert equal == {key for key in state if key.startswith("text_encoder.")}


def test_a_text_encoder_that_the_file_lacks_is_trained_from_the_settings(start: Path) -> None:
    model = make_model()
    line = LoRA(rank=3, alpha=6, init_from=str(start), text_encoder=True).attach(model)
    assert "; text_encoder rank 3, alpha 6, scale 2, 8 modules" in line
    with reference(model):
        expected = output(model)
    train(model)
    with reference(model):
        assert torch.equal(output(model), expected)


def test_the_names_of_the_adapters_are_those_attached(start: Path) -> None:
    fresh, continued = make_model(), make_model()
    assert adapter_names(fresh) == []
    LoRA().attach(fresh)
    LoRA(init_from=str(start)).attach(continued)
    assert (adapter_names(fresh), adapter_names(continued)) == (["policy"], ["reference", "policy"])


def test_a_policy_that_was_never_attached_is_named() -> None:
    with pytest.raises(ValueError, match="no adapter 'policy'"):
        policy_parameters(make_model())
    with pytest.raises(ValueError, match="no adapter 'policy'"), using(make_model(), "policy"):
        pass


# states


def test_a_state_loads_back_to_the_bit_and_is_a_copy() -> None:
    model = trained(LoRA(rank=4, target_modules=FULL, text_encoder=True))
    state, expected = adapter_state(model), output(model)
    train(model)
    assert not torch.equal(output(model), expected)
    load_adapter_state(model, "policy", state)
    assert torch.equal(output(model), expected)


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    model = trained(LoRA(rank=4))
    before = adapter_state(model)
    key, *others = before
    wrong = {"other.lora_A.weight": before[key]} | {k: before[k] + 1 for k in others[1:]}
    wrong[others[-1]] = torch.zeros(3)
    with pytest.raises(UserError, match=r"2 missing \(first: .*\), 1 unknown \(first: other.*\), 1 of another shape"):
        load_adapter_state(model, "policy", wrong)
    assert all(torch.equal(value, before[k]) for k, value in adapter_state(model).items())


# starting from a file


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_a_file_to_start_from_keeps_its_strength_and_the_settings_it_overrules_are_said(
    tmp_path: Path, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    origin = trained(LoRA(rank=4, alpha=1, target_modules=FULL))
    path = save(form, origin, tmp_path)
    model = make_model()
    with caplog.at_level(logging.WARNING, "dpo_sd.lora.adapters"):
        line = LoRA(rank=8, init_from=str(path)).attach(model)
    assert torch.equal(output(model), output(origin))
    assert line.startswith("rank 4, alpha 1, scale 0.25, 79 modules")
    assert caplog.messages == [f"{path} decides: {line}; not the settings: rank 8, alpha 8, 32 modules"]


def test_a_file_that_agrees_with_the_settings_is_taken_without_a_word(
    start: Path, caplog: pytest.LogCaptureFixture
) -> None:
    LoRA(rank=4, alpha=2, target_modules=FULL, init_from=str(start)).attach(make_model())
    assert not caplog.messages


def test_a_float16_file_trains_in_float32(tmp_path: Path) -> None:
    path = save("kohya", trained(LoRA(rank=4, text_encoder=True)), tmp_path)
    save_file({key: value.half() for key, value in load_file(path).items()}, path)
    model = make_model()
    LoRA(init_from=str(path)).attach(model)
    assert {p.dtype for p in flat(policy_parameters(model))} == {torch.float32}
    file = read_lora(path)
    assert all(torch.equal(value, file.state[key].float()) for key, value in adapter_state(model).items())


# drawing


def test_loras_for_drawing_add_up_by_their_weights_and_are_not_trained(start: Path, with_text: Path) -> None:
    model = make_model()
    lines = load_for_drawing(model, [(start, 0.5), (with_text, -1.0)])
    assert lines[0].startswith(f"{start} at 0.5: rank 4, alpha 2, scale 0.5, 79 modules")
    assert not any(parameter.requires_grad for parameter in all_of(model).parameters())
    expected = make_model()
    for path, weight in ((start, 0.5), (with_text, -1.0)):
        file = read_lora(path)
        for name in file.modules:
            network, _, inside = name.partition(".")
            module: Any = expected.networks[network].get_submodule(inside.removeprefix("text_model."))
            module.weight += weight * file.change(name)
    torch.testing.assert_close(output(model), output(expected), rtol=1e-4, atol=1e-5)


def test_a_lora_for_drawing_at_weight_1_draws_as_the_policy_did(with_text: Path) -> None:
    model, policy = make_model(), make_model()
    load_for_drawing(model, [(with_text, 1.0)])
    LoRA(init_from=str(with_text)).attach(policy)
    assert torch.equal(output(model), output(policy))


# another base


def test_a_lora_of_another_base_is_refused_naming_both_families(tmp_path: Path) -> None:
    path = save_kohya(weights_of(trained(LoRA(rank=4), make_model(width=1024))), tmp_path / "x.safetensors", "sd21")
    with pytest.raises(UserError, match="of 32 modules have another shape") as caught:
        LoRA(init_from=str(path)).attach(make_model())
    assert str(caught.value).endswith("; it looks like sd21, this model is tiny: use model=sd21")


def test_a_lora_with_a_second_text_encoder_is_one_for_sdxl(with_text: Path, tmp_path: Path) -> None:
    state = {key.replace("lora_te_", "lora_te2_"): value for key, value in load_file(with_text).items()}
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"8 of 40 modules are unknown .*; it looks like sdxl, this model is tiny"):
        load_for_drawing(make_model(), [(tmp_path / "x.safetensors", 1.0)])


def test_modules_that_the_model_does_not_have_are_counted_and_named(start: Path, tmp_path: Path) -> None:
    state = load_file(start / "lora" / WEIGHTS_NAME)
    save_file({key.replace("mid_block", "mid_blocks"): v for key, v in state.items()}, tmp_path / "x.safetensors")
    model = make_model()
    with pytest.raises(UserError, match=r"of 79 modules are unknown to this model \(first: unet.mid_blocks"):
        LoRA(init_from=str(tmp_path / "x.safetensors")).attach(model)
    assert torch.equal(output(model), output(make_model()))


def test_a_rank_above_every_width_is_refused() -> None:
    with pytest.raises(UserError, match="rank 1000000 is above the width of every module"):
        LoRA(rank=1_000_000).attach(make_model())


# ranks of parts, and the strength of rank-stabilised adapters


def strengths(model: StableDiffusion) -> dict[str, float]:
    """What peft multiplies the policy's output by, by module of the UNet."""
    layers = ((name, module) for name, module in model.unet.named_modules() if isinstance(module, LoraLayer))
    return {name: module.scaling["policy"] for name, module in layers}


def test_parts_of_the_unet_have_ranks_of_their_own_at_the_same_strength() -> None:
    model = make_model()
    LoRA(rank=4, alpha=2.0, ranks={"mid_block": 8, "mid_block.attentions.0.transformer_blocks.0.attn1": 2}).attach(
        model
    )
    ranks = weights_of(model).ranks
    assert {rank for name, rank in ranks.items() if "mid_block" in name and "attn1" not in name} == {8}
    assert {rank for name, rank in ranks.items() if "mid_block" in name and "attn1" in name} == {2}
    assert {rank for name, rank in ranks.items() if "mid_block" not in name} == {4}
    assert set(strengths(model).values()) == {0.5}


def test_a_rank_stabilised_adapter_is_as_strong_as_alpha_over_the_root_of_its_rank() -> None:
    model = make_model()
    LoRA(rank=4, alpha=2.0, rslora=True, ranks={"mid_block": 16}).attach(model)
    for name, strength in strengths(model).items():
        assert strength == pytest.approx(8.0 / 16**0.5 if "mid_block" in name else 2.0 / 4**0.5)


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_other_programs_read_the_strength_of_such_adapters(form: str, tmp_path: Path) -> None:
    model = make_model()
    LoRA(rank=4, rslora=True, ranks={"mid_block": 16}).attach(model)
    train(model)
    expected = predict(model).detach()
    fresh = make_model()
    load_for_drawing(fresh, [(save(form, model, tmp_path), 1.0)])
    torch.testing.assert_close(predict(fresh).detach(), expected)


def test_a_part_that_no_adapted_module_has_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"ranks: 'midblock' is part of no adapted module's name; nearest: mid_block"):
        LoRA(ranks={"midblock": 2}).attach(make_model())
    with pytest.raises(UserError, match=r"ranks\.mid_block must be at least 1, got 0"):
        LoRA(ranks={"mid_block": 0})


# ---------------------------------------------------------------------------------------------------------------- DoRA


def dora() -> StableDiffusion:
    """One of UNet and text encoder whose halves and magnitudes have moved."""
    model = make_model()
    LoRA(rank=2, alpha=4.0, dora=True, target_modules=FULL, text_encoder=True).attach(model)
    train(model)
    return model


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_a_fresh_dora_leaves_outputs_as_they_were_to_the_bit(weights: Weights) -> None:
    model = make_model()
    for network in model.networks.values():
        store(network, weights)
    LoRA(rank=2, dora=True, target_modules=FULL, text_encoder=True).attach(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == "bfloat16"):
        policy = output(model)
        with reference(model):
            assert torch.equal(output(model), policy)


def test_a_dora_has_directions_of_the_sum_and_lengths_of_its_own() -> None:
    model, merged = dora(), make_model()
    lora, before = weights_of(model), output(merged)
    with torch.no_grad():
        for name, module in modules_of(merged).items():
            if name in lora.modules:
                layer: Any = merged.networks[name.partition(".")[0]].get_submodule(module)
                layer.weight.copy_(lora.adapted(name, layer.weight))
                lengths = layer.weight.flatten(1).norm(dim=1)
                torch.testing.assert_close(lengths, lora.state[f"{name}{MAGNITUDE}"].flatten())
    torch.testing.assert_close(output(model), output(merged), rtol=1e-4, atol=1e-5)
    assert (output(model) - before).abs().max() > 1e-3


@pytest.mark.parametrize("form", ["diffusers", "peft"])
def test_a_dora_is_drawn_with_and_gone_on_from_as_it_was_saved(form: str, tmp_path: Path) -> None:
    model = dora()
    lora = weights_of(model)
    path = (
        save_peft(lora, tmp_path, make_model()) if form == "peft" else save_diffusers(lora, tmp_path / "x.safetensors")
    )
    drawing, going_on = make_model(), make_model()
    assert load_for_drawing(drawing, [(path, 1.0)])[0].split(": ")[1].startswith("DoRA of rank 2, alpha 4")
    LoRA(init_from=str(path), text_encoder=True).attach(going_on)
    for again in (drawing, going_on):
        torch.testing.assert_close(output(again), output(model))
    before, names = output(going_on), {name for name, p in going_on.unet.named_parameters() if p.requires_grad}
    assert any(MAGNITUDE in name for name in names) and all(".policy" in name for name in names)
    train(going_on)
    with reference(going_on):
        assert torch.equal(output(going_on), before)
    assert not torch.equal(output(going_on), before)


def test_where_a_dora_would_be_another_one_it_is_refused(tmp_path: Path) -> None:
    path, plain = (
        save("diffusers", dora(), tmp_path),
        save_diffusers(weights_of(trained(LoRA())), tmp_path / "y.safetensors"),
    )
    for loras in ([(path, 0.8)], [(plain, 1.0), (path, 1.0)]):
        with pytest.raises(UserError, match=r"is a DoRA, which scales the weights .*: draw with it alone and at 1"):
            load_for_drawing(make_model(), loras)
    with pytest.raises(UserError, match="would draw other pictures with this DoRA, so it has no Kohya form"):
        save("kohya", dora(), tmp_path)
    quantised = make_model()
    store(quantised.unet, "int8")
    with pytest.raises(UserError, match=r"a DoRA needs the base's own weights.*: use hardware\.weights=bfloat16"):
        LoRA(init_from=str(path)).attach(quantised)
