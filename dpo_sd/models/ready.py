"""The one road to a model that is ready: in its precision, told its device, its notes said."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from dpo_sd.models.quantization import Weights
    from dpo_sd.models.stable_diffusion import StableDiffusion


class Loadable(Protocol):
    """A place that a model is loaded from: `Base`, or `RandomWeights`.

    `notes` are what the user should know of the last loading, one line each.
    """

    notes: list[str]

    def load(self, weights: Weights, device: torch.device | str) -> StableDiffusion: ...


def ready(
    base: Loadable,
    device: torch.device | str,
    weights: Weights = "float32",
    gradient_checkpointing: bool = False,
    compile: bool = False,
    say: Callable[[str], object] = print,
) -> StableDiffusion:
    """Loads a model that works on `device`, and says what there is to note.

    The networks lie on the CPU until `model.working` or the trainer takes them to the device, so that encoders and UNet
    need not have room there at once.

    Args:
        device: where the networks work; inside `model.working` they are there.
        weights: how the UNet is stored.
        gradient_checkpointing: whether the UNet computes activations again in the backward pass.
        compile: whether the UNet's blocks are compiled at their first call.
        say: is given the notes, one line each.

    Raises:
        UserError: if the base cannot be fetched or loaded.
    """
    import torch

    from dpo_sd.models import compilation

    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)  # nf4 is quantised on the current one
    model = base.load(weights, device)
    if gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    if compile:
        compilation.compile_blocks(model.unet)
    for note in base.notes:
        say(f"model   {note}")
    return model
