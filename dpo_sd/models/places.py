"""Whether a path can be what a setting of the model says: before anything loads."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_sd.errors import UserError
from dpo_sd.models.families import FAMILIES

if TYPE_CHECKING:
    from dpo_sd.models.families import Family, FamilyName

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
IS_A_LORA = "is a LoRA, not a model: give it as lora.init_from, or as loras= of generate"


def check_place(key: str, where: str, family: Family, parts: Iterable[str], pickle: bool) -> None:
    """Refuses a place that cannot be what a setting says it is.

    Args:
        key: the setting: path, config or vae.
        where: value of the setting: repository on the Hub, folder or file.
        family: the model's.
        parts: folders that a pipeline's folder must have.
        pickle: whether pickles may be read.

    Raises:
        UserError: if there is nothing of that kind.
    """
    local = Path(where).expanduser()
    if local.suffix in PICKLES and not pickle:
        raise UserError(
            f"model.{key}={where} is a pickle, which can run code when it is opened: use a .safetensors file, "
            "trust it with model.pickle=true, or write a safe copy of it once: "
            f"python -m dpo_sd.export format=merged model={family.name} model.{key}={where} model.pickle=true "
            "out=<folder>"
        )
    if local.is_dir():
        if key != "vae":
            below = ("*", "*/*")
            names = [file.relative_to(local).as_posix() for pattern in below for file in local.glob(pattern)]
            check_layout(names, f"model.{key}={where}", parts)
    elif not local.is_file() and (
        local.exists() or local.suffix in (".safetensors", *PICKLES) or not re.fullmatch(r"[\w.-]+/[\w.-]+", where)
    ):
        example = next(family.repository for family in FAMILIES.values() if family.repository)
        raise UserError(
            f"model.{key}={where}: there is no such folder or file, and a repository on the Hub is written "
            f"owner/name, as {example}"
        )


def check_family(found: FamilyName | None, family: Family, where: str, key: str = "path") -> None:
    """Raises UserError if a model was found to be of another family; None is of no known one, and passes."""
    if found not in (None, family.name):
        raise UserError(f"{where} is of the family {found}: use model={found} model.{key}={where}")


def check_layout(names: Collection[str], named: str, parts: Iterable[str]) -> None:
    """Refuses what is no pipeline in diffusers' layout, or lacks a part.

    Args:
        names: of all files, as paths below the folder or the repository.
        named: the setting and its value.
        parts: folders that must be there.

    Raises:
        UserError: if it is none.
    """
    folders = {name.partition("/")[0] for name in names if "/" in name}
    if "model_index.json" not in names:
        if "lora" in folders or {"adapter_config.json", "unet/adapter_config.json"} & {*names}:
            raise UserError(f"{named} {IS_A_LORA}")
        raise UserError(f"{named}: no diffusers pipeline there (a folder with a model_index.json)")
    if missing := [part for part in parts if part not in folders]:
        way = ", or give one as model.vae" if missing == ["vae"] else ""
        if "text_encoder" in missing and "text_encoder_2" in folders:
            way = ", or, where this is SDXL's refiner, use its base"
        raise UserError(f"{named} lacks {', '.join(missing)}: copy the whole pipeline folder{way}")
