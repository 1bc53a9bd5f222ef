"""Checkpoint files, written whole or not at all, with tensors and plain values only."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from dpo_sd.errors import UserError
from dpo_sd.files.atomic import replacing
from dpo_sd.files.checksums import seal
from dpo_sd.training.resume import read_checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all, and reads tensors and plain values only, never arbitrary objects.

    Args:
        accumulation: micro-batches in one update of this run; a checkpoint may come from a start with another number.
    """

    def __init__(self, accumulation: int = 1):
        super().__init__()
        self.accumulation = accumulation

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        try:
            with replacing(path) as temporary:
                torch.save(checkpoint, temporary)
                seal(temporary)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            reason = os.strerror(errno.ENOSPC) if "write" in str(error) else str(error)
            raise UserError(f"{path} cannot be written ({reason}): the checkpoints before it are whole") from error

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = True) -> Any:
        checkpoint = read_checkpoint(Path(path))
        # Lightning's position, which it keeps in micro-batches and takes at the end of an update's last one
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        done = checkpoint["global_step"] * self.accumulation
        for counts in (progress["total"], progress["current"]):
            counts.update(ready=done, started=done, processed=done, completed=done - 1)
        progress["is_last_batch"] = False  # max_steps may have grown
        return checkpoint
