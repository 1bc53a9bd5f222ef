"""Which base model is loaded: a repository on the Hub, a diffusers folder or a single file."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_sd.errors import UserError
from dpo_sd.files.hashes import sha256
from dpo_sd.files.tensors import HeaderError, read_header
from dpo_sd.models.families import REPOSITORIES, SHAPES, TINY, WIDTHS, family_of
from dpo_sd.models.hub import hub_errors, quiet_libraries, snapshot
from dpo_sd.models.stable_diffusion import Fingerprints, StableDiffusion

if TYPE_CHECKING:
    import torch
    from diffusers import DDPMScheduler

    from dpo_sd.losses import PredictionType
    from dpo_sd.models.families import Family
    from dpo_sd.models.quantization import Weights

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
# by whose width a single file is told: cross-attention of the first block that has any
_CROSS_ATTENTION = re.compile(
    r"model\.diffusion_model\.input_blocks\.\d+\.1\.transformer_blocks\.0\.attn2\.to_k\.weight"
)
_WEIGHTS = re.compile(  # their files in a diffusers folder, and the variant
    r"(?:diffusion_pytorch_|pytorch_)?model(?:-\d+-of-\d+)?(?:\.(\w+?))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
)


class Base:
    """Which base model to load.

    Args:
        name: the family; it names what the exported LoRAs say they were made for, and is checked against the files.
        path: repository on the Hub, diffusers folder, or single .safetensors file in Stability's layout; None takes
            the family's own repository, or for `tiny` the pipeline that ships with the package.
        revision: branch, tag or commit of a repository; None takes its main branch.
        variant: which weights to prefer where there are several, such as fp16; others are taken, and it is said, where
            a part has none of these.
        config: for a single file, the repository or diffusers folder with the vocabulary and the settings that it
            lacks; None takes the family's own repository, of which only these small files are fetched.
        vae: another VAE: repository, folder or single file.
        prediction_type: of a model whose files do not say it; None takes what they say.
        zero_terminal_snr: whether the schedule ends in pure noise (Lin et al. 2023, arXiv:2305.08891); None takes what
            the files say.
        pickle: lets .ckpt and .bin files be read, with torch's unpickler for weights only.

    Raises:
        UserError: when a path cannot be what it should be.
    """

    def __init__(
        self,
        name: Family = "tiny",
        path: str | None = None,
        revision: str | None = None,
        variant: str | None = None,
        config: str | None = None,
        vae: str | None = None,
        prediction_type: PredictionType | None = None,
        zero_terminal_snr: bool | None = None,
        pickle: bool = False,
    ):
        self.name: Family = name
        self.path = str(TINY) if path is None and name == "tiny" else path or REPOSITORIES[name]
        self.revision, self.variant, self.vae = revision, variant, vae
        self.config = config or REPOSITORIES.get(name)
        self.prediction_type, self.zero_terminal_snr = prediction_type, zero_terminal_snr
        self.pickle = pickle
        self.notes: list[str] = []
        for key, where in (("path", self.path), ("config", config), ("vae", vae)):
            if where is not None:
                self._check_place(key, where)
        if prediction_type == "epsilon" and zero_terminal_snr:
            raise UserError(
                "zero_terminal_snr needs prediction_type=v_prediction: pure noise says nothing of the noise"
            )

    def _check_place(self, key: str, where: str) -> None:
        local = Path(where).expanduser()
        if local.suffix in PICKLES and not self.pickle:
            raise UserError(
                f"model.{key}={where} is a pickle, which can run code when it is opened: use a .safetensors file, "
                "trust it with model.pickle=true, or write a safe copy of it once: "
                f"python -m dpo_sd.export format=merged model={self.name} model.{key}={where} model.pickle=true "
                "out=<folder>"
            )
        if local.is_dir() and key != "vae":
            if not (local / "model_index.json").is_file():
                if any((local / name).exists() for name in ("lora", "adapter_config.json", "unet/adapter_config.json")):
                    raise UserError(
                        f"model.{key}={where} is a LoRA, not a model: give it as lora.init_from, or as loras= of "
                        "generate"
                    )
                raise UserError(f"model.{key}={where}: no diffusers pipeline there (a folder with a model_index.json)")
            if missing := [part for part in self._parts if not (local / part).is_dir()]:
                raise UserError(f"model.{key}={where} lacks {', '.join(missing)}: copy the whole pipeline folder")
        elif local.is_file():
            if key == "path" and local.suffix not in PICKLES:
                self._check_family(_family_of_file(local), where)
        elif not local.exists() and (
            local.suffix in (".safetensors", *PICKLES) or not re.fullmatch(r"[\w.-]+/[\w.-]+", where)
        ):
            raise UserError(
                f"model.{key}={where}: there is no such folder or file, and a repository on the Hub is written "
                f"owner/name, as {REPOSITORIES['sd15']}"
            )
        if local.is_dir() and key == "path":
            self._check_family(_family_of_folder(local), where)

    def _check_family(self, found: Family | None, where: str) -> None:
        if found is not None and found != self.name:
            raise UserError(f"{where} is of the family {found}: use model={found} model.path={where}")

    @property
    def _parts(self) -> list[str]:
        parts = ["unet", "vae", "text_encoder", "tokenizer", "scheduler"]
        return [*parts, "text_encoder_2", "tokenizer_2"] if self.name == "sdxl" else parts

    def files(self) -> Path:
        """The diffusers folder or single file that the weights are read from, fetched first if it lies on the Hub.

        Raises:
            UserError: when it cannot be fetched.
        """
        local = Path(self.path).expanduser()
        return local if local.exists() else self._fetched(self.path, self._parts)

    def _fetched(self, repository: str, parts: Sequence[str]) -> Path:
        """The folder that holds these parts of a repository on the Hub."""
        from diffusers import DiffusionPipeline

        left_out = {name: None for name in ("safety_checker", "feature_extractor", "image_encoder")}
        left_out |= {name: None for name in self._parts if name not in parts}

        def fetch(variant: str | None) -> Path:
            safe = None if self.pickle else True
            folder = DiffusionPipeline.download(
                repository, revision=self.revision, variant=variant, use_safetensors=safe, **left_out
            )
            return Path(folder)

        quiet_libraries()
        with hub_errors(repository):
            if self.variant is not None:
                try:
                    return fetch(self.variant)
                except ValueError:
                    self.notes.append(f"{repository} has no variant {self.variant}: its plain weights are taken")
            return fetch(None)

    def fingerprints(self) -> Fingerprints:
        """Hashes of the files, fetched first if they lie on the Hub.

        Raises:
            UserError: when they cannot be fetched.
        """
        where = self.files()
        overrides = json.dumps([self.prediction_type, self.zero_terminal_snr])
        if where.is_file():
            settings = self._settings()
            parts = {part: _hash_of([where, *self._read_from(settings / part)]) for part in self._parts}
        else:
            parts = {part: _hash_of(self._read_from(where / part)) for part in self._parts}
        if self.vae is not None:
            place = self._vae_place(self.vae)
            parts["vae"] = _hash_of([place] if place.is_file() else self._read_from(place))

        def together(*names: str) -> str:
            known = {name: value for name, value in parts.items() if name in names}
            return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]

        whole = hashlib.sha256(f"{overrides} {together(*parts)}".encode()).hexdigest()[:16]
        text = together("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
        return Fingerprints(whole, together("vae"), text)

    def load(self, weights: Weights = "float32") -> StableDiffusion:
        """Loads all parts, frozen, the UNet in the precision `weights` and the small parts in fp32, on the CPU.

        int8 and nf4 are for the UNet's linear layers; the rest of it is bfloat16.

        Raises:
            UserError: when a part cannot be fetched or loaded, the files are of another family, or the UNet predicts
                neither noise nor velocity.
        """
        import torch

        from dpo_sd.models.quantization import QUANTISED, quantise

        quiet_libraries()
        where = self.files()
        dtype = torch.bfloat16 if weights in QUANTISED else getattr(torch, weights)
        parts = self._from_folder(where, dtype) if where.is_dir() else self._from_single_file(where, dtype)
        if weights in QUANTISED:
            quantise(parts["unet"], weights)
        if self.vae is not None:
            parts["vae"] = self._other_vae(self.vae)
        for network in (parts[name] for name in self._parts if name.startswith(("unet", "vae", "text_encoder"))):
            network.eval().requires_grad_(False)
        suffixes = ("", "_2") if self.name == "sdxl" else ("",)
        model = StableDiffusion(
            name=self.name,
            unet=parts["unet"],
            vae=parts["vae"],
            text_encoders=[parts[f"text_encoder{suffix}"] for suffix in suffixes],
            tokenizers=[parts[f"tokenizer{suffix}"] for suffix in suffixes],
            noise_scheduler=self._schedule(parts["scheduler"]),
            fingerprints=self.fingerprints(),
        )
        self._check_family(family_of(model.unet.config), self.path)
        return model

    def _schedule(self, scheduler: Any) -> DDPMScheduler:
        """The training schedule, as the files say or as the settings override it."""
        from diffusers import DDPMScheduler

        config = dict(scheduler.config)
        if self.prediction_type is not None:
            config["prediction_type"] = self.prediction_type
        if self.zero_terminal_snr is not None:
            config["rescale_betas_zero_snr"] = self.zero_terminal_snr
        schedule: Any = DDPMScheduler.from_config(config)
        prediction_type = schedule.config["prediction_type"]
        if prediction_type not in ("epsilon", "v_prediction"):
            raise UserError(f"{self.path} predicts {prediction_type!r}: only epsilon and v_prediction can be trained")
        if schedule.config["rescale_betas_zero_snr"] and prediction_type == "epsilon":
            raise UserError(
                f"{self.path} has a schedule that ends in pure noise, from which noise cannot be predicted: "
                "use model.prediction_type=v_prediction, or model.zero_terminal_snr=false"
            )
        return schedule

    def _from_folder(self, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
        import diffusers
        import transformers

        def part(cls: Any, name: str, **how: Any) -> Any:
            with _loading(folder / name):
                settings = json.loads((folder / name / "config.json").read_text()) if how else {}
                if settings.get("_class_name", cls.__name__) != cls.__name__:
                    raise ValueError(f"it is a {settings['_class_name']}, not a {cls.__name__}")
                if how:
                    how |= {"variant": self._variant(folder / name), "use_safetensors": None if self.pickle else True}
                return cls.from_pretrained(folder / name, local_files_only=True, **how)

        parts = {
            "scheduler": part(diffusers.DDPMScheduler, "scheduler"),
            "unet": part(diffusers.UNet2DConditionModel, "unet", torch_dtype=dtype),
            "vae": part(diffusers.AutoencoderKL, "vae", torch_dtype=_float32()),
            "text_encoder": part(transformers.CLIPTextModel, "text_encoder", torch_dtype=_float32()),
            "tokenizer": part(transformers.CLIPTokenizer, "tokenizer"),
        }
        if self.name == "sdxl":
            parts["text_encoder_2"] = part(
                transformers.CLIPTextModelWithProjection, "text_encoder_2", torch_dtype=_float32()
            )
            parts["tokenizer_2"] = part(transformers.CLIPTokenizer, "tokenizer_2")
        return parts

    def _variants(self, folder: Path) -> dict[str, list[Path]]:
        """The files with weights in a part's folder by their variant, "" of the plain ones."""
        found: dict[str, list[Path]] = {}
        for ending in (".safetensors", ".bin") if self.pickle else (".safetensors",):
            for file in sorted(folder.glob(f"*{ending}")):
                if match := _WEIGHTS.fullmatch(file.name):
                    found.setdefault(match[1] or "", []).append(file)
            if found:
                break
        return found

    def _taken(self, found: Mapping[str, list[Path]]) -> str:
        wanted = self.variant or ""
        return wanted if wanted in found or not found else sorted(found)[0]  # the plain ones come first

    def _variant(self, folder: Path) -> str | None:
        """The variant of the weights to read in a part's folder; None for the plain ones."""
        found = self._variants(folder)
        taken = self._taken(found)
        if taken != (self.variant or ""):
            lacking = f"variant {self.variant}" if self.variant else "plain weights"
            self.notes.append(f"{folder} has no {lacking}: {f'variant {taken}' if taken else 'plain weights'} taken")
        return taken or None

    def _read_from(self, folder: Path) -> list[Path]:
        """The files of a part's folder that decide what it does: other variants lie beside them and change nothing."""
        found = self._variants(folder)
        settings = [
            file
            for file in folder.iterdir()
            if file.suffix in (".json", ".txt", ".model") and ".index." not in file.name
        ]
        return [*settings, *found.get(self._taken(found), [])]

    def _from_single_file(self, file: Path, dtype: torch.dtype) -> dict[str, Any]:
        from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

        where = self._settings()
        pipeline_class: Any = StableDiffusionXLPipeline if self.name == "sdxl" else StableDiffusionPipeline
        with _loading(file):
            pipeline = pipeline_class.from_single_file(
                file, config=str(where), local_files_only=True, safety_checker=None, feature_extractor=None
            )
        parts = {name: getattr(pipeline, name) for name in self._parts}
        parts["unet"].to(dtype)
        return parts

    def _settings(self) -> Path:
        """The folder with the settings and the vocabulary of a single file, fetched first if it lies on the Hub."""
        if self.config is None:
            raise UserError(f"model.path={self.path} is a single file: use model=sd15, sd21 or sdxl")
        local = Path(self.config).expanduser()
        return local if local.is_dir() else snapshot(self.config, ["model_index.json", "*/*.json", "*/*.txt"])

    def _vae_place(self, where: str) -> Path:
        """The file or the folder of another VAE, fetched first if it lies on the Hub."""
        local = Path(where).expanduser()
        if not local.exists():
            names = ["config.json", "diffusion_pytorch_model*.safetensors"]
            local = snapshot(where, [*names, *(f"vae/{name}" for name in names)])
        return local / "vae" if (local / "vae").is_dir() else local

    def _other_vae(self, where: str) -> Any:
        from diffusers import AutoencoderKL

        place, how = self._vae_place(where), {"local_files_only": True, "torch_dtype": _float32()}
        with _loading(place):
            if place.is_dir():
                return AutoencoderKL.from_pretrained(place, variant=self._variant(place), use_safetensors=True, **how)
            own = self.files() / "vae"
            return AutoencoderKL.from_single_file(
                str(place), config=str(own if own.is_dir() else SHAPES / self.name / "vae"), **how
            )


