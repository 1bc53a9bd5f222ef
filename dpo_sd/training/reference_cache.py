"""The errors of the frozen reference, computed once: with noise a function of (seed, sample, draw) they are numbers."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dpo_sd.files.atomic import replacing

if TYPE_CHECKING:
    from torch import Tensor

    from dpo_sd.losses import PairErrors

log = logging.getLogger(__name__)


class ReferenceErrors:
    """Errors of the reference on every pair at each of its draws, in memory, and on disk for later runs.

    What is once known never changes, so that a run that is continued reads the numbers that it has computed.

    Args:
        folder: of all that was computed under the same base, reference, seed, precision and weighting: a change of any
            of these is another folder. None keeps the errors for this process alone.
        content_ids: of the pairs' pictures and prompts, (n,), int64, see `PreparedSamples`.
        draws: noises and timesteps per pair, at least 1.
        rank: which process this is; each writes a file of its own and reads those of all.
        resumed: whether a run is continued, which then reads its own file alone, if there is one: what another process
            has computed may be rounded otherwise than what this one would have.
    """

    def __init__(self, folder: Path | None, content_ids: np.ndarray, draws: int, rank: int = 0, resumed: bool = False):
        import torch

        self.content_ids, self.draws = content_ids, draws
        self.errors = torch.full((len(content_ids), draws, 2), torch.nan)
        self.known = torch.zeros((len(content_ids), draws), dtype=torch.bool)
        self.hits = self.asked = 0
        self._pending: list[tuple[list[int], list[int], PairErrors]] = []  # on the device until they are asked for
        self.file = None
        if folder is not None:
            pairs = hashlib.sha256(np.ascontiguousarray(content_ids).tobytes()).hexdigest()[:12]
            self.file = folder / f"{pairs}-{draws}-{rank}.npz"  # other pairs of the same reference keep theirs
            self._load([self.file] if resumed and self.file.exists() else sorted(folder.glob("*.npz")))

    def _load(self, files: list[Path]) -> None:
        import torch

        order = np.argsort(self.content_ids, kind="stable")
        sorted_ids = self.content_ids[order]
        for file in files:
            try:
                with np.load(file, allow_pickle=False) as kept:
                    ids, errors = kept["content_ids"], kept["errors"]
                if ids.shape != errors.shape[:1] or errors.shape[2:] != (2,) or errors.dtype != np.float32:
                    raise ValueError("its columns do not belong together")
            except Exception as error:  # zipfile, zlib and numpy say of damage whatever they like
                why = error.strerror if isinstance(error, OSError) and error.strerror else "it is damaged"
                log.warning("%s cannot be read (%s): its errors are computed anew", file, why)
                continue
            by_id = np.argsort(ids, kind="stable")
            places = np.searchsorted(ids[by_id], sorted_ids).clip(max=max(len(ids) - 1, 0))
            mine = ids[by_id][places] == sorted_ids if len(ids) else np.zeros(len(sorted_ids), bool)
            rows, draws = order[mine], min(self.draws, errors.shape[1])
            values = torch.from_numpy(errors[by_id[places[mine]]][:, :draws])
            now = self.errors[rows, :draws]
            self.errors[rows, :draws] = torch.where(now.isnan(), values, now)
        self.known = ~self.errors.isnan().any(dim=-1)

    @property
    def filled(self) -> float:
        """Share of all errors that are known, in [0, 1]."""
        return float(self.known.float().mean())

    def get(self, rows: Sequence[int], draws: Sequence[int]) -> tuple[Tensor, PairErrors]:
        """Which of the errors are known, (pairs,), bool; and the errors, each (pairs,), fp32, NaN where they are not.

        All on the CPU.
        """
        from dpo_sd.losses import PairErrors

        place = list(rows), list(draws)
        known = self.known[place]
        if known.any():
            self._settle()
        self.asked += len(rows)
        self.hits += int(known.sum())
        chosen, rejected = self.errors[place].unbind(-1)
        return known, PairErrors(chosen.contiguous(), rejected.contiguous())

    def put(self, rows: Sequence[int], draws: Sequence[int], errors: PairErrors) -> None:
        """Keeps errors, each (pairs,), where none are known; they may stay on the device, so that no step waits."""
        self._pending.append((list(rows), list(draws), errors))
        self.known[list(rows), list(draws)] = True

    def _settle(self) -> None:
        import torch

        for rows, draws, errors in self._pending:
            values, now = torch.stack(list(errors), dim=-1).float().cpu(), self.errors[rows, draws]
            self.errors[rows, draws] = torch.where(now.isnan(), values, now)
        self._pending.clear()

    def save(self) -> None:
        """Writes what is known; a folder that cannot be written costs later runs the cache, not this one its result."""
        if self.file is None:
            return
        self._settle()
        some = self.known.any(dim=-1).numpy()
        try:
            with replacing(self.file) as temporary, open(temporary, "wb") as file:
                np.savez(file, content_ids=self.content_ids[some], errors=self.errors.numpy()[some])
        except OSError as error:
            log.warning("%s cannot be written (%s): these errors will be computed again", self.file, error)
