"""Samples as columns: prompts, image files, labels and weights, before anything is decoded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

_COLUMNS = ("sha256", "sizes")


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

    @property
    def absolute(self) -> ImageFiles:
        """The same images by their whole paths, so that those of other folders can stand beside them."""
        paths = [str(self.folder / path) if path else "" for path in self.paths]
        return ImageFiles(Path(), paths, self.sha256, self.sizes)


@dataclass(frozen=True)
class Samples:
    """Pairs or single images with prompts.

    Args:
        prompts: one per sample.
        chosen: the better image of each pair, or single images.
        rejected: the worse images; None for single images.
        label: P(chosen is better), (n,), in [0.5, 1].
        weight: share of each sample in the loss, (n,), positive.
        copies: number of each sample among its repeats, from 0, (n,); None where there are no repeats.
        masks: mask of each single image, with an empty path where there is none; None where none are read.
    """

    prompts: Sequence[str]
    chosen: ImageFiles
    rejected: ImageFiles | None
    label: np.ndarray
    weight: np.ndarray
    copies: np.ndarray | None = None
    masks: ImageFiles | None = None

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
            None if self.copies is None else self.copies[rows],
            None if self.masks is None else self.masks.take(rows),
        )

    def repeated(self, times: int) -> Samples:
        """Every sample so many times; a copy is a sample of its own, with noises of its own."""
        if times == 1:
            return self
        many = self.take(np.repeat(np.arange(len(self)), times))
        return replace(many, copies=np.tile(np.arange(times), len(self)))

    @property
    def originals(self) -> np.ndarray:
        """Which samples are no copies of others, (n,), bool."""
        return np.ones(len(self), bool) if self.copies is None else self.copies == 0

    def without(self, rows: Container[int]) -> Samples:
        """All samples but those."""
        return self.take(np.array([row for row in range(len(self)) if row not in rows], int)) if rows else self


def joined(parts: Sequence[Samples]) -> Samples:
    """The samples of several folders, one after the other."""
    if len(parts) == 1:
        return parts[0]

    def together(sides: Sequence[ImageFiles]) -> ImageFiles:
        paths = [path for side in sides for path in side.absolute.paths]
        return ImageFiles(Path(), paths, *(np.concatenate([getattr(s, name) for s in sides]) for name in _COLUMNS))

    rejected = [part.rejected for part in parts if part.rejected is not None]
    masks = [part.masks for part in parts if part.masks is not None]
    copies = [np.zeros(len(part), int) if part.copies is None else part.copies for part in parts]
    return Samples(
        [prompt for part in parts for prompt in part.prompts],
        together([part.chosen for part in parts]),
        together(rejected) if rejected else None,
        np.concatenate([part.label for part in parts]),
        np.concatenate([part.weight for part in parts]),
        None if all(part.copies is None for part in parts) else np.concatenate(copies),
        together(masks) if masks else None,
    )


def by_prompt(prompts: Sequence[str]) -> np.ndarray:
    """Weight of each sample: one over the number of samples with its prompt, (n,), fp32."""
    counts = Counter(prompts)
    return np.array([1 / counts[prompt] for prompt in prompts], np.float32)
