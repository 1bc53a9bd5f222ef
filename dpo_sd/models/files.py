"""The files of a base: which weights are read where there are several, and hashes of all that decides."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dpo_sd.files.hashes import sha256
from dpo_sd.models.families import AS_USUAL, Family, Reading, tokenizer_of
from dpo_sd.models.stable_diffusion import Fingerprints

_WEIGHTS = re.compile(  # names of their files in a diffusers folder; the group is the variant
    r"(?:diffusion_pytorch_|pytorch_)?model(?:-\d+-of-\d+)?(?:\.(\w+?))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
)


HALF = "fp16"  # the variant in half precision, by the name that diffusers' repositories give it
PLAIN = "plain"  # asks for the weights without a variant


class WeightFiles(NamedTuple):
    """Choice of the weights in the folder of a part.

    Args:
        variant: the preferred one, such as fp16; None prefers the plain weights.
        pickle: whether .bin files are read where there is no .safetensors file.
    """

    variant: str | None
    pickle: bool

    def taken(self, folder: Path) -> tuple[str | None, list[Path]]:
        """The variant that is read, None for the plain weights, and its files."""
        variant, names = self.among(file.name for file in folder.glob("*"))
        return variant, [folder / name for name in names]

    def among(self, names: Iterable[str]) -> tuple[str | None, list[str]]:
        """The same by the names of the files in a part's folder."""
        found = self._by_variant(sorted(names))
        wanted = self.variant or ""
        variant = wanted if wanted in found or not found else min(found)  # the plain ones come first
        return variant or None, found.get(variant, [])

    def _by_variant(self, names: Sequence[str]) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for ending in (".safetensors", ".bin") if self.pickle else (".safetensors",):
            for name in names:
                if name.endswith(ending) and (match := _WEIGHTS.fullmatch(name)):
                    found.setdefault(match[1] or "", []).append(name)
            if found:
                break
        return found

    def needed(self, names: Sequence[str], part: str) -> list[str]:
        """The files of a repository that a network is read from: settings, and weights with the index of their parts.

        Args:
            names: of all files, paths below the repository.
            part: the network's folder.
        """
        inside = [name.removeprefix(f"{part}/") for name in names if Path(name).parent == Path(part)]
        weights = self.among(inside)[1]
        index = [name for name in inside if ".index." in name and name.endswith(".json")] if len(weights) > 1 else []
        return [str(Path(part) / name) for name in ("config.json", *weights, *index) if name in inside]

    def deciding(self, folder: Path) -> list[Path]:
        """The files of a part's folder that decide what it does: other variants lie beside them and change nothing."""
        return [*filter(_is_setting, folder.iterdir()), *self.taken(folder)[1]]


def settings_among(names: Iterable[str], parts: Collection[str]) -> list[str]:
    """The files of a repository with the settings and the vocabularies of these parts, as paths below it."""
    return [name for name in names if str(Path(name).parent) in parts and _is_setting(Path(name))]


def _is_setting(file: Path) -> bool:
    return file.suffix in (".json", ".txt", ".model") and ".index." not in file.name


def fingerprints(
    parts: Mapping[str, Iterable[Path]], overrides: object, reading: Reading, family: Family
) -> Fingerprints:
    """Hashes of names and contents of files.

    Args:
        parts: the files that decide what each part of the pipeline does.
        overrides: settings that change what the whole model computes.
        reading: how prompts are read, which changes what they become.
    """
    hashes = {part: _hash_of(files) for part, files in parts.items()}

    def together(*names: str) -> str:
        known: dict[str, Any] = {name: value for name, value in hashes.items() if name in names}
        if reading != AS_USUAL and not known.keys().isdisjoint(family.encoders):
            known |= reading._asdict()
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]

    whole = hashlib.sha256(f"{json.dumps(overrides)} {together(*hashes)}".encode()).hexdigest()[:16]
    return Fingerprints(whole, together("vae"), together(*family.encoders, *map(tokenizer_of, family.encoders)))


def _hash_of(files: Iterable[Path]) -> str:
    wanted = sorted(files, key=lambda file: file.name)
    known = json.dumps([[file.name, sha256(file)] for file in wanted])
    return hashlib.sha256(known.encode()).hexdigest()
