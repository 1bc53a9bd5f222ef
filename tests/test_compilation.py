"""Compiled blocks compute what they computed before, in training steps alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small_model import make_model, output, predict, trained

from dpo_sd.errors import UserError
from dpo_sd.lora.adapters import policy_parameters, reference
from dpo_sd.lora.attaching import LoRA
from dpo_sd.models import compilation
from dpo_sd.training import hardware


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def computed(model: Any) -> list[torch.Tensor]:
    """Predictions of policy and reference, and the gradients of the policy."""
    parameters = [parameter for group in policy_parameters(model).values() for parameter in group]
    policy = predict(model)
    gradients = torch.autograd.grad(policy.square().sum(), parameters)
    with torch.no_grad(), reference(model):
        return [policy.detach(), predict(model), *gradients]


def compiles() -> bool:
    try:
        hardware.Hardware(compile=True).check()
    except UserError:
        return False
    return True


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_give_the_same_predictions_and_gradients(checkpointing):
    model = trained(LoRA(rank=2))
    if checkpointing:
        model.unet.enable_gradient_checkpointing()
    model.unet.train()
    expected = computed(model)
    compilation.compile_blocks(model.unet, "aot_eager")
    assert compilation.graphs() == 0
    for _ in range(2):  # the second time, all is compiled already
        for new, old in zip(computed(model), expected, strict=True):
            torch.testing.assert_close(new, old, rtol=1e-3, atol=1e-4)
    assert compilation.graphs() >= 2  # with and without gradients


@pytest.mark.skipif(not compiles(), reason="no C++ compiler")
def test_a_fresh_policy_equals_the_reference_to_the_bit_also_in_fused_half_precision():
    """Otherwise DPO would begin at another loss than ln 2: beta makes rounding large."""
    model = make_model()
    LoRA(rank=2).attach(model)
    model.unet.train()
    with torch.autocast("cpu", torch.bfloat16):
        expected = predict(model).detach()
        compilation.compile_blocks(model.unet)
        policy = predict(model).detach()
        with torch.no_grad(), reference(model):
            assert torch.equal(predict(model), policy)
    torch.testing.assert_close(policy, expected, rtol=0.05, atol=0.05)


def test_images_of_several_sizes_share_their_graphs():
    def drawn(height: int, width: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(height)
        latents, hidden = (torch.randn(2, *shape, generator=generator) for shape in ((4, height, width), (5, 32)))
        return model.unet(latents, torch.tensor([20, 700]), hidden).sample.detach()

    model = trained(LoRA(rank=2))
    sizes = [(8, 8), (8, 16), (16, 8)]
    expected = [drawn(*size) for size in sizes]
    compilation.compile_blocks(model.unet, "aot_eager", sizes=3)
    counts = []
    for size, image in zip(sizes, expected, strict=True):
        torch.testing.assert_close(drawn(*size), image, rtol=1e-3, atol=1e-4)
        counts.append(compilation.graphs())
    assert counts[0] == counts[2]


def test_nothing_is_compiled_where_it_would_not_pay():
    model = trained(LoRA(rank=2))
    expected = output(model)
    compilation.compile_blocks(model.unet, "aot_eager")
    with compilation.eager():
        assert torch.equal(output(model), expected)
    assert compilation.graphs() == 0


def test_every_shape_is_compiled_for_itself_beyond_the_number_at_which_torch_gives_up():
    model = trained(LoRA(rank=2))
    compilation.compile_blocks(model.unet, "aot_eager")
    block: Any = model.unet.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0")
    with torch.no_grad():
        for pixels in range(10, 20):
            block(torch.zeros(1, pixels, 32), encoder_hidden_states=torch.zeros(1, 5, 32))
    assert compilation.graphs() == 10


def test_a_run_says_how_many_graphs_it_compiled_and_draws_without(train, tmp_path: Path):
    def quick() -> None:
        compilation.compile_blocks = partial(compilation.compile_blocks, backend="aot_eager")
        hardware.Hardware.check = lambda *_, **__: None  # that there is a compiler

    ended = train(tmp_path / "run", "hardware.compile=true", "~callbacks.verdict", patch=quick)
    assert ended.code == 0, ended.err
    assert "compile 5 graphs for 7 blocks of the UNet" in ended.out
    plain = train(tmp_path / "plain", "~callbacks.verdict")
    losses = [
        json.loads((each / "summary.json").read_text())["metrics"]["train/loss"]
        for each in (tmp_path / "run", tmp_path / "plain")
    ]
    assert plain.code == 0 and losses[0] == pytest.approx(losses[1], rel=1e-3)
