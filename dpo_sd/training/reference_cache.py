"""Errors of the frozen reference, computed once: like the noise, they are a function of (seed, sample, draw)."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dpo_sd.files.atomic import replacing
from dpo_sd.files.checksums import is_whole, seal

if TYPE_CHECKING:
    from torch import Tensor

    from dpo_sd.losses import PairErrors

log = logging.getLogger(__name__)


class ReferenceErrors:
    """Keeps the errors of the reference on every sample at each of its draws, in memory, and on disk for later runs.

    An error that is known never changes, so that a run that is continued reads the numbers that it has computed.

    Args:
        folder: folder for everything computed under the same base, reference, seed, precision and weighting; a change
            of any of these is another folder. None keeps the errors for this process alone.
        content_ids: (n,), int64, hashes of the samples' images and prompts, see `PreparedSamples`.
        draws: noises and timesteps per sample, at least 1.
        rank: number of this process; each process writes a file of its own and reads those of all.
        resumed: True for a run that is continued, which reads its own file alone if there is one: the errors of another
            process may be rounded differently.
        images: images per sample whose errors are kept: 2 for pairs, 1 for single or chosen images.
    """

    def __init__(
        self,
        folder: Path | None,
        content_ids: np.ndarray,
        draws: int,
        rank: int = 0,
        resumed: bool = False,
        images: int = 2,
    ):
        import torch

        self.content_ids, self.draws, self.images = content_ids, draws, images
        self.errors = torch.full((len(content_ids), draws, images), torch.nan)
        self.known = torch.zeros((len(content_ids), draws), dtype=torch.bool)
        self.hits = self.asked = 0
        self._pending: list[tuple[list[int], list[int], PairErrors]] = []  # on the device until they are asked for
        self.file = None
        if folder is not None:
            # samples have a file for themselves, and so have the errors of single images, which are of no use to pairs
            samples = hashlib.sha256(np.ascontiguousarray(content_ids).tobytes()).hexdigest()[:12]
            self.file = folder / f"{samples}-{draws}-{rank}{'' if images == 2 else '-chosen'}.npz"
            self._load([self.file] if resumed and self.file.exists() else sorted(folder.glob("*.npz")))

    def _load(self, files: list[Path]) -> None:
        import torch

        order = np.argsort(self.content_ids, kind="stable")
        sorted_ids = self.content_ids[order]
        for file in files:
            try:
                if not is_whole(file):
                    raise ValueError("its checksum is another")
                with np.load(file, allow_pickle=False) as kept:
                    ids, errors = kept["content_ids"], kept["errors"]
                if ids.shape != errors.shape[:1] or errors.shape[2:] not in ((1,), (2,)) or errors.dtype != np.float32:
                    raise ValueError("its columns do not belong together")
            except Exception as error:  # zipfile, zlib and numpy say of damage whatever they like
                why = error.strerror if isinstance(error, OSError) and error.strerror else "it is damaged"
                log.warning("%s cannot be read (%s): its errors are computed anew", file, why)
                continue
            if errors.shape[2] < self.images:
                continue
            by_id = np.argsort(ids, kind="stable")
            places = np.searchsorted(ids[by_id], sorted_ids).clip(max=max(len(ids) - 1, 0))
            mine = ids[by_id][places] == sorted_ids if len(ids) else np.zeros(len(sorted_ids), bool)
            rows, draws = order[mine], min(self.draws, errors.shape[1])
            values = torch.from_numpy(errors[by_id[places[mine]]][:, :draws, : self.images])
            now = self.errors[rows, :draws]
            self.errors[rows, :draws] = torch.where(now.isnan(), values, now)
        self.known = ~self.errors.isnan().any(dim=-1)

    @property
    def filled(self) -> float:
        """Share of all errors that are known, in [0, 1]."""
        return float(self.known.float().mean())

    def get(self, rows: Sequence[int], draws: Sequence[int]) -> tuple[Tensor, PairErrors]:
        """Whether the errors are known, (n,), bool, and the errors, each (n,), fp32, NaN where unknown; on the CPU.

        Args:
            rows: row of each sample in its dataset.
            draws: draw of each sample, in [0, draws).
        """
        from dpo_sd.losses import PairErrors

        place = list(rows), list(draws)
        known = self.known[place]
        if known.any():
            self._settle()
        self.asked += len(rows)
        self.hits += int(known.sum())
        errors = self.errors[place].T.contiguous()  # (images, n)
        return known, PairErrors(errors[0], errors[1:].flatten())

    def put(self, rows: Sequence[int], draws: Sequence[int], errors: PairErrors) -> None:
        """Keeps errors where none are known; they may lie on the device, so that no step waits.

        Args:
            rows, draws: as in `get`.
            errors: each (n,).
        """
        self._pending.append((list(rows), list(draws), errors))
        self.known[list(rows), list(draws)] = True

    def _settle(self) -> None:
        import torch

        for rows, draws, errors in self._pending:
            values = torch.stack(list(errors)[: self.images], dim=-1).float().cpu()
            now = self.errors[rows, draws]
            self.errors[rows, draws] = torch.where(now.isnan(), values, now)
        self._pending.clear()

    def save(self) -> None:
        """Writes the known errors; where the folder cannot be written, a warning is all that happens."""
        if self.file is None:
            return
        self._settle()
        some = self.known.any(dim=-1).numpy()
        try:
            with replacing(self.file) as temporary:
                with open(temporary, "wb") as file:
                    np.savez(file, content_ids=self.content_ids[some], errors=self.errors.numpy()[some])
                seal(temporary)
        except OSError as error:
            log.warning("%s cannot be written (%s): these errors will be computed again", self.file, error)
