"""A LoRA as numbers: the one shape that all files are read into and written from."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from dpo_sd.models.families import NETWORKS

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
MAGNITUDE = ".lora_magnitude_vector"  # ends the names of a DoRA's further tensors, as PEFT has them
PEFT_PREFIX = "base_model.model."  # of the names of tensors
SETTINGS_KEY = "lora_adapter_metadata"  # of the header of diffusers' form: PEFT's settings of each network
ALPHAS_KEY = "dpo_sd.alphas"  # the alphas that were trained with, where B makes up for others
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]  # of a UNet
Form = Literal["diffusers", "kohya", "peft"]


@dataclass(frozen=True)
class LoRAWeights:
    """A LoRA of one or more networks of a Stable Diffusion.

    Args:
        state: tensors by `<network>.<module>.lora_A.weight` and `….lora_B.weight`, network and module as diffusers
            names them: `text_encoder.text_model.encoder.layers.0.self_attn.q_proj`. A is (r, in) for linear modules
            and (r, in, k, k) for convolutions; B is (out, r) and (out, r, 1, 1). A DoRA (Liu et al. 2024,
            arXiv:2402.09353) also has the length of each output's weights, `….lora_magnitude_vector`, (out,) and
            (1, out, 1, 1).
        alphas: alphas by `<network>.<module>`; what a module adds is multiplied by alpha / r.
    """

    state: dict[str, Tensor]
    alphas: dict[str, float]

    @property
    def modules(self) -> list[str]:
        return list(self.alphas)

    @property
    def ranks(self) -> dict[str, int]:
        return {module: len(self.state[f"{module}.lora_A.weight"]) for module in self.alphas}

    @property
    def dora(self) -> bool:
        """Whether any network's part is a DoRA."""
        return any(key.endswith(MAGNITUDE) for key in self.state)

    @property
    def networks(self) -> list[str]:
        return [name for name in NETWORKS if any(module.startswith(f"{name}.") for module in self.alphas)]

    def of(self, network: str) -> LoRAWeights:
        """The part of one network."""

        def part(values: Mapping[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in values.items() if name.startswith(f"{network}.")}

        return LoRAWeights(part(self.state), part(self.alphas))

    def with_alphas(self, alphas: dict[str, float]) -> Self:
        """The same LoRA with other alphas for some modules, whose B becomes float32 and makes up for the difference.

        A factor that is a power of two changes no digit of B; others round it to float32.
        """
        factors = {name: self.alphas[name] / alpha for name, alpha in alphas.items() if self.alphas[name] != alpha}
        keys = {f"{name}.lora_B.weight": factor for name, factor in factors.items()}
        scaled = {key: self.state[key].float() * factor for key, factor in keys.items()}
        return replace(self, state=self.state | scaled, alphas=self.alphas | alphas)

    def change(self, module: str) -> Tensor:
        """The summand of a module's weight: (out, in), or (out, in, k, k) for a convolution; fp32."""
        a, b = (self.state[f"{module}.lora_{half}.weight"].float() for half in "AB")
        return (self.alphas[module] / len(a) * (b.flatten(1) @ a.flatten(1))).view(len(b), *a.shape[1:])

    def adapted(self, module: str, weight: Tensor) -> Tensor:
        """A module's weight with its LoRA merged into it: as `weight`."""
        adapted = weight + self.change(module).to(weight)
        if (magnitude := self.state.get(f"{module}{MAGNITUDE}")) is None:
            return adapted
        lengths = adapted.float().flatten(1).norm(dim=1)
        factors = (magnitude.float().flatten() / lengths).view(-1, *[1] * (weight.ndim - 1))
        return adapted * factors.to(weight)

    def summary(self) -> str:
        """`rank 8, alpha 4, scale 0.5, 32 modules, 36864 parameters`, ranges where modules differ, for each network."""
        parts = [self.of(network) for network in self.networks]
        lines = [part._summary() for part in parts]
        return "; ".join(line if n == "unet" else f"{n} {line}" for n, line in zip(self.networks, lines, strict=True))

    def _summary(self) -> str:
        def span(values: list[float]) -> str:
            low, high = min(values), max(values)
            return f"{low:g}" if low == high else f"{low:g} to {high:g}"

        ranks, alphas = list(self.ranks.values()), list(self.alphas.values())
        scale = span([alpha / rank for alpha, rank in zip(alphas, ranks, strict=True)])
        parameters = sum(tensor.numel() for tensor in self.state.values())
        kind = "DoRA of rank" if self.dora else "rank"
        return (
            f"{kind} {span([*ranks])}, alpha {span(alphas)}, scale {scale}, {len(ranks)} modules, "
            f"{parameters} parameters"
        )

    def peft_settings(self, network: str) -> dict[str, Any]:
        """The settings of one network's adapter, as `peft.LoraConfig` takes them.

        Modules of text encoders are named from `encoder` on, which fits every version of transformers.
        """
        part, start = self.of(network), re.compile(rf"{network}\.(text_model\.)?")
        rank, rank_pattern = _most_common({start.sub("", name, 1): rank for name, rank in part.ranks.items()})
        alpha, alpha_pattern = _most_common({start.sub("", name, 1): alpha for name, alpha in part.alphas.items()})
        return {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": rank_pattern,
            "alpha_pattern": alpha_pattern,
            "target_modules": sorted(start.sub("", name, 1) for name in part.modules),
            **({"use_dora": True} if part.dora else {}),
        }


@dataclass(frozen=True)
class LoRAFile(LoRAWeights):
    """A LoRA as read from a file.

    Args:
        path: the file, or the folder of a LoRA in PEFT's form.
        form: the form that it was written in.
        metadata: strings from the file's header.
    """

    path: Path
    form: Form
    metadata: dict[str, str]


def _most_common(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {module: value for module, value in values.items() if value != common}
