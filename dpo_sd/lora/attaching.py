"""Adapters put on the networks of a frozen base: a trainable `policy` and an optional frozen `reference`."""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_sd.errors import UserError, check_range
from dpo_sd.lora.adapters import adapter_tensors, copy_into, lora_layers, summary
from dpo_sd.lora.finding import find_lora
from dpo_sd.lora.names import adaptable, canonical, check_parts, having
from dpo_sd.lora.reading import read_lora
from dpo_sd.lora.weights import ATTENTION, MAGNITUDE, LoRAFile, LoRAWeights
from dpo_sd.models.families import family_of_lora

if TYPE_CHECKING:
    from torch import nn

    from dpo_sd.models.families import FamilyName
    from dpo_sd.models.stable_diffusion import StableDiffusion

log = logging.getLogger(__name__)

TEXT_ATTENTION = ["q_proj", "k_proj", "v_proj", "out_proj"]


class LoRA:
    """Settings of the trainable adapter.

    Args:
        rank: inner width r of every adapted module, at least 1.
        alpha: the adapter's output is multiplied by alpha / rank; above 0; None means alpha = rank.
        rslora: multiplies it by alpha / √rank instead, so that wide adapters learn as fast as narrow ones
            (Kalajdzievski 2023, arXiv:2312.03732). Files carry the alpha that gives this strength in every program.
        dora: also trains the length of each output's weights (Liu et al. 2024, arXiv:2402.09353), on a base that is not
            quantised. Of other programs, diffusers and PEFT draw with such a file; the others' norms are other ones.
        ranks: other ranks for parts of the UNet by dotted parts of their names, such as {mid_block: 16, attn1: 4}; of
            several that fit, the last counts. Their alphas grow and shrink alike.
        dropout: share of an adapter's inputs dropped while training, in [0, 1).
        target_modules: names or dotted ends of names of the UNet's linear and convolution modules.
        text_encoder: whether the attention of the text encoders is trained too.
        init_from: a LoRA to start from and to hold as the reference: a .safetensors file in diffusers' or Kohya's form,
            a folder in PEFT's form, or the folder of a run. For the networks that it adapts, it decides rank, alpha and
            modules. If it adapts text encoders, so do reference and policy, without being trained there unless
            `text_encoder` is set.

    Raises:
        UserError: if a value is out of its range.
    """

    def __init__(
        self,
        rank: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        target_modules: list[str] = ATTENTION,
        text_encoder: bool = False,
        init_from: str | None = None,
        rslora: bool = False,
        ranks: dict[str, int] | None = None,
        dora: bool = False,
    ) -> None:
        check_range("rank", rank, 1)
        check_parts("ranks", ranks, int)
        for part, its_rank in (ranks or {}).items():
            check_range(f"ranks.{part}", its_rank, 1)
        if alpha is not None and not 0 < alpha < math.inf:
            raise UserError(f"alpha must be positive, got {alpha}; leave it out (null) for alpha = rank")
        if not 0 <= dropout < 1:
            raise UserError(f"dropout must be at least 0 and below 1, got {dropout}")
        if isinstance(target_modules, str) or not all(isinstance(name, str) and name for name in target_modules):
            raise UserError(f"target_modules must be a list of module names, got {target_modules!r}")
        if not target_modules:
            raise UserError(f"target_modules must name at least one module, for example {ATTENTION}")
        self.rank = rank
        self.alpha = float(rank if alpha is None else alpha)
        self.dropout = dropout
        self.target_modules = list(target_modules)
        self.text_encoder = text_encoder
        self.init_from = init_from
        self.rslora = rslora
        self.ranks = dict(ranks or {})
        self.dora = dora

    def check(self) -> None:
        """Reads the header of `init_from`, so that an unusable file fails before any weights load.

        Raises:
            UserError: as `find_lora`.
        """
        if self.init_from is not None:
            find_lora(self.init_from)

    def attach(self, model: StableDiffusion, seed: int = 0) -> str:
        """Adds the trainable adapter `policy` and, with `init_from`, the frozen `reference`.

        A fresh policy leaves the outputs as they were to the bit; one from a file starts equal to the reference. Where
        the file decides and the settings say otherwise, a warning says so.

        Args:
            model: the base, frozen and without adapters, in any precision; adapters are float32.
            seed: decides the initial weights; the global random state is neither read nor changed.

        Returns:
            `summary(model)`.

        Raises:
            UserError: if a target matches no module, or `init_from` cannot be used on this base.
        """
        matched = _match(model.unet, self.target_modules)
        widest = max(max(module.weight.shape[:2]) for name, module in adaptable(model.unet).items() if name in matched)
        if (largest := max(self.rank, *self.ranks.values(), 0)) > widest:
            raise UserError(f"rank {largest} is above the width of every module: use {widest} at most")
        ranks = _ranks(matched, self.rank, self.ranks)
        file = None if self.init_from is None else read_lora(self.init_from)
        if file is not None:
            file = check_base(model, file)
        with _drawing_from(seed):
            for name, network in model.networks.items():
                trained = name == "unet" or self.text_encoder
                if file is not None and name in file.networks:
                    settings, dropout = file.peft_settings(name), self.dropout if trained else 0.0
                    _add_adapter(network, "reference", settings)
                    _add_adapter(network, "policy", settings, dropout)  # the one added last is active
                elif trained:
                    settings = self._settings(ranks if name == "unet" else dict.fromkeys(TEXT_ATTENTION, self.rank))
                    _add_adapter(network, "policy", settings, self.dropout)
        if file is not None:
            for adapter in ("reference", "policy"):
                copy_into(model, adapter, file.state)
            self._say_what_differs(model, file, ranks)
        for network in model.family.encoders:
            for name, parameter in adapter_tensors(model.networks[network], "policy").items():
                if not self.text_encoder or model.unread(network, name):  # DDP would wait for its gradient
                    parameter.requires_grad_(False)
        return summary(model)

    def _alpha(self, rank: int) -> float:
        """The alpha whose quotient by a module's rank is the strength of its adapter."""
        alpha = self.alpha * rank / self.rank
        return alpha * math.sqrt(rank) if self.rslora else alpha

    def _settings(self, ranks: Mapping[str, int]) -> dict[str, Any]:
        others = {module: rank for module, rank in ranks.items() if rank != self.rank}
        return {
            "r": self.rank,
            "lora_alpha": self._alpha(self.rank),
            "target_modules": sorted(ranks),
            "rank_pattern": {re.escape(module): rank for module, rank in others.items()},
            "alpha_pattern": {re.escape(module): self._alpha(rank) for module, rank in others.items()},
            "use_dora": self.dora,
        }

    def _say_what_differs(self, model: StableDiffusion, file: LoRAFile, ranks: Mapping[str, int]) -> None:
        unet = file.of("unet")
        asked = (set(ranks.values()), {*map(self._alpha, ranks.values())}, {f"unet.{name}" for name in ranks})
        there = set(unet.ranks.values()), set(unet.alphas.values()), set(unet.modules)
        if "unet" in file.networks and (*asked, self.dora) != (*there, unet.dora):
            kind = "DoRA of rank" if self.dora else "rank"
            settings_say = f"{kind} {self.rank}, alpha {self.alpha:g}, {len(ranks)} modules"
            log.warning("%s decides: %s; not the settings: %s", file.path, summary(model), settings_say)


