"""Whether a path can be what a setting of the model says, and of which family it is: before anything loads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_sd.errors import UserError
from dpo_sd.files.tensors import HeaderError, read_header
from dpo_sd.models.families import FAMILIES, family_of_file, family_of_unet

if TYPE_CHECKING:
    from dpo_sd.models.families import Family, FamilyName

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
# cross-attention of the first block that has any, by whose width a single file is told
_CROSS_ATTENTION = re.compile(
    r"model\.diffusion_model\.input_blocks\.\d+\.1\.transformer_blocks\.0\.attn2\.to_k\.weight"
)
_IS_A_LORA = "is a LoRA, not a model: give it as lora.init_from, or as loras= of generate"


def check_place(key: str, where: str, family: Family, pickle: bool) -> None:
    """Refuses a place that cannot be what a setting says it is.

    Args:
        key: the setting: path, config or vae.
        where: value of the setting: repository on the Hub, folder or file.
        pickle: whether pickles may be read.

    Raises:
        UserError: if there is nothing of that kind, or a model of another family.
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
            _check_folder(local, f"model.{key}={where}", family)
        if key == "path":
            check_family(_family_of_folder(local), family, where)
    elif local.is_file():
        if key == "path" and local.suffix not in PICKLES:
            check_family(_family_of_file(local), family, where)
    elif local.exists() or local.suffix in (".safetensors", *PICKLES) or not re.fullmatch(r"[\w.-]+/[\w.-]+", where):
        example = next(family.repository for family in FAMILIES.values() if family.repository)
        raise UserError(
            f"model.{key}={where}: there is no such folder or file, and a repository on the Hub is written "
            f"owner/name, as {example}"
        )


def check_family(found: FamilyName | None, family: Family, where: str) -> None:
    """Raises UserError if a model was found to be of another family; None is of no known one, and passes."""
    if found not in (None, family.name):
        raise UserError(f"{where} is of the family {found}: use model={found} model.path={where}")


def _check_folder(folder: Path, named: str, family: Family) -> None:
    if not (folder / "model_index.json").is_file():
        if any((folder / name).exists() for name in ("lora", "adapter_config.json", "unet/adapter_config.json")):
            raise UserError(f"{named} {_IS_A_LORA}")
        raise UserError(f"{named}: no diffusers pipeline there (a folder with a model_index.json)")
    if missing := [part for part in family.parts if not (folder / part).is_dir()]:
        raise UserError(f"{named} lacks {', '.join(missing)}: copy the whole pipeline folder")


def _family_of_folder(folder: Path) -> FamilyName | None:
    try:
        return family_of_unet(json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None  # loading says what is wrong with it


def _family_of_file(file: Path) -> FamilyName | None:
    """The family of a single file in Stability's layout, by the names and shapes in its header."""
    shapes = _shapes(file)
    if any(".lora_" in key or key.startswith("lora_") for key in shapes):
        raise UserError(f"{file} {_IS_A_LORA}")
    widths = {shape[-1] for key, shape in shapes.items() if _CROSS_ATTENTION.fullmatch(key)}
    if not widths:
        raise UserError(f"{file} holds no Stable Diffusion 1, 2 or XL in Stability's layout: use such a checkpoint")
    return family_of_file(shapes, widths.pop())


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a safetensors file, by name."""
    try:
        return read_header(file).shapes
    except (OSError, HeaderError) as error:
        raise UserError(f"{file} is no safetensors file, or damaged ({error}): fetch it again") from error
