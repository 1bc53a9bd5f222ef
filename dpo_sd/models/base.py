"""The base model of a composition: a repository on the Hub, a diffusers folder or a single file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_sd.errors import UserError
from dpo_sd.models.families import FAMILIES, SHIPPED, FamilyName, family_of_unet
from dpo_sd.models.files import WeightFiles, fingerprints
from dpo_sd.models.hub import hub_errors, quiet_libraries, snapshot
from dpo_sd.models.places import check_family, check_place
from dpo_sd.models.stable_diffusion import Fingerprints, StableDiffusion

if TYPE_CHECKING:
    import torch

    from dpo_sd.losses import PredictionType
    from dpo_sd.models.quantization import Weights


class Base:
    """A base model: where it comes from, and what is to be different from its files.

    Args:
        name: the family, which is checked against the files; exported LoRAs say that they are made for it.
        path: repository on the Hub, diffusers folder, or single .safetensors file in Stability's layout; None takes
            the family's own repository, or for `tiny` the pipeline that ships with the package.
        revision: branch, tag or commit of a repository; None takes its main branch.
        variant: which weights to prefer where there are several, such as fp16; where a part has none of these, others
            are taken, and it is said.
        config: for a single file, the repository or diffusers folder with the vocabulary and the settings that it
            lacks; None takes the family's own repository, of which only these small files are fetched.
        vae: another VAE: repository, folder or single file.
        prediction_type: what the UNet predicts, where the files do not say it; None takes what they say.
        zero_terminal_snr: whether the schedule ends in pure noise (Lin et al. 2023, arXiv:2305.08891); None takes what
            the files say.
        pickle: lets .ckpt and .bin files be read, with torch's unpickler for weights only.

    Raises:
        UserError: if a path cannot be what it should be.
    """

    def __init__(
        self,
        name: FamilyName = SHIPPED,
        path: str | None = None,
        revision: str | None = None,
        variant: str | None = None,
        config: str | None = None,
        vae: str | None = None,
        prediction_type: PredictionType | None = None,
        zero_terminal_snr: bool | None = None,
        pickle: bool = False,
    ):
        self.name: FamilyName = name
        self.family = FAMILIES[name]
        self.path = path or self.family.place
        self.revision, self.vae = revision, vae
        self.config = config or self.family.repository
        self.prediction_type: PredictionType | None = prediction_type
        self.zero_terminal_snr = zero_terminal_snr
        self.weight_files = WeightFiles(variant or None, pickle)
        self.notes: list[str] = []
        for key, where in (("path", self.path), ("config", config), ("vae", vae)):
            if where is not None:
                check_place(key, where, self.family, pickle)
        if prediction_type == "epsilon" and zero_terminal_snr:
            raise UserError(
                "zero_terminal_snr needs prediction_type=v_prediction: pure noise says nothing of the noise"
            )

    def files(self) -> Path:
        """The diffusers folder or single file that the weights are read from, fetched first if it lies on the Hub.

        Raises:
            UserError: if it cannot be fetched.
        """
        local = Path(self.path).expanduser()
        return local if local.exists() else self._fetched(self.path)

    def fingerprints(self) -> Fingerprints:
        """Hashes of the files, fetched first if they lie on the Hub.

        Raises:
            UserError: if they cannot be fetched.
        """
        where, deciding = self.files(), self.weight_files.deciding
        if where.is_file():
            settings = self._settings()
            parts = {part: [where, *deciding(settings / part)] for part in self.family.parts}
        else:
            parts = {part: deciding(where / part) for part in self.family.parts}
        if self.vae is not None:
            place = _vae_place(self.vae)
            parts["vae"] = [place] if place.is_file() else deciding(place)
        return fingerprints(parts, [self.prediction_type, self.zero_terminal_snr], self.family)

    def load(self, weights: Weights = "float32", device: torch.device | str = "cpu") -> StableDiffusion:
        """Loads all parts, frozen, the UNet in the precision `weights` and the small parts in fp32, on the CPU.

        Commands call `models.ready.ready`, which does the rest too.

        Args:
            weights: int8 and nf4 are for the UNet's linear layers; the rest of it is bfloat16 then.
            device: where the networks are going to work.

        Raises:
            UserError: if a part cannot be fetched or loaded, the files are of another family, or the UNet predicts
                neither noise nor velocity.
        """
        from dpo_sd.models.loading import read_folder, read_single_file, read_vae, training_schedule
        from dpo_sd.models.quantization import store, stored_in

        quiet_libraries()
        where, dtype = self.files(), stored_in(weights)
        if where.is_dir():
            parts = read_folder(where, self.family, dtype, self.weight_files, self._note)
        else:
            parts = read_single_file(where, self._settings(), self.family, dtype)
        check_family(family_of_unet(parts["unet"].config), self.family, self.path)
        if self.vae is not None:
            own = where / "vae" if where.is_dir() else self.family.folder / "vae"
            parts["vae"] = read_vae(_vae_place(self.vae), own, self.weight_files, self._note)
        store(parts["unet"], weights)
        parts["scheduler"] = training_schedule(
            parts["scheduler"], self.path, self.prediction_type, self.zero_terminal_snr
        )
        return StableDiffusion.of_parts(self.name, parts, self.fingerprints(), device)

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def _fetched(self, repository: str) -> Path:
        """The folder that holds the parts of a repository on the Hub."""
        from diffusers import DiffusionPipeline

        left_out = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))

        def fetch(variant: str | None) -> Path:
            safe = None if self.weight_files.pickle else True
            how: dict[str, Any] = {"revision": self.revision, "variant": variant, "use_safetensors": safe}
            return Path(DiffusionPipeline.download(repository, **how, **left_out))

        quiet_libraries()
        wanted = self.weight_files.variant
        with hub_errors(repository):
            if wanted is not None:
                try:
                    return fetch(wanted)
                except ValueError:
                    self._note(f"{repository} has no variant {wanted}: its plain weights are taken")
            return fetch(None)

    def _settings(self) -> Path:
        """The folder with the settings and the vocabulary of a single file, fetched first if it lies on the Hub."""
        if self.config is None:
            *others, last = [name for name, family in FAMILIES.items() if family.repository]
            raise UserError(f"model.path={self.path} is a single file: use model={', '.join(others)} or {last}")
        local = Path(self.config).expanduser()
        return local if local.is_dir() else snapshot(self.config, ["model_index.json", "*/*.json", "*/*.txt"])


def _vae_place(where: str) -> Path:
    """The file or the folder of another VAE, fetched first if it lies on the Hub."""
    local = Path(where).expanduser()
    if not local.exists():
        names = ["config.json", "diffusion_pytorch_model*.safetensors"]
        local = snapshot(where, [*names, *(f"vae/{name}" for name in names)])
    return local / "vae" if (local / "vae").is_dir() else local
