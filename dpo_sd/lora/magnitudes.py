"""The magnitudes of a DoRA (Liu et al. 2024, arXiv:2402.09353) in float32, whatever the precision of its base."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.dora import DoraConv2dLayer
from torch import Tensor, nn


class Convolution(DoraConv2dLayer):
    """peft's layer, which takes the norms of a half-precision base in half precision, where they are 0.4 % apart."""

    def get_weight_norm(
        self, weight: Tensor, lora_weight: Tensor, scaling: float, adapter_name: str | None = None
    ) -> Tensor:
        return super().get_weight_norm(weight.float(), lora_weight.float(), scaling)


def begin(layer: Any, adapter: str) -> None:
    """Takes the norms of a layer's base anew for an adapter in float32, so that a fresh one changes nothing.

    Args:
        layer: one that peft has adapted; without magnitudes it stays as it is.
    """
    if adapter not in layer.lora_magnitude_vector:
        return
    base, halves = layer.get_base_layer(), (layer.lora_A[adapter].weight, layer.lora_B[adapter].weight)
    if isinstance(base, nn.Conv2d):
        layer.lora_magnitude_vector[adapter] = Convolution(fan_in_fan_out=False)
    layer.lora_magnitude_vector[adapter].update_layer(
        base_layer=base, lora_A=halves[0], lora_B=halves[1], scaling=layer.scaling[adapter]
    )
