"""LoRA adapters that are attached to a model: which is active, and their tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Literal

from dpo_sd.errors import UserError
from dpo_sd.lora.names import canonical
from dpo_sd.lora.weights import MAGNITUDE, LoRAWeights

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer
    from torch import Tensor, nn

    from dpo_sd.models.stable_diffusion import StableDiffusion


def summary(model: StableDiffusion, adapter: str = "policy") -> str:
    """`LoRAWeights.summary` of an attached adapter, and the names of its parts that are not trained."""
    frozen = [
        name
        for name, network in model.networks.items()
        if adapter == "policy" and (tensors := adapter_tensors(network, adapter)) and not _any_trains(tensors.values())
    ]
    return weights_of(model, adapter).summary() + (f" ({' and '.join(frozen)} not trained)" if frozen else "")


def adapter_names(model: StableDiffusion) -> list[str]:
    """The adapters that are attached, of `reference` and `policy`."""
    names = {name for network in model.networks.values() for name in getattr(network, "peft_config", {})}
    return [name for name in ("reference", "policy") if name in names]


def trains_text(model: StableDiffusion) -> bool:
    """Whether the policy trains a text encoder, so that embeddings of prompts change with every update."""
    return any(_any_trains(adapter_tensors(encoder, "policy").values()) for encoder in model.text_encoders)


@contextmanager
def using(model: StableDiffusion, which: Literal["base", "reference", "policy"]) -> Iterator[None]:
    """Inside, the model is the untouched base, the reference (where there is no such adapter, the base) or the policy.

    UNet and text encoders alike. Base and reference run without dropout; the policy keeps the mode it has, so call
    `eval()` before drawing images with it. Gradients stay the caller's matter. On leaving, also by an exception, the
    former state is back; contexts may be nested.
    """
    from torch import nn

    if which == "policy":
        _check_attached(model, which)
    networks = list(model.networks.values())
    layers = [layer for network in networks for layer in lora_layers(network)]
    states = [(layer, layer._active_adapter, layer._disable_adapters) for layer in layers]
    modules = [module for network in networks for module in network.modules()]
    dropouts = [module for module in modules if isinstance(module, nn.Dropout) and module.p > 0 and module.training]
    try:
        # peft's own switches set and clear requires_grad as they go; these two attributes are all a forward pass reads
        for layer in layers:
            layer._active_adapter = [which]
            layer._disable_adapters = which not in layer.lora_A
        if which != "policy":
            for dropout in dropouts:
                dropout.training = False
        yield
    finally:
        for layer, active, disabled in states:
            layer._active_adapter, layer._disable_adapters = active, disabled
        for dropout in dropouts:
            dropout.training = True


def reference(model: StableDiffusion) -> AbstractContextManager[None]:
    """`using(model, "reference")`: inside, the model is the one that the policy is measured against."""
    return using(model, "reference")


def policy_parameters(model: StableDiffusion) -> dict[str, list[nn.Parameter]]:
    """The policy's parameters by network, in the order of its modules, for the networks that are trained.

    They include those of layers that are never read, which get no gradient and which optimisers pass over.
    """
    return {name: list(parameters.values()) for name, parameters in named_policy_parameters(model).items()}


def named_policy_parameters(model: StableDiffusion) -> dict[str, dict[str, nn.Parameter]]:
    """`policy_parameters` by their names within their network, as of `adapter_tensors`."""
    _check_attached(model, "policy")
    tensors = {name: adapter_tensors(network, "policy") for name, network in model.networks.items()}
    return {name: parameters for name, parameters in tensors.items() if _any_trains(parameters.values())}


def adapter_state(model: StableDiffusion, adapter: str = "policy") -> dict[str, Tensor]:
    """A copy of an adapter's tensors, named as in `LoRAWeights`."""
    return {key: tensor.clone() for key, tensor in weights_of(model, adapter).state.items()}


