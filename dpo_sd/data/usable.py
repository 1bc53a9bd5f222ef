"""Samples that can be used: their image files are there, whole by their headers, and different in a pair."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dpo_sd.data.samples import ImageFiles, Samples
from dpo_sd.errors import UserError
from dpo_sd.files.images import facts

THINNEST = 16  # longer side over shorter side; beyond, a scaled image would fill the memory


class Usable(NamedTuple):
    """Samples that can be used.

    Args:
        samples: the usable ones.
        rows: the row of each in the columns that they come from.
        left_out: why the others cannot be used, one line per reason.
    """

    samples: Samples
    rows: list[int]
    left_out: list[str]


def usable(
    folder: Path,
    prompts: Sequence[str],
    chosen: Sequence[str],
    rejected: Sequence[str] | None = None,
    label: Sequence[float] | np.ndarray | None = None,
    weight: Sequence[float] | np.ndarray | None = None,
    resolve: Callable[[str], Path] | None = None,
) -> Usable:
    """Samples from their columns, less those with an image that cannot be used and those with the same one twice.

    Args:
        folder: where the paths begin.
        prompts: one per sample.
        chosen, rejected: paths of the images; no rejected ones for single images.
        label: P(chosen is better), in [0.5, 1]; None means 1.
        weight: share of each sample in the loss; None means equal ones.
        resolve: the file of a path, refusing what may not be read; None joins it to the folder.
    """
    n = len(prompts)
    kept, complaints = np.ones(n, bool), []
    sides = []
    for paths in (chosen,) if rejected is None else (chosen, rejected):
        found, problems = _facts(folder, paths, resolve)
        complaints += [problem for row, problem in problems.items() if kept[row]]
        kept[list(problems)] = False
        sides.append(found)
    lines = left_out("that cannot be read", complaints, n)
    if len(sides) == 2:
        same = kept & (sides[0].sha256 == sides[1].sha256)
        names = [chosen[row] for row in np.flatnonzero(same).tolist()]
        lines += left_out("whose two pictures are the same file", names, n)
        kept &= ~same
    ones = np.ones(n, np.float32)
    samples = Samples(
        prompts,
        sides[0],
        sides[1] if len(sides) == 2 else None,
        ones if label is None else np.asarray(label, np.float32),
        ones if weight is None else np.asarray(weight, np.float32),
    )
    rows = np.flatnonzero(kept)
    return Usable(samples if kept.all() else samples.take(rows), rows.tolist(), lines)


def _facts(
    folder: Path, paths: Sequence[str], resolve: Callable[[str], Path] | None
) -> tuple[ImageFiles, dict[int, str]]:
    """Hashes and sizes of the files, and why some of them cannot be used, by row."""
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


def left_out(what: str, named: Sequence[str], n: int) -> list[str]:
    """A line for the report with the number and the first five of the samples that are left out; none without any.

    Args:
        what: the reason, in words that follow a number.
        named: a name or a complaint for each of them.
        n: samples that there were.
    """
    if not named:
        return []
    return [f"left out {len(named)} of {n} {what}: {'; '.join(named[:5])}{' …' if len(named) > 5 else ''}"]
