"""Linear layers in 8 and 4 bits, against the layers they take the place of."""

from __future__ import annotations

import copy

import pytest
import torch

from dpo_sd.forecast.counting import Alive
from dpo_sd.models.base import Base
from dpo_sd.models.quantization import QuantisedLinear, quantise


def test_eight_bits_are_within_half_a_step_of_the_weights():
    layer = torch.nn.Linear(32, 16)
    steps = layer.weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((QuantisedLinear(layer, "int8").expanded(torch.float32) - layer.weight).abs() <= steps * 0.502).all()


def test_eight_bits_in_half_precision_are_those_in_single_precision_rounded_once():
    layer = QuantisedLinear(torch.nn.Linear(32, 16), "int8")
    assert torch.equal(layer.expanded(torch.bfloat16), layer.expanded(torch.float32).bfloat16())


def test_a_quantised_layer_passes_on_the_gradient_of_its_expanded_weight():
    layer = QuantisedLinear(torch.nn.Linear(8, 4), "int8")
    x = torch.randn(3, 8, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.expanded(torch.float32).sum(dim=0).expand(3, 8))


def test_a_quantised_layer_keeps_no_expanded_weight_for_its_backward_pass():
    layer = QuantisedLinear(torch.nn.Linear(512, 512), "int8")
    x = torch.randn(1, 512, requires_grad=True)
    with Alive() as alive:
        y = layer(x)
    assert alive.now <= 4096 and y.requires_grad


def test_the_tiny_model_predicts_the_same_with_its_linear_layers_in_eight_bits_to_two_thousandths():
    unet = Base("tiny").load().unet
    smaller = copy.deepcopy(unet)
    quantise(smaller, "int8")
    side = unet.config["sample_size"]
    given = (
        torch.randn(2, 4, side, side),
        torch.tensor([100, 700]),
        torch.randn(2, 8, unet.config["cross_attention_dim"]),
    )
    with torch.no_grad():
        there, here = unet(*given).sample, smaller(*given).sample
    assert (here - there).norm() < 2e-3 * there.norm()


def test_nf4_of_bitsandbytes_is_near_the_weights_and_trains_the_adapter():
    pytest.importorskip("bitsandbytes")
    layer = torch.nn.Linear(128, 64)
    quantised = QuantisedLinear(layer, "nf4")
    assert (quantised.expanded(torch.float32) - layer.weight).norm() < 0.1 * layer.weight.norm()
