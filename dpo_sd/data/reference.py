"""The errors of the frozen reference, computed once: with noise a function of (seed, sample, draw) they are numbers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dpo_sd.files import replacing

if TYPE_CHECKING:
    from torch import Tensor

    from dpo_sd.losses import PairErrors

log = logging.getLogger(__name__)


class ReferenceErrors:
    """Errors of the reference on every pair at each of its draws, in memory, and on disk for later runs.

    Args:
        folder: of all that was computed under the same base, reference, seed, precision and weighting: a change of any
            of these is another folder.
        sample_ids: content ids of the pairs, (n,), int64.
        draws: noises and timesteps per pair, at least 1.
        rank: which process this is; each writes a file of its own and reads those of all.
    """

    def __init__(self, folder: Path, sample_ids: np.ndarray, draws: int, rank: int = 0):
        import torch

        self.folder, self.sample_ids, self.draws = folder, sample_ids, draws
        self.file = folder / f"{rank:04d}.npz"
        self.errors = torch.full((len(sample_ids), draws, 2), torch.nan)
        self.hits = self.asked = 0
        self._pending: list[tuple[list[int], list[int], PairErrors]] = []  # on the device until they are asked for
        self._load()

    def _load(self) -> None:
        import torch

        order = np.argsort(self.sample_ids, kind="stable")
        known = self.sample_ids[order]
        for file in sorted(self.folder.glob("*.npz")):
            try:
                with np.load(file, allow_pickle=False) as kept:
                    ids, errors = kept["sample_ids"], kept["errors"]
            except (OSError, ValueError, KeyError, EOFError) as error:
                log.warning("%s cannot be read (%s): its errors are computed anew", file, error)
                continue
            places = np.searchsorted(known, ids).clip(max=len(known) - 1)
            mine = known[places] == ids
            rows, draws = order[places[mine]], min(self.draws, errors.shape[1])
            values = torch.from_numpy(errors[mine][:, :draws])
            now = self.errors[rows, :draws]
            self.errors[rows, :draws] = torch.where(now.isnan(), values, now)

    @property
    def filled(self) -> float:
        """Share of all errors that are known, in [0, 1]."""
        self._settle()
        return 1 - float(self.errors.isnan().any(dim=-1).float().mean())

    def get(self, rows: Sequence[int], draws: Sequence[int]) -> tuple[Tensor, Tensor] | None:
        """Errors on chosen and rejected, each (pairs,), fp32, on the CPU; None where one of them is not known."""
        self.asked += len(rows)
        found = self.errors[list(rows), list(draws)]
        if found.isnan().any():
            self._settle()
            found = self.errors[list(rows), list(draws)]
            if found.isnan().any():
                return None
        self.hits += len(rows)
        chosen, rejected = found.unbind(-1)
        return chosen.contiguous(), rejected.contiguous()

    def put(self, rows: Sequence[int], draws: Sequence[int], errors: PairErrors) -> None:
        """Keeps errors, each (pairs,); they may stay on the device until somebody asks, so that no step waits."""
        self._pending.append((list(rows), list(draws), errors))

    def _settle(self) -> None:
        import torch

        for rows, draws, errors in self._pending:
            self.errors[rows, draws] = torch.stack(list(errors), dim=-1).float().cpu()
        self._pending.clear()

    def save(self) -> None:
        """Writes what is known; a folder that cannot be written costs later runs the cache, not this one its result."""
        self._settle()
        known = (~self.errors.isnan().any(dim=-1)).any(dim=-1).numpy()
        try:
            with replacing(self.file) as temporary, open(temporary, "wb") as file:
                np.savez(file, sample_ids=self.sample_ids[known], errors=self.errors.numpy()[known])
        except OSError as error:
            log.warning("%s cannot be written (%s): these errors will be computed again", self.file, error)
