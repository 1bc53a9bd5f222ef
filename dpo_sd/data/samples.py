"""Samples as columns: prompts, image files, labels and weights, before anything is decoded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class ImageFiles:
    """One image of each sample, as columns: objects would not do for a million.

    Args:
        folder: where the paths begin.
        paths: POSIX paths, one per sample.
        sha256: hashes of the files' bytes, (n,), ASCII.
        sizes: width and height in pixels, upright, (n, 2), int32.
    """

    folder: Path
    paths: Sequence[str]
    sha256: np.ndarray
    sizes: np.ndarray

    def take(self, rows: np.ndarray) -> ImageFiles:
        """The images of those samples, in this order."""
        return ImageFiles(self.folder, [self.paths[int(row)] for row in rows], self.sha256[rows], self.sizes[rows])


@dataclass(frozen=True)
class Samples:
    """Pairs or single images with prompts.

    Args:
        prompts: one per sample.
        chosen: the better image of each pair, or single images.
        rejected: the worse images; None for single images.
        label: P(chosen is better), (n,), in [0.5, 1].
        weight: share of each sample in the loss, (n,), positive.
    """

    prompts: Sequence[str]
    chosen: ImageFiles
    rejected: ImageFiles | None
    label: np.ndarray
    weight: np.ndarray

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def sides(self) -> list[ImageFiles]:
        """The chosen images and, of pairs, the rejected ones."""
        return [self.chosen] if self.rejected is None else [self.chosen, self.rejected]

    def take(self, rows: np.ndarray) -> Samples:
        """Those of the samples, in this order."""
        return Samples(
            [self.prompts[int(row)] for row in rows],
            self.chosen.take(rows),
            None if self.rejected is None else self.rejected.take(rows),
            self.label[rows],
            self.weight[rows],
        )

    def without(self, rows: Container[int]) -> Samples:
        """All samples but those."""
        return self.take(np.array([row for row in range(len(self)) if row not in rows], int)) if rows else self


def by_prompt(prompts: Sequence[str]) -> np.ndarray:
    """Weight of each sample: one over the number of samples with its prompt, (n,), fp32."""
    counts = Counter(prompts)
    return np.array([1 / counts[prompt] for prompt in prompts], np.float32)