def load_adapter_state(model: StableDiffusion, adapter: str, state: Mapping[str, Tensor]) -> None:
    """Copy tensors named as by `adapter_state` into an attached adapter.

    Raises:
        UserError: if a tensor is missing, unknown or of another shape; the adapter is then unchanged.
    """
    expected = weights_of(model, adapter).state
    complaints = [
        f"{len(keys)} {what} (first: {keys[0]})"
        for what, keys in (
            ("missing", [key for key in expected if key not in state]),
            ("unknown", [key for key in state if key not in expected]),
            ("of another shape", [k for k in expected if k in state and state[k].shape != expected[k].shape]),
        )
        if keys
    ]
    if complaints:
        raise UserError(f"these weights do not fit the adapter '{adapter}': {', '.join(complaints)}")
    copy_into(model, adapter, state)


def weights_of(model: StableDiffusion, adapter: str = "policy") -> LoRAWeights:
    """An attached adapter in the shape that files are read into; its tensors are the adapter's own, not copies."""
    _check_attached(model, adapter)
    state, alphas = {}, {}
    for name, network in model.networks.items():
        state |= {canonical(name, key): tensor.detach() for key, tensor in adapter_tensors(network, adapter).items()}
        layers = _layers(network, adapter).items()
        alphas |= {canonical(name, module): float(layer.lora_alpha[adapter]) for module, layer in layers}
    return LoRAWeights(state, alphas)


def _check_attached(model: StableDiffusion, adapter: str) -> None:
    attached = {name for network in model.networks.values() for name in getattr(network, "peft_config", {})}
    if adapter not in attached:
        raise ValueError(f"this model has no adapter '{adapter}' (attached: {sorted(attached)}): call LoRA(...).attach")


def lora_layers(network: nn.Module) -> list[LoraLayer]:
    from peft.tuners.lora import LoraLayer

    return [module for module in network.modules() if isinstance(module, LoraLayer)]


def _layers(network: nn.Module, adapter: str) -> dict[str, LoraLayer]:
    from peft.tuners.lora import LoraLayer

    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.lora_A
    }


def adapter_tensors(network: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """An adapter's parameters by `<module>.lora_A.weight` and so on; none where it is not attached."""
    layers: Any = _layers(network, adapter).items()
    halves = {
        f"{name}.lora_{half}.weight": side[adapter].weight
        for name, layer in layers
        for half, side in (("A", layer.lora_A), ("B", layer.lora_B))
    }
    return halves | {
        f"{name}{MAGNITUDE}": layer.lora_magnitude_vector[adapter].weight
        for name, layer in layers
        if adapter in layer.lora_magnitude_vector
    }


def _any_trains(parameters: Any) -> bool:
    return any(parameter.requires_grad for parameter in parameters)


def copy_into(model: StableDiffusion, adapter: str, state: Mapping[str, Tensor]) -> None:
    import torch

    with torch.no_grad():
        for name, network in model.networks.items():
            for key, parameter in adapter_tensors(network, adapter).items():
                if (key := canonical(name, key)) in state:  # a file may have nothing for a network that is trained
                    parameter.copy_(state[key])


def adapter_key(model: StableDiffusion, adapter: str, networks: str = "") -> str | None:
    """Hash of an adapter's weights and strengths, 16 hexadecimal digits; None where it is not attached.

    Args:
        adapter: the adapter's name.
        networks: beginning of the names of the networks that count; all by default.
    """
    if adapter not in adapter_names(model):
        return None
    digest = hashlib.sha256()
    for name, network in model.networks.items():
        config = getattr(network, "peft_config", {}).get(adapter)
        if config is not None and name.startswith(networks):
            patterns = sorted((config.rank_pattern or {}).items()), sorted((config.alpha_pattern or {}).items())
            digest.update(repr((name, config.r, config.lora_alpha, *patterns)).encode())
    states = {name: value for name, value in adapter_state(model, adapter).items() if name.startswith(networks)}
    for name, value in sorted(states.items()):
        digest.update(name.encode())
        digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()[:16] if states else None
