"""LoRA adapters on one frozen UNet: a trainable `policy`, an optional frozen `reference`, and their files."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from dpo_sd.errors import UserError
from dpo_sd.files import replacing

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer
    from torch import Tensor, nn

log = logging.getLogger(__name__)

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
WEIGHTS_NAME = "pytorch_lora_weights.safetensors"

Form = Literal["diffusers", "kohya"]
BaseModelVersion = Literal["sd_v1", "sd_v2", "sd_v2_v", "sdxl_base_v1-0"]
ARCHITECTURES: dict[BaseModelVersion, str] = {
    "sd_v1": "stable-diffusion-v1/lora",
    "sd_v2": "stable-diffusion-v2-512/lora",
    "sd_v2_v": "stable-diffusion-v2-768-v/lora",
    "sdxl_base_v1-0": "stable-diffusion-xl-v1-base/lora",
}
_FAMILIES = {768: "SD1", 1024: "SD2", 2048: "SDXL"}  # by the width of the text embedding in cross-attention


class LoRA:
    """Settings of the trainable adapter.

    Args:
        rank: inner width r of every adapted module, at least 1.
        alpha: the adapter's output is multiplied by alpha / rank; above 0; None means alpha = rank.
        dropout: share of an adapter's inputs dropped while training, in [0, 1).
        target_modules: names or dotted ends of names of the UNet's linear and convolution modules.
        init_from: a LoRA to start from and to hold as the reference: a .safetensors file in diffusers or Kohya form, or
            the folder of a run. Rank, alpha and modules then are the file's.

    Raises:
        UserError: when a value is out of its range.
    """

    def __init__(
        self,
        rank: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        target_modules: list[str] = ATTENTION,
        init_from: str | None = None,
    ) -> None:
        if rank < 1:
            raise UserError(f"rank must be at least 1, got {rank}")
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
        self.init_from = init_from

    def check(self) -> None:
        """Read the header of `init_from`, so that an unusable file fails before any weights load.

        Raises:
            UserError: as `find_lora`.
        """
        if self.init_from is not None:
            find_lora(self.init_from)

    def attach(self, unet: UNet2DConditionModel, seed: int = 0) -> str:
        """Freeze the UNet and add the trainable adapter `policy` and, with `init_from`, the frozen `reference`.

        A fresh policy leaves the UNet's outputs as they were to the bit; one from a file starts equal to the reference.
        Rank, alpha and modules are the file's; where they differ from the settings, a warning says so.

        Args:
            unet: the base, without adapters, in any precision; adapters are float32.
            seed: decides the initial weights; the global random state is neither read nor changed.

        Returns:
            `summary(unet)`.

        Raises:
            UserError: when a target matches no module, or `init_from` cannot be used on this base.
        """
        modules = _match(unet, self.target_modules)
        widest = max(max(module.weight.shape[:2]) for name, module in _adaptable(unet).items() if name in modules)
        if self.rank > widest:
            raise UserError(f"rank {self.rank} is above the width of every module ({widest}): nothing is gained by it")
        if self.init_from is None:
            settings = {"r": self.rank, "lora_alpha": self.alpha, "target_modules": self.target_modules}
            _add_adapter(unet, "policy", settings, self.dropout, seed)
            return summary(unet)

        file = read_lora(self.init_from)
        _check_base(unet, file)
        settings = _settings(file)
        for name, dropout in (("reference", 0.0), ("policy", self.dropout)):  # the one added last is active
            _add_adapter(unet, name, settings, dropout, seed)
            load_adapter_state(unet, name, file.state)
        asked = (self.rank, self.alpha, {}, {}, modules)
        if asked != (file.rank, file.alpha, file.rank_pattern, file.alpha_pattern, set(file.modules)):
            settings_say = f"rank {self.rank}, alpha {self.alpha:g}, {len(modules)} modules"
            log.warning("%s decides: %s; not the settings: %s", file.path, summary(unet), settings_say)
        return summary(unet)


def load_for_drawing(unet: UNet2DConditionModel, loras: Sequence[tuple[str | Path, float]]) -> list[str]:
    """Attach LoRAs, all active at once, each multiplied by its weight; the UNet is for drawing then, not for training.

    Args:
        unet: the base, without adapters.
        loras: file or run folder, and weight: 1 is the strength it was trained at.

    Returns:
        One line per LoRA: `style.safetensors at 0.8: ` and its summary.

    Raises:
        UserError: when a file cannot be used on this base.
    """
    files = [read_lora(path) for path, _ in loras]
    for file in files:  # all of them before the first changes the names of the modules
        _check_base(unet, file)
    lines = []
    for number, (file, (path, weight)) in enumerate(zip(files, loras, strict=True)):
        name = f"lora_{number}"
        _add_adapter(unet, name, _settings(file), dropout=0.0, seed=0)
        load_adapter_state(unet, name, file.state)
        lines.append(f"{path} at {weight:g}: {summary(unet, name)}")
    if loras:
        unet.set_adapters([f"lora_{number}" for number in range(len(loras))], [weight for _, weight in loras])
    return lines


def summary(unet: UNet2DConditionModel, adapter: str = "policy") -> str:
    """One line: `rank 8, alpha 4, scale 0.5, 32 modules, 36864 parameters`; ranges where modules differ."""
    layers = list(_layers(unet, adapter).values())

    def span(values: list[float]) -> str:
        low, high = min(values), max(values)
        return f"{low:g}" if low == high else f"{low:g} to {high:g}"

    rank = span([layer.r[adapter] for layer in layers])
    alpha = span([layer.lora_alpha[adapter] for layer in layers])
    scale = span([layer.scaling[adapter] for layer in layers])
    parameters = sum(parameter.numel() for parameter in _parameters(unet, adapter))
    return f"rank {rank}, alpha {alpha}, scale {scale}, {len(layers)} modules, {parameters} parameters"


@contextmanager
def using(unet: UNet2DConditionModel, which: Literal["base", "reference", "policy"]) -> Iterator[None]:
    """Inside, the UNet is the untouched base, the reference (the base when there is no such adapter) or the policy.

    Base and reference run without dropout; the policy keeps the mode it has, so call `unet.eval()` before drawing
    pictures with it. Gradients stay the caller's matter. On leaving, also by an exception, the former state is back;
    contexts may be nested.
    """
    from peft.tuners.lora import LoraLayer
    from torch import nn

    if which == "reference" and which not in getattr(unet, "peft_config", {}):
        which = "base"
    if which != "base":
        _config(unet, which)
    modules = list(unet.modules())
    layers = [module for module in modules if isinstance(module, LoraLayer)]
    states = [(layer, layer._active_adapter, layer._disable_adapters) for layer in layers]
    dropouts = [module for module in modules if isinstance(module, nn.Dropout) and module.p > 0 and module.training]
    try:
        # peft's own switches set and clear requires_grad as they go; these two attributes are all a forward pass reads
        for layer in layers:
            layer._active_adapter = [which]
            layer._disable_adapters = which == "base"
        if which != "policy":
            for dropout in dropouts:
                dropout.training = False
        yield
    finally:
        for layer, active, disabled in states:
            layer._active_adapter, layer._disable_adapters = active, disabled
        for dropout in dropouts:
            dropout.training = True


def reference(unet: UNet2DConditionModel) -> AbstractContextManager[None]:
    """`using(unet, "reference")`: what the policy is measured against."""
    return using(unet, "reference")


def policy_parameters(unet: UNet2DConditionModel) -> list[nn.Parameter]:
    """The trainable parameters, in the order of the UNet's modules."""
    return _parameters(unet, "policy")