def _hash_of(files: Iterable[Path]) -> str:
    """Hash of the names and contents of files."""
    wanted = sorted(files, key=lambda file: file.name)
    known = json.dumps([[file.name, sha256(file)] for file in wanted])
    return hashlib.sha256(known.encode()).hexdigest()


def _float32() -> torch.dtype:
    import torch

    return torch.float32


def _family_of_folder(folder: Path) -> Family | None:
    try:
        return family_of(json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None  # loading says what is wrong with it


def _family_of_file(file: Path) -> Family | None:
    """The family of a single file in Stability's layout, by the shapes in its header.

    Raises:
        UserError: when it is no safetensors file, or no whole model.
    """
    try:
        shapes = read_header(file).shapes
    except (OSError, HeaderError) as error:
        raise UserError(f"{file} is no safetensors file, or damaged ({error}): fetch it again") from error
    if any(".lora_" in key or key.startswith("lora_") for key in shapes):
        raise UserError(f"{file} is a LoRA, not a model: give it as lora.init_from, or as loras= of generate")
    widths = {shape[-1] for key, shape in shapes.items() if _CROSS_ATTENTION.fullmatch(key)}
    if not widths:
        raise UserError(f"{file} holds no Stable Diffusion 1, 2 or XL in Stability's layout: use such a checkpoint")
    if any(key.startswith("conditioner.embedders.1.") for key in shapes):
        return "sdxl"
    return WIDTHS.get(widths.pop())


@contextmanager
def _loading(what: Path) -> Iterator[None]:
    """Turns what goes wrong in loading a file into one line."""
    from diffusers.loaders.single_file_utils import SingleFileComponentError
    from safetensors import SafetensorError

    damage = (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError, SingleFileComponentError)
    try:
        yield
    except UserError:
        raise
    except damage as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{what} cannot be loaded: {reason}") from error
