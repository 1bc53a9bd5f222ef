"""Command that opens the annotation app on a pair folder: `python -m dpo_sd.annotate pairs=pairs/style`."""

from __future__ import annotations

from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig

from dpo_sd.composition.application import entry_point


@entry_point("annotate")
def main(cfg: DictConfig) -> None:
    """Annotates the folder `pairs`, or merges other logs into its own, or exports the decided pairs."""
    folder = Path(cfg.pairs).expanduser()
    if cfg.merge or cfg.export is not None:
        from dpo_sd.preferences.log import merge
        from dpo_sd.preferences.parquet import export_pickapic

        if cfg.merge:
            print(f"{folder}: {merge(folder, [Path(log).expanduser() for log in cfg.merge])} new events")
        if cfg.export is not None:
            print(f"{cfg.export}: {export_pickapic(folder, Path(cfg.export).expanduser())} pairs")
        return
    annotator = instantiate(cfg.annotator)
    annotator.annotate(folder, instantiate(cfg.judge) if cfg.judge else None)


if __name__ == "__main__":
    main()