def adapter_state(unet: UNet2DConditionModel, adapter: str = "policy") -> dict[str, Tensor]:
    """A copy of an adapter's tensors, named `<module>.lora_A.weight` and `<module>.lora_B.weight`.

    A is (r, in) for linear modules and (r, in, k, k) for convolutions; B is (out, r) and (out, r, 1, 1).
    """
    from peft import get_peft_model_state_dict

    _config(unet, adapter)
    return {key: value.detach().clone() for key, value in get_peft_model_state_dict(unet, adapter_name=adapter).items()}


def load_adapter_state(unet: UNet2DConditionModel, adapter: str, state: Mapping[str, Tensor]) -> None:
    """Copy tensors named as by `adapter_state` into an attached adapter.

    Raises:
        UserError: when a tensor is missing, unknown or of another shape; the adapter is then unchanged.
    """
    from peft import set_peft_model_state_dict

    expected = adapter_state(unet, adapter)
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
    set_peft_model_state_dict(unet, dict(state), adapter)


def save_diffusers(unet: UNet2DConditionModel, folder: str | Path, adapter: str = "policy") -> Path:
    """Write an adapter as `<folder>/pytorch_lora_weights.safetensors`, with ranks and alphas in the metadata.

    The file appears whole or not at all; when writing fails, a former one stays.

    Raises:
        UserError: when the file cannot be written.
    """
    from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin

    state = adapter_state(unet, adapter)
    config = _config(unet, adapter)
    # only what decides the strength: a peft of another version refuses the settings that it does not know
    metadata = {name: getattr(config, name) for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern")}
    metadata["target_modules"] = sorted(config.target_modules or [])
    path = Path(folder, WEIGHTS_NAME)
    with _replacing(path) as temporary:
        # peft's own names: of a file that mixes them with `to_q.lora.down`, diffusers 0.42 reads one kind only
        StableDiffusionLoraLoaderMixin.save_lora_weights(
            temporary.parent,
            unet_lora_layers=state,  # pyright: ignore[reportArgumentType]
            unet_lora_adapter_metadata=metadata,
            weight_name=temporary.name,
        )
    return path


def save_kohya(
    unet: UNet2DConditionModel,
    path: str | Path,
    *,
    base_model_version: BaseModelVersion = "sd_v1",
    title: str | None = None,
    resolution: int | None = None,
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon",
    extra: Mapping[str, str] | None = None,
    adapter: str = "policy",
) -> Path:
    """Write an adapter in Kohya form, for ComfyUI, A1111 and InvokeAI, with its alphas and metadata.

    Alphas that diffusers would misread are replaced by one for all modules, and B is scaled to make up for it. The file
    appears whole or not at all; when writing fails, a former one stays.

    Args:
        path: the file, ending in .safetensors.
        base_model_version: what the LoRA is for, in Kohya's words.
        title: the name shown to users; None means the file's name.
        resolution: side of the training pictures in pixels, when known.
        prediction_type: the base scheduler's, in diffusers' words.
        extra: further metadata, such as `ss_seed`, `ss_steps`, `ss_learning_rate`; overrides what is written by itself.

    Raises:
        UserError: when `base_model_version` is unknown or the file cannot be written.
    """
    import torch
    from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
    from safetensors.torch import save_file

    if base_model_version not in ARCHITECTURES:
        raise UserError(f"base_model_version must be one of {', '.join(ARCHITECTURES)}, got {base_model_version!r}")
    path = Path(path)
    config = _config(unet, adapter)
    state = convert_state_dict_to_kohya({f"unet.{key}": value for key, value in adapter_state(unet, adapter).items()})
    alphas = {module: layer.lora_alpha[adapter] for module, layer in _layers(unet, adapter).items()}
    written = _alphas_every_loader_reads(alphas)
    for module, alpha in alphas.items():
        name = f"lora_unet_{module.replace('.', '_')}"
        state[f"{name}.alpha"] = torch.tensor(float(written[module]))
        if alpha != written[module]:
            state[f"{name}.lora_up.weight"] *= alpha / written[module]

    metadata = {
        "ss_v2": str(base_model_version.startswith("sd_v2")),
        "ss_base_model_version": base_model_version,
        "ss_network_module": "networks.lora",
        "ss_network_dim": "Dynamic" if config.rank_pattern else str(config.r),
        "ss_network_alpha": "Dynamic" if len(set(written.values())) > 1 else f"{next(iter(written.values())):g}",
        "ss_network_args": "{}",
        "ss_output_name": path.stem,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": ARCHITECTURES[base_model_version],
        "modelspec.implementation": "diffusers",
        "modelspec.title": title or path.stem,
        "modelspec.date": datetime.now(UTC).isoformat(timespec="seconds"),
        "modelspec.prediction_type": {"epsilon": "epsilon", "v_prediction": "v"}[prediction_type],
    }
    if resolution is not None:
        metadata["ss_resolution"] = f"({resolution}, {resolution})"
        metadata["modelspec.resolution"] = f"{resolution}x{resolution}"
    with _replacing(path) as temporary:
        save_file(state, temporary, metadata=metadata | dict(extra or {}))
    return path


@dataclass(frozen=True)
class LoRAFile:
    """A UNet's LoRA as read from a file.

    Args:
        path: the file.
        format: the form it was written in.
        state: tensors named as by `adapter_state`, in the file's precision.
        rank: the rank of most modules; `rank_pattern` holds the others, by module.
        alpha: the alpha of most modules; `alpha_pattern` holds the others, by module.
        metadata: the file's header, strings only.
    """

    path: Path
    format: Form
    state: dict[str, Tensor]
    rank: int
    alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    metadata: dict[str, str]

    @property
    def modules(self) -> list[str]:
        """Dotted names of the adapted modules."""
        return [key.removesuffix(".lora_A.weight") for key in self.state if key.endswith(".lora_A.weight")]


def find_lora(path: str | Path) -> Path:
    """The LoRA file that a path means, its header read.

    Args:
        path: a .safetensors file, or the folder of a run.

    Raises:
        UserError: as `read_lora`.
    """
    path = _locate(path)
    _read_header(path)
    return path


def read_lora(path: str | Path) -> LoRAFile:
    """Read a LoRA in diffusers form or in Kohya form (diffusers names, or SDXL's sgm names).

    Without a stated alpha a module's alpha is its rank, as every loader takes it.

    Args:
        path: a .safetensors file, or the folder of a run.

    Raises:
        UserError: when the file is missing, empty, corrupt or a pickle, is no LoRA, or holds what is not trained here
            (text encoders, DoRA, LoHa, LoKr).
    """
    from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
    from peft.utils.other import get_pattern_key

    path = _locate(path)
    form, metadata = _read_header(path)
    try:
        loaded: Any = StableDiffusionLoraLoaderMixin.lora_state_dict(
            str(path),
            use_safetensors=True,
            local_files_only=True,
            return_lora_metadata=True,
            unet_config=SimpleNamespace(layers_per_block=2),  # of every Stable Diffusion; read for sgm names only
        )
    except (ValueError, IndexError) as error:
        raise UserError(f"{path} names modules that no Stable Diffusion has: {error}") from error
    tensors, network_alphas, adapter_metadata = loaded

    def dotted(named: Mapping[str, Any]) -> dict[str, Any]:
        return convert_unet_state_dict_to_peft({key.removeprefix("unet."): value for key, value in named.items()})

    state = dotted(tensors)
    for key, tensor in state.items():
        if tensor.ndim < 2 or not tensor.is_floating_point() or not tensor.numel() or not tensor.isfinite().all():
            raise UserError(f"{path}: {key} is no matrix of finite numbers ({tensor.dtype}, {tuple(tensor.shape)})")
    ranks = {key.removesuffix(".lora_A.weight"): len(a) for key, a in state.items() if key.endswith(".lora_A.weight")}
    stated = {key.removesuffix(".alpha"): alpha for key, alpha in (network_alphas or {}).items()}
    alphas = {key.removesuffix(".lora_A.weight"): alpha for key, alpha in dotted(stated).items()}
    if adapter_metadata:
        config = {key.removeprefix("unet."): value for key, value in adapter_metadata.items()}
        pattern = config.get("alpha_pattern") or {}
        for module, rank in ranks.items():
            alpha = pattern.get(get_pattern_key(list(pattern), module), config.get("lora_alpha", rank))
            # rank-stabilised LoRA divides by the root of the rank
            alphas[module] = alpha * math.sqrt(rank) if config.get("use_rslora") else alpha
    rank, rank_pattern = _most_common(ranks)
    if any(not 0 < float(alpha) < math.inf for alpha in alphas.values()):
        raise UserError(f"{path} has an alpha that is not positive: it would change nothing")
    alpha, alpha_pattern = _most_common({module: float(alphas.get(module, rank)) for module, rank in ranks.items()})
    return LoRAFile(path, form, state, rank, alpha, rank_pattern, alpha_pattern, metadata)


def _config(unet: UNet2DConditionModel, adapter: str) -> LoraConfig:
    attached = getattr(unet, "peft_config", {})
    if adapter not in attached:
        raise ValueError(f"this UNet has no adapter '{adapter}' (attached: {[*attached]}): call LoRA(...).attach first")
    return attached[adapter]


def _layers(unet: UNet2DConditionModel, adapter: str) -> dict[str, LoraLayer]:
    from peft.tuners.lora import LoraLayer

    _config(unet, adapter)
    return {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.lora_A
    }


def _parameters(unet: UNet2DConditionModel, adapter: str) -> list[nn.Parameter]:
    halves = [half for layer in _layers(unet, adapter).values() for half in (layer.lora_A, layer.lora_B)]
    return [parameter for half in halves for parameter in half[adapter].parameters()]


def _settings(file: LoRAFile) -> dict[str, Any]:
    return {
        "r": file.rank,
        "lora_alpha": file.alpha,
        "target_modules": file.modules,
        "rank_pattern": file.rank_pattern,
        "alpha_pattern": file.alpha_pattern,
    }


def _add_adapter(unet: UNet2DConditionModel, name: str, settings: dict[str, Any], dropout: float, seed: int) -> None:
    import torch
    from peft import LoraConfig
    from peft.functional import cast_adapter_dtype

    # peft draws from the global generator, on the CPU
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # policy beside reference
        torch.default_generator.manual_seed(seed)
        unet.add_adapter(LoraConfig(**settings, lora_dropout=dropout), name)
    cast_adapter_dtype(unet, name)
    unet.train(unet.training)  # new dropouts start in training mode, whatever the UNet's


def _adaptable(unet: UNet2DConditionModel) -> dict[str, nn.Linear | nn.Conv2d]:
    from torch import nn

    return {name: module for name, module in unet.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}


def _match(unet: UNet2DConditionModel, targets: list[str]) -> set[str]:
    adaptable = set(_adaptable(unet))
    matched: set[str] = set()
    for target in targets:
        names = {name for name, _ in unet.named_modules() if f".{name}".endswith(f".{target}")}
        if not names or not names <= adaptable:
            paths = [name.split(".") for name in adaptable]
            suffixes = {".".join(path[-n:]) for path in paths for n in range(1, 5) if not path[-n:][0].isdigit()}
            nearest = get_close_matches(target, sorted(suffixes), 3, 0.3) or sorted(suffixes)[:3]
            problem = "names no linear or convolution module" if names else "matches no module"
            raise UserError(f"target_modules: '{target}' {problem} of this UNet; nearest: {', '.join(nearest)}")
        matched |= names
    return matched


def _check_base(unet: UNet2DConditionModel, file: LoRAFile) -> None:
    from torch import nn

    adaptable = _adaptable(unet)
    unknown, misshaped = [], []
    for name in file.modules:
        down, up = (list(file.state[f"{name}.lora_{half}.weight"].shape) for half in "AB")
        module, rank = adaptable.get(name), down[0]
        if module is None:
            unknown.append(name)
        elif isinstance(module, nn.Linear):
            if (down, up) != ([rank, module.in_features], [module.out_features, rank]):
                misshaped.append(name)
        elif (down, up) != ([rank, module.in_channels, *module.kernel_size], [module.out_channels, rank, 1, 1]):
            misshaped.append(name)
    if not unknown and not misshaped:
        return
    complaints = [
        f"{len(names)} of {len(file.modules)} modules {what} (first: {names[0]})"
        for what, names in (("are unknown to this UNet", unknown), ("have another shape", misshaped))
        if names
    ]
    widths = [file.state[f"{name}.lora_A.weight"].shape[1] for name in file.modules if name.endswith("attn2.to_k")]
    own = unet.config["cross_attention_dim"]
    looks = f"; it looks like {_family(widths[0])}, this UNet is {_family(own)}" if widths else ""
    raise UserError(f"{file.path} was made for another base: {', '.join(complaints)}{looks}")


def _family(width: int) -> str:
    return f"{_FAMILIES.get(width, 'a small model')} (cross-attention width {width})"


def _most_common(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {module: value for module, value in values.items() if value != common}


def _alphas_every_loader_reads(alphas: dict[str, float]) -> dict[str, float]:
    """The alphas to write: the true ones, or one for all where diffusers would misread them.

    diffusers 0.42 gives attention projections of a Kohya file its most common alpha, whatever theirs is.
    """
    (common, count), *others = Counter(alphas.values()).most_common()
    attention = [alpha for module, alpha in alphas.items() if module.endswith(tuple(f".{name}" for name in ATTENTION))]
    clear = not others or others[0][1] < count
    if clear and all(alpha == common for alpha in attention):
        return alphas
    return dict.fromkeys(alphas, common)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    from safetensors import SafetensorError

    try:
        with replacing(path) as temporary:
            yield temporary
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {error}") from error


def _locate(path: str | Path) -> Path:
    if not str(path):
        raise UserError("the path of the LoRA is empty: name a .safetensors file or a run folder")
    path = Path(path).expanduser()
    if path.is_dir():
        inside = [path / "lora" / WEIGHTS_NAME, path / WEIGHTS_NAME]
        found = next((file for file in inside if file.is_file()), None)
        if found is None:
            raise UserError(f"{path} is a folder without lora/{WEIGHTS_NAME}: name a .safetensors file or a run folder")
        return found
    if not path.is_file():
        folder = path.parent
        names = sorted(os.listdir(folder)) if folder.is_dir() else []
        nearest = get_close_matches(path.name, names, 1)
        where = "that folder does not exist" if not folder.is_dir() else "nothing in that folder has a similar name"
        raise UserError(f"{path} does not exist; " + (f"nearest: {folder / nearest[0]}" if nearest else where))
    return path


_KEYS: dict[Form, re.Pattern[str]] = {
    "diffusers": re.compile(r"(.+?)(?:\.lora_[AB]|[._]lora\.(?:down|up))\.weight"),
    "kohya": re.compile(r"(lora_unet_[^.]+)\.(?:lora_(?:down|up)\.weight|alpha)"),
}


def _read_header(path: Path) -> tuple[Form, dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    with open(path, "rb") as file:
        start = file.read(9)
    if not start:
        raise UserError(f"{path} is empty")
    # eight bytes of length and a brace open a safetensors file, whatever it is called
    if not start.endswith(b"{") and (
        path.suffix in {".pt", ".pth", ".ckpt", ".bin", ".pkl"} or start.startswith((b"PK\x03\x04", b"\x80"))
    ):
        raise UserError(
            f"{path} is a pickle, which can run any code when it is opened, so it is not read here. Convert it once: "
            'python -c "import torch, safetensors.torch as s; '
            f"s.save_file(torch.load('{path}', weights_only=True), '{path.with_suffix('.safetensors')}')\""
        )
    try:
        with safe_open(path, framework="numpy") as file:
            keys, metadata = sorted(file.keys()), file.metadata() or {}
            settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
            numbers = [settings.get(f"{part}lora_alpha", 1) for part in ("", "unet.")]
            if not all(isinstance(number, int | float) for number in numbers):
                raise ValueError(f"lora_alpha is {numbers}")
    except (SafetensorError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is corrupt or no safetensors file ({error}): fetch or export it again") from error
    return _check_keys(path, keys), metadata


def _check_keys(path: Path, keys: list[str]) -> Form:
    def complain(what: str, named: list[str]) -> None:
        if named:
            raise UserError(f"{path} {what}: {len(named)} of {len(keys)} tensors (first: {named[0]})")

    if not keys:
        raise UserError(f"{path} holds no tensors")
    text_encoder = [key for key in keys if key.startswith(("text_encoder", "lora_te"))]
    form: Form = "kohya" if any(key.startswith("lora_unet_") for key in keys) else "diffusers"
    found = {key: match[1] for key in keys if (match := _KEYS[form].fullmatch(key))}
    if not found and not text_encoder:
        complain("is no LoRA in diffusers or Kohya form", keys)
    complain("also adapts text encoders, and its UNet part alone would draw other pictures", text_encoder)
    complain("holds more than a LoRA in one form (DoRA, LoHa, LoKr, …)", [key for key in keys if key not in found])
    halves = Counter(module for key, module in found.items() if not key.endswith(".alpha"))
    complain("lacks the other half of a pair", [key for key, module in found.items() if halves[module] != 2])
    if form == "kohya":
        sgm = [key for key in keys if re.search("input_blocks|middle_block|output_blocks", key)]
        if len(sgm) != len(keys):  # diffusers would drop the sgm ones silently
            complain("mixes sgm names with diffusers names", sgm)
    return form
