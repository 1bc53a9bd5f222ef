"""The base model of a composition: a repository on the Hub, a diffusers folder or a single file."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_sd.errors import UserError
from dpo_sd.models.contents import (
    Told,
    check_family_of_file,
    check_family_of_folder,
    check_file,
    check_folder,
    check_settings,
    check_vae_place,
    header_of,
    told,
)
from dpo_sd.models.families import FAMILIES, SHIPPED, FamilyName
from dpo_sd.models.files import HALF, PLAIN, WeightFiles, fingerprints, settings_among
from dpo_sd.models.hub import offline, quiet_libraries, snapshot, to_fetch
from dpo_sd.models.places import PICKLES, check_layout, check_place
from dpo_sd.models.stable_diffusion import Fingerprints, StableDiffusion

if TYPE_CHECKING:
    import torch
    from diffusers import DDPMScheduler

    from dpo_sd.losses import PredictionType
    from dpo_sd.models.quantization import Weights

_INSTEAD = {  # what can stand in the place of a repository, by the setting that takes it
    "path": "a diffusers folder or a single file as model.path",
    "config": "a diffusers folder as model.config",
    "vae": "a folder or a single file as model.vae",
}


class Base:
    """A base model: where it comes from, and what is to be different from its files.

    Args:
        name: the family, which is checked against the files; exported LoRAs say that they are made for it.
        path: repository on the Hub, diffusers folder, or single .safetensors file in Stability's layout; None takes
            the family's own repository, or for `tiny` the pipeline that ships with the package.
        revision: branch, tag or commit of a repository; None takes its main branch.
        variant: which weights to prefer where there are several, such as fp16; where a part has none of these, others
            are taken, and it is said. None prefers those of a repository in half precision where the UNet is stored
            in no more, and the plain ones otherwise; `plain` always prefers these.
        config: for a single file, the repository or diffusers folder with the vocabulary and the settings that it
            lacks, where these are not the family's own, which come with the package.
        vae: another VAE: repository, folder or single file.
        prediction_type: what the UNet predicts, where the files do not say it; None takes what they say.
        zero_terminal_snr: whether the schedule ends in pure noise (Lin et al. 2023, arXiv:2305.08891); None takes what
            the files say.
        max_tokens: tokens of a prompt that are read, a multiple of the 75 that a text encoder takes at once; longer
            prompts are cut. None reads 75. Above, they are read in chunks, and all prompts take the room of the
            longest that there may be.
        clip_skip: the layer of the text encoder that is read, counted from the end as A1111 and Kohya's trainer count:
            None and 1 read the last one, 2 the one before, which many models made from SD 1.5 want.
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
        max_tokens: int | None = None,
        clip_skip: int | None = None,
        pickle: bool = False,
    ):
        self.name: FamilyName = name
        self.family = FAMILIES[name]
        self.path = path or self.family.place
        self.revision, self.vae = revision, vae
        self.config = config
        self.prediction_type: PredictionType | None = prediction_type
        self.zero_terminal_snr = zero_terminal_snr
        self.reading = self.family.reading(max_tokens, clip_skip)
        self.weight_files = WeightFiles(None if variant in ("", PLAIN) else variant, pickle)
        self.halves = not variant and _here(self.path) is None
        self.commit: str | None = None
        self.notes: list[str] = []
        for key, where in (("path", path), ("config", config), ("vae", vae), ("revision", revision)):
            if where is not None and not where.strip():
                raise UserError(f"model.{key} is empty: give it a value, or leave it out")
        for key, where in (("path", self.path), ("config", config), ("vae", vae)):
            if where is not None:
                check_place(key, where, self.family, self._own_parts, pickle)
        if revision is not None and _here(self.path) is not None:
            raise UserError(
                f"model.revision={revision} is of a repository on the Hub, and {self.path} is here: leave it out"
            )
        if prediction_type == "epsilon" and zero_terminal_snr:
            raise UserError(
                "zero_terminal_snr needs prediction_type=v_prediction: pure noise says nothing of the noise"
            )
        local = _here(self.path)
        if local is not None and local.is_dir():
            check_family_of_folder(local, self.family)
        elif local is not None and local.suffix not in PICKLES:
            check_family_of_file(local, self.family)

    def to_fetch(self) -> list[str]:
        """What loading is going to fetch from the Hub, one line for each repository; nothing is fetched for it.

        Raises:
            UserError: if something is not on this computer, and HF_HUB_OFFLINE is set.
        """
        local = _here(self.path)
        lines = []
        if local is None:
            lines += [to_fetch("the weights", self.path, ["unet/config.json"], _INSTEAD["path"], self.revision)]
        elif local.is_file() and self.config is not None and _here(self.config) is None:
            what = f"for {self.path}, the settings and the vocabulary (*/*.json, tokenizer*/*.txt: a few MB)"
            lines += [to_fetch(what, self.config, ["unet/config.json"], _INSTEAD["config"])]
        if self.vae is not None and _here(self.vae) is None:
            lines += [to_fetch("the VAE", self.vae, ["config.json", "vae/config.json"], _INSTEAD["vae"])]
        return [line for line in lines if line is not None]

    def files(self, weights: Weights = "float32") -> Path:
        """The diffusers folder or single file that the weights are read from, fetched first if it lies on the Hub.

        Args:
            weights: as for `load`.

        Raises:
            UserError: if it cannot be fetched.
        """
        return self._found(weights)[0]

    def fingerprints(self, weights: Weights = "float32") -> Fingerprints:
        """Hashes of the files, fetched first if they lie on the Hub.

        Args:
            weights: as for `load`; of a repository, they can decide which variant is taken.

        Raises:
            UserError: if they cannot be fetched.
        """
        where, files = self._found(weights)
        settings, first = (self._settings(), [where]) if where.is_file() else (where, [])
        parts: dict[str, list[Path]] = {}
        for part in self.family.parts:
            if part in self._own_parts:
                parts[part] = [*first, *files.deciding(self.family.place_of(settings, part))]
            else:
                place = self._vae_place(self.vae or "")
                parts[part] = [place] if place.is_file() else self.weight_files.deciding(place)
        return fingerprints(parts, [self.prediction_type, self.zero_terminal_snr], self.reading, self.family)

    def check(self) -> None:
        """Refuses what `load` would refuse, as far as headers and settings on this computer tell it, at once.

        Raises:
            UserError: if the files are not of a base alone, quantised, wrapped, of another schedule, or lack a part.
        """
        local, config = _here(self.path), _here(self.config)
        if local is not None and local.is_dir():
            check_folder(local, self._own_networks, self.family, self.weight_files)
        elif local is not None and local.suffix not in PICKLES:
            check_file(header_of(local), local, self.family, self.vae is None)
        if local is not None and local.is_file() and config is not None:
            check_settings(config, self._own_networks, self.family, "config")
        if self.vae is not None and _here(self.vae) is not None:
            check_vae_place(self._vae_place(self.vae), self.weight_files)

    def check_tensors(self) -> None:
        """Refuses what `load` would refuse, as far as it is told without weights: `check`, and each tensor's name.

        It asks the libraries that would load the files on this computer, which takes seconds.

        Raises:
            UserError: as `load`.
        """
        self.check()
        local = _here(self.path)
        if local is not None and local.suffix not in PICKLES:
            self._read("float32", hollow=True)

    def load(self, weights: Weights = "float32", device: torch.device | str = "cpu") -> StableDiffusion:
        """Loads all parts, frozen, the UNet in the precision `weights` and the small parts in fp32, on the CPU.

        Commands call `models.ready.ready`, which does the rest too.

        Args:
            weights: int8 and nf4 are for the UNet's linear layers; the rest of it is bfloat16 then.
            device: where the networks are going to work.

        Raises:
            UserError: if a part cannot be fetched or loaded, lacks tensors or holds NaN, the files are of another
                family or not of a base alone, or the UNet predicts neither noise nor velocity.
        """
        from dpo_sd.models.quantization import store

        parts = self._read(weights)
        store(parts["unet"], weights)
        return StableDiffusion.of_parts(self.name, parts, self.fingerprints(weights), device, self.reading)

    def schedule(self) -> DDPMScheduler:
        """The training schedule of what `load` loads; only a pickle is read for it as a whole.

        Raises:
            UserError: as `load`.
        """
        from dpo_sd.models.loading import Reader

        where = self.files()
        if where.is_dir():
            return self._schedule(where / "scheduler", None)
        header = Reader(self.family, self.weight_files, "float32", self._note, hollow=True).header(where)
        return self._schedule(self._settings() / "scheduler", told(header, self.family))

    @property
    def _own_parts(self) -> list[str]:
        """The parts that come from `path`, in the order of the family's."""
        return [part for part in self.family.parts if part != "vae" or self.vae is None]

    @property
    def _own_networks(self) -> list[str]:
        return [part for part in self._own_parts if part in (*self.family.networks, "vae")]

    def _read(self, weights: Weights, hollow: bool = False) -> dict[str, Any]:
        """All parts; if hollow, the networks are on the `meta` device, and what is not on this computer is left out."""
        from dpo_sd.models.loading import Reader

        quiet_libraries()
        (where, files), said = self._found(weights), None
        reader = Reader(self.family, files, weights, self._note, hollow)
        settings = where
        if where.is_dir():
            check_folder(where, self._own_networks, self.family, files)
        else:
            settings = self.family.folder if hollow and _here(self.config) is None else self._settings()
            check_settings(settings, self._own_networks, self.family, "config")
            header = reader.header(where)
            check_file(header, where, self.family, self.vae is None)
            said = told(header, self.family)
        places = {name: (where / name if where.is_dir() else where, settings / name) for name in self._own_networks}
        parts = {name: reader.network(name, *place) for name, place in places.items()}
        if self.vae is not None and not (hollow and _here(self.vae) is None):
            place, own = self._vae_place(self.vae), where / "vae"
            check_vae_place(place, self.weight_files)
            other = Reader(self.family, self.weight_files, weights, self._note, hollow)
            parts["vae"] = other.network("vae", place, own if own.is_dir() else self.family.folder / "vae")
        parts |= reader.tokenizers(settings, parts)
        return parts | {"scheduler": self._schedule(settings / "scheduler", said)}

    def _schedule(self, folder: Path, said: Told | None) -> DDPMScheduler:
        """The training schedule as the settings say, or else the single file, or else the files of the schedule."""
        from dpo_sd.models.loading import read_schedule, training_schedule

        schedule, taken = read_schedule(folder), {}
        own = schedule.config
        said = said or Told(own["prediction_type"], own["rescale_betas_zero_snr"], "its scheduler_config.json")
        for key, kept, setting, found in (
            ("prediction_type", "prediction_type", self.prediction_type, said.prediction_type),
            ("zero_terminal_snr", "rescale_betas_zero_snr", self.zero_terminal_snr, said.zero_terminal_snr),
        ):
            if setting is None and found not in (None, schedule.config[kept]):
                self._note(f"{self.path} says by {said.by} that model.{key} is {found}: so it is taken")
            elif None not in (setting, found) and setting != found:
                self._note(
                    f"{self.path} says by {said.by} that model.{key} is {found}: {setting} is taken, as it is set"
                )
            taken[key] = found if setting is None else setting
        return training_schedule(schedule, self.path, **taken)

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def _found(self, weights: Weights) -> tuple[Path, WeightFiles]:
        """The folder or file of the weights, fetched first if it lies on the Hub, and which weights are read from it.

        A repository's are those in half precision where they suffice: the choice depends on the repository and the
        settings alone, unless there is no network and only the others are there.
        """
        local = _here(self.path)
        if local is not None:
            return local, self.weight_files
        if not self.halves or weights == "float32":
            return self._fetched(self.weight_files)
        try:
            folder, files = self._fetched(self.weight_files._replace(variant=HALF))
        except UserError:
            if not offline():
                raise
            found = self._fetched(self.weight_files)
            self._note(f"{self.path}: HF_HUB_OFFLINE is set, and of its weights only the plain ones are here: so taken")
            return found
        if files.variant == HALF:
            said = f"enough for hardware.weights={weights}; model.variant={PLAIN} takes the plain weights"
            self._note(f"{self.path}: its variant {HALF} is taken, {said}")
        return folder, files

    def _fetched(self, files: WeightFiles) -> tuple[Path, WeightFiles]:
        """The folder that holds the parts of a repository on the Hub, settings first, and which weights it has."""
        fetch = partial(snapshot, self.path, ["model_index.json"], instead=_INSTEAD["path"])

        def settings(names: Sequence[str]) -> list[str]:
            check_layout(names, f"model.path={self.path}", self._own_parts)
            return settings_among(names, self.family.parts)

        def weights(names: Sequence[str]) -> list[str]:
            return [file for part in self._own_networks for file in files.needed(names, part)]

        folder = fetch(settings, revision=self.commit or self.revision)  # a branch can move between two calls
        check_family_of_folder(folder, self.family, self.path)
        check_settings(folder, self._own_networks, self.family)
        self.commit = folder.name
        fetch(weights, revision=folder.name)
        if files.variant and not any(files.taken(folder / part)[0] == files.variant for part in self._own_networks):
            self._note(f"{self.path} has no variant {files.variant}: its plain weights are taken")
            files = files._replace(variant=None)
        return folder, files

    def _settings(self) -> Path:
        """The folder with the settings and the vocabulary of a single file, fetched first if it lies on the Hub."""
        if self.config is None:
            if self.family.repository is not None:
                return self.family.folder
            *others, last = [name for name, family in FAMILIES.items() if family.repository]
            raise UserError(f"model.path={self.path} is a single file: use model={', '.join(others)} or {last}")
        local = Path(self.config).expanduser()
        if local.is_dir():
            return local
        wanted = partial(settings_among, parts=self.family.parts)
        return snapshot(self.config, ["model_index.json"], wanted, _INSTEAD["config"])

    def _vae_place(self, where: str) -> Path:
        """The file or the folder of another VAE, fetched first if it lies on the Hub."""
        local = Path(where).expanduser()
        if not local.exists():
            first = ["config.json", "vae/config.json"]
            local = snapshot(where, first, self._files_of_vae, _INSTEAD["vae"])
        return local / "vae" if (local / "vae").is_dir() else local

    def _files_of_vae(self, names: Sequence[str]) -> list[str]:
        return self.weight_files.needed(names, "vae" if "vae/config.json" in names else ".")


def _here(where: str | None) -> Path | None:
    """The folder or file of that name on this computer, if there is one."""
    local = Path(where or "").expanduser()
    return local if where and local.exists() else None
