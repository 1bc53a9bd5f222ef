"""The linear layers of a frozen network in 8 or 4 bits; a pass expands one weight at a time and keeps nothing of it."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Weights = Literal["float32", "bfloat16", "float16", "int8", "nf4"]
QUANTISED = ("int8", "nf4")
BLOCK = 64  # weights that share a scale in nf4


class QuantisedLinear(nn.Linear):
    """A frozen linear layer; the base of an adapter like any other.

    Not bitsandbytes' own layers: `Linear8bitLt` rounds the inputs too and keeps them for the backward pass, and
    `Linear4bit` gives back the precision of its input, so that float32 spreads behind every norm.

    Args:
        layer: the layer to take the place of.
        bits: "int8" has one scale per output, "nf4" (Dettmers et al. 2023, arXiv:2305.14314) one per 64 weights
            and needs bitsandbytes, except on the `meta` device.
    """

    scales: Tensor

    def __init__(self, layer: nn.Linear, bits: str):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bits = layer.in_features, layer.out_features, bits
        codes, scales = _to_int8(layer.weight) if bits == "int8" else _to_nf4(layer.weight)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scales", scales)
        self.bias = layer.bias

    def expanded(self, dtype: torch.dtype) -> Tensor:
        """The weight, (outputs, inputs)."""
        if self.bits == "int8":
            return self.weight * self.scales.to(dtype)
        shape = (self.out_features, self.in_features)
        if self.weight.is_meta:
            return torch.empty(shape, dtype=dtype, device="meta")
        from bitsandbytes.functional import (  # pyright: ignore[reportMissingImports] - optional extra
            QuantState,
            dequantize_4bit,
        )

        state = QuantState(self.scales, torch.Size(shape), dtype=dtype, blocksize=BLOCK, quant_type="nf4")
        return dequantize_4bit(self.weight, state)

    def forward(self, input: Tensor) -> Tensor:
        return _Linear.apply(input, self)


class _Linear(torch.autograd.Function):
    """x·Wᵀ + b, which keeps the layer for its backward pass where autograd would keep the expanded weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantisedLinear) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        weight = layer.expanded(arithmetic(x))
        bias = None if layer.bias is None else layer.bias.to(weight.dtype)
        return F.linear(x.to(weight.dtype), weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return (gradient @ ctx.layer.expanded(gradient.dtype)).to(ctx.dtype), None


def arithmetic(x: Tensor) -> torch.dtype:
    """The precision of a product with x: autocast's, or its own."""
    kind = x.device.type
    mixed = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if mixed else x.dtype


def stored_in(weights: Weights) -> torch.dtype:
    """The precision of what is not quantised in a base that is stored as `weights`."""
    return torch.bfloat16 if weights in QUANTISED else getattr(torch, weights)


def store(network: nn.Module, weights: Weights) -> None:
    """Brings a frozen network into the form that its weights are stored in."""
    for tensor in (*network.parameters(), *network.buffers()):  # diffusers' own `to` speaks of modules that it keeps
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(stored_in(weights))
    if weights in QUANTISED:
        quantise(network, weights)


def quantise(network: nn.Module, bits: str) -> None:
    """Puts a `QuantisedLinear` in the place of each linear layer of a frozen network; convolutions stay as they are.

    Args:
        bits: one of `QUANTISED`.
    """
    for module in list(network.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is nn.Linear:
                setattr(module, name, QuantisedLinear(layer, bits))


def _to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (outputs, inputs) and scales (outputs, 1), which are float32 that bfloat16 holds too."""
    scales = (weight.detach().float().abs().amax(dim=1, keepdim=True) / 127).clamp(min=1e-12)
    scales = scales.bfloat16().float()  # rounded first, so that the codes make up for it
    return (weight.detach().float() / scales).round().to(torch.int8), scales


def _to_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, two in a byte, and scales, one for each `BLOCK` weights; quantised on a GPU where there is one."""
    if weight.is_meta:
        codes = torch.empty(-(-weight.numel() // 2), 1, dtype=torch.uint8, device="meta")
        return codes, torch.empty(-(-weight.numel() // BLOCK), device="meta")
    from bitsandbytes.functional import quantize_4bit  # pyright: ignore[reportMissingImports] - optional extra

    place = "cuda" if torch.cuda.is_available() else "cpu"
    codes, state = quantize_4bit(weight.detach().to(place), blocksize=BLOCK, quant_type="nf4")
    return codes.to(weight.device), state.absmax.to(weight.device)