def load_for_drawing(model: StableDiffusion, loras: Sequence[tuple[str | Path, float]]) -> list[str]:
    """Attaches LoRAs, all active at once, each multiplied by its weight; the model is for drawing then, not training.

    Args:
        model: the base, without adapters.
        loras: pairs of a file or folder, as in `find_lora`, and a weight: 1 is the strength it was trained at.

    Returns:
        One line per LoRA: `style.safetensors at 0.8: ` and its summary.

    Raises:
        UserError: if a file cannot be used on this base.
    """
    # all of them before the first changes the names of the modules
    files = [check_base(model, read_lora(path)) for path, _ in loras]
    if any(file.dora for file in files) and (len(files) > 1 or loras[0][1] != 1):
        dora = next(file.path for file in files if file.dora)
        raise UserError(
            f"{dora} is a DoRA, which scales the weights that it is put on: draw with it alone and at 1, or merge it "
            "into the model first (python -m dpo_sd.export format=merged)"
        )
    lines, names = [], [f"lora_{number}" for number in range(len(loras))]
    for name, file, (path, weight) in zip(names, files, loras, strict=True):
        for network in file.networks:
            _add_adapter(model.networks[network], name, file.peft_settings(network))
        copy_into(model, name, file.state)
        lines.append(f"{path} at {weight:g}: {summary(model, name)}")
    for layer in (layer for network in model.networks.values() for layer in lora_layers(network)):
        layer._active_adapter = names
        for name, (_, weight) in zip(names, loras, strict=True):
            layer.set_scale(name, weight)
    for network in model.networks.values():
        network.requires_grad_(False)
    return lines


