"""Command that opens the annotation app on a pair folder: `python -m dpo_sd.annotate pairs=pairs/style`."""

from __future__ import annotations

import os
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig

from dpo_sd.composition.application import entry_point
from dpo_sd.errors import UserError


@entry_point("annotate")
def main(cfg: DictConfig) -> None:
    """Annotates the folder `pairs`, or merges other logs into its own, or exports the decided pairs."""
    if not cfg.pairs:
        raise UserError("pairs is empty: name a pair folder")
    folder = Path(cfg.pairs).expanduser()
    if cfg.export is not None:
        check_export(Path(cfg.export).expanduser(), folder)
    if cfg.merge or cfg.export is not None:
        from dpo_sd.preferences.log import merge
        from dpo_sd.preferences.parquet import export_pickapic

        if cfg.merge:
            print(f"{folder}: {merge(folder, [Path(log).expanduser() for log in cfg.merge])} new events")
        if cfg.export is not None:
            try:
                print(f"{cfg.export}: {export_pickapic(folder, Path(cfg.export).expanduser())} pairs")
            except OSError as error:
                raise UserError(f"export={cfg.export} cannot be written ({error}): choose another place") from error
        return
    annotator = instantiate(cfg.annotator)
    annotator.annotate(folder, instantiate(cfg.judge) if cfg.judge else None)


def check_export(file: Path, folder: Path) -> None:
    """Raises UserError if the file is no new one, or lies in the pair folder, whose files it could stand for."""
    if file.suffix.lower() != ".parquet":
        raise UserError(f"export={file} must be a parquet file, so its name must end in .parquet")
    if os.path.lexists(file):
        raise UserError(f"export={file} exists: choose another name, or move it away")
    if file.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"export={file} lies in the pair folder {folder}: choose a place outside of it")


if __name__ == "__main__":
    main()
