"""What a source has found: prompts, image files, labels and weights, before anything is decoded."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dpo_sd.errors import UserError
from dpo_sd.files.images import facts

THINNEST = 16  # longer side over shorter side; beyond, a scaled picture would fill the memory


@dataclass(frozen=True)
class ImageFiles:
    """One picture of each sample, as columns: objects would not do for a million.

    Args:
        folder: that the paths are relative to.
        paths: POSIX.
        sha256: of the files' bytes, (n,), ASCII.
        sizes: width and height in pixels, upright, (n, 2), int32.
    """

    folder: Path
    paths: Sequence[str]
    sha256: np.ndarray
    sizes: np.ndarray

    def take(self, rows: np.ndarray) -> ImageFiles:
        return ImageFiles(self.folder, [self.paths[int(row)] for row in rows], self.sha256[rows], self.sizes[rows])


@dataclass(frozen=True)
class Samples:
    """What a source has found, before anything is decoded.

    Args:
        prompts: one per sample.
        chosen, rejected: their pictures; single pictures have no rejected ones.
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

    def without(self, rows: Container[int]) -> Samples:
        """All but those of the samples."""
        return self.take(np.array([row for row in range(len(self)) if row not in rows], int)) if rows else self

    @property
    def sides(self) -> list[ImageFiles]:
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


@dataclass
class Found:
    """Samples split by prompt, and what there is to say of them.

    Args:
        train, validation: samples with disjoint prompts, or of single pictures with disjoint pictures.
        report: what was used and what was not, one line each.
    """

    train: Samples
    validation: Samples
    report: list[str] = field(default_factory=list)


def find(
    folder: Path | None,
    prompts: Sequence[str],
    chosen: Sequence[str],
    rejected: Sequence[str] | None,
    label: Sequence[float] | np.ndarray | None,
    weight: Sequence[float] | np.ndarray | None,
    report: list[str],
    resolve: Callable[[str], Path] | None = None,
) -> tuple[Samples, list[int]]:
    """Samples from their columns, and the rows that they come from.

    Those with a picture that cannot be used, or with the same one twice, are left out.

    Args:
        folder: that the paths are relative to; None looks at no picture, and takes those of one path for one.
        prompts, chosen, rejected, label, weight: columns; no label means 1, no weight equal ones.
        report: gets a line for what is left out, with the first five reasons.
        resolve: the file of a path, refusing what may not be read; None joins it to the folder.
    """
    n = len(prompts)
    kept = np.ones(n, bool)
    complaints: list[str] = []
    sides = []
    for paths in (chosen, rejected):
        if paths is None:
            continue
        found, problems = (_unseen(paths), {}) if folder is None else _facts(folder, paths, resolve)
        for row, problem in problems.items():
            if kept[row]:
                complaints.append(problem)
            kept[row] = False
        sides.append(found)
    if folder is None:
        report.append("pictures are not looked at: those that cannot be read are counted with the others")
    left_out("that cannot be read", complaints, n, report)
    if len(sides) == 2:
        same = kept & (sides[0].sha256 == sides[1].sha256)
        left_out(
            "whose two pictures are the same file", [chosen[row] for row in np.flatnonzero(same).tolist()], n, report
        )
        kept &= ~same
    samples = Samples(
        prompts,
        sides[0],
        sides[1] if len(sides) == 2 else None,
        np.ones(n, np.float32) if label is None else np.asarray(label, np.float32),
        np.ones(n, np.float32) if weight is None else np.asarray(weight, np.float32),
    )
    return (samples if kept.all() else samples.take(np.flatnonzero(kept))), np.flatnonzero(kept).tolist()


def _unseen(paths: Sequence[str]) -> ImageFiles:
    sha256 = np.array([hashlib.sha256(path.encode()).hexdigest() for path in paths], "S64")
    return ImageFiles(Path(), paths, sha256, np.zeros((len(paths), 2), np.int32))


def _facts(
    folder: Path, paths: Sequence[str], resolve: Callable[[str], Path] | None
) -> tuple[ImageFiles, dict[int, str]]:
    """What is known of the files, and why some cannot be used, by row."""
    problems: dict[int, str] = {}
    rows: list[int] = []

    def files() -> Iterator[Path]:  # one by one: a million paths are not for the memory
        for row, path in enumerate(paths):
            try:
                file = folder / path if resolve is None else resolve(path)
                if not file.is_file():
                    raise UserError(f"image {file} does not exist")
            except UserError as error:
                problems[row] = str(error)
            else:
                rows.append(row)
                yield file

    sha256 = np.zeros(len(paths), "S64")
    sizes = np.zeros((len(paths), 2), np.int32)
    for known in facts(files()):
        row = rows.pop()
        if known.problem:
            problems[row] = known.problem
        elif max(known.width, known.height) > THINNEST * min(known.width, known.height):
            problems[row] = (
                f"image {folder / paths[row]} has {known.width} × {known.height} pixels, which are scaled up until the "
                "shorter side fills the frame: crop it"
            )
        sha256[row], sizes[row] = known.sha256.encode(), (known.width, known.height)
    return ImageFiles(folder, paths, sha256, sizes), problems


def left_out(what: str, named: Sequence[str], n: int, report: list[str]) -> None:
    """Adds a line to the report where something is left out: how many, and the first five."""
    if named:
        report.append(f"left out {len(named)} of {n} {what}: {'; '.join(named[:5])}{' …' if len(named) > 5 else ''}")


def by_prompt(prompts: Sequence[str]) -> np.ndarray:
    """Weight of each sample: one over the number of samples with its prompt."""
    counts = Counter(prompts)
    return np.array([1 / counts[prompt] for prompt in prompts], np.float32)