def check_base(model: StableDiffusion, file: LoRAFile) -> LoRAFile:
    """The LoRA with its tensors in the shapes that the model's modules ask for.

    A linear module is a convolution of one pixel to some writers, and the other way round.

    Args:
        model: the base, without adapters.

    Raises:
        UserError: naming both families, if the LoRA has modules that the model lacks or has in other sizes.
    """
    from torch import nn

    there = {
        canonical(n, name): module
        for n, network in model.networks.items()
        for name, module in adaptable(network).items()
    }
    state, unknown, misshaped = {}, [], []
    for name, rank in file.ranks.items():
        module = there.get(name)
        if module is None:
            unknown.append(name)
            continue
        if isinstance(module, nn.Linear):
            shapes = {"A": (rank, module.in_features), "B": (module.out_features, rank)}
        else:
            shapes = {"A": (rank, module.in_channels, *module.kernel_size), "B": (module.out_channels, rank, 1, 1)}
        keys = {f"{name}.lora_{half}.weight": shape for half, shape in shapes.items()}
        if (magnitude := f"{name}{MAGNITUDE}") in file.state:
            outputs = shapes["B"][0]
            keys[magnitude] = (outputs,) if isinstance(module, nn.Linear) else (1, outputs, 1, 1)
        for key, shape in keys.items():
            tensor = file.state[key]
            if _padded(tensor.shape) != _padded(shape):
                misshaped.append(name)
                break
            state[key] = tensor.reshape(shape)
    if not unknown and not misshaped:
        return replace(file, state=state)
    complaints = [
        f"{len(names)} of {len(file.modules)} modules {what} (first: {names[0]})"
        for what, names in (("are unknown to this model", unknown), ("have another shape", misshaped))
        if names
    ]
    looks = _family(file)
    what, hint = "does not fit this model", f"this model is {model.name}"
    if looks not in (None, model.name):
        what, hint = "was made for another base", f"it looks like {looks}, {hint}: use model={looks}"
    raise UserError(f"{file.path} {what}: {', '.join(complaints)}; {hint}")


def _padded(shape: Sequence[int]) -> tuple[int, ...]:
    """A vector of magnitudes or a matrix as for a convolution of one pixel; others as they are."""
    return (1, *shape, 1, 1) if len(shape) == 1 else (*shape, 1, 1) if len(shape) == 2 else tuple(shape)


@contextmanager
def _drawing_from(seed: int) -> Iterator[None]:
    import torch

    with torch.random.fork_rng(devices=[]):  # peft draws from the global generator, on the CPU
        torch.default_generator.manual_seed(seed)
        yield


def _add_adapter(network: Any, name: str, settings: dict[str, Any], dropout: float = 0.0) -> None:
    from peft import LoraConfig
    from peft.functional import cast_adapter_dtype

    from dpo_sd.lora.magnitudes import begin
    from dpo_sd.models.quantization import QuantisedLinear

    if settings.get("use_dora") and any(isinstance(module, QuantisedLinear) for module in network.modules()):
        raise UserError("a DoRA needs the base's own weights, and not quantised ones: use hardware.weights=bfloat16")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # policy beside reference
        network.add_adapter(LoraConfig(**settings, lora_dropout=dropout), name)
    cast_adapter_dtype(network, name)
    for layer in lora_layers(network):
        begin(layer, name)
    network.train(network.training)  # new dropouts start in training mode, whatever the network's


def _match(unet: nn.Module, targets: list[str]) -> set[str]:
    names_there = set(adaptable(unet))
    matched: set[str] = set()
    for target in targets:
        names = {name for name, _ in unet.named_modules() if f".{name}".endswith(f".{target}")}
        if not names or not names <= names_there:
            paths = [name.split(".") for name in names_there]
            suffixes = {".".join(path[-n:]) for path in paths for n in range(1, 5) if not path[-n:][0].isdigit()}
            nearest = get_close_matches(target, sorted(suffixes), 3, 0.3) or sorted(suffixes)[:3]
            problem = "names no linear or convolution module" if names else "matches no module"
            raise UserError(f"target_modules: '{target}' {problem} of this UNet; nearest: {', '.join(nearest)}")
        matched |= names
    return matched


def _ranks(modules: set[str], rank: int, others: Mapping[str, int]) -> dict[str, int]:
    """Ranks of the modules by their names.

    Raises:
        UserError: if a name of `others` is part of none.
    """
    ranks = dict.fromkeys(sorted(modules), rank)
    for part, its_rank in others.items():
        ranks |= dict.fromkeys(having(part, ranks, "ranks"), its_rank)
    return ranks


def _family(file: LoRAWeights) -> FamilyName | None:
    """The family that a LoRA was made for, where its modules tell."""
    widths = {file.state[f"{name}.lora_A.weight"].shape[1] for name in file.modules if name.endswith("attn2.to_k")}
    return family_of_lora(file.networks, widths.pop() if widths else None)
