"""Samples that can be used: their image files are there, whole by their headers, and different in a pair."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dpo_sd.data.samples import ImageFiles, Samples
from dpo_sd.errors import UserError
from dpo_sd.files.images import facts
from dpo_sd.files.names import printable
from dpo_sd.files.texts import whole
from dpo_sd.noise import sample_id

THINNEST = 16  # longer side over shorter side; beyond, a scaled image would fill the memory


class Usable(NamedTuple):
    """Samples that can be used.

    Args:
        samples: the usable ones.
        rows: the row of each in the columns that they come from.
        left_out: why the others cannot be used, one line per reason; then what is unusual about the usable ones.
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

    Halves of surrogate pairs in prompts become �: no tokenizer takes them.

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
    whole_prompts = [whole(prompt) for prompt in prompts]
    samples = Samples(
        whole_prompts,
        sides[0],
        sides[1] if len(sides) == 2 else None,
        ones if label is None else np.asarray(label, np.float32),
        ones if weight is None else np.asarray(weight, np.float32),
    )
    rows = np.flatnonzero(kept)
    cut = [ascii(prompts[row])[:100] for row in rows.tolist() if prompts[row] != whole_prompts[row]]
    samples = samples if kept.all() else samples.take(rows)
    if cut:
        lines.append(f"{len(cut)} prompts hold half of a character, which is read as �: {some(cut)}")
    return Usable(samples, rows.tolist(), [*lines, *_repeated(samples)])


def _repeated(samples: Samples) -> Iterator[str]:
    """A line for the report where pairs are there more than once, by their prompt and the content of their images."""
    if samples.rejected is None:
        return
    ids = np.fromiter(map(sample_id, samples.prompts, *_ordered(samples)), np.int64, len(samples))
    _, which, times = np.unique(ids, return_inverse=True, return_counts=True)
    repeated = np.flatnonzero(times[which] > 1).tolist()
    better: defaultdict[int, set[bytes]] = defaultdict(set)
    for row in repeated:
        better[which[row]].add(bytes(samples.chosen.sha256[row]) if samples.label[row] > 0.5 else b"neither")
    if repeated:
        apart = [samples.prompts[row] for row in repeated if len(better[which[row]]) > 1]
        named = [ascii(prompt)[:100] for prompt in dict.fromkeys(apart)]
        against = f"; of these {len(apart)} do not agree which picture is better: {some(named)}" if apart else ""
        yield f"{len(repeated)} samples are {len(better)} pairs several times, and each of them counts{against}"


def _ordered(samples: Samples) -> Iterator[np.ndarray]:
    """The smaller and the larger hash of each pair, whichever picture is better."""
    assert samples.rejected is not None
    both = np.stack([samples.chosen.sha256, samples.rejected.sha256])
    yield from np.sort(both, axis=0)


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
                if not os.path.isfile(file):
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
    return [f"left out {len(named)} of {n} {what}: {some(named, '; ')}"]


def some(named: Sequence[str], between: str = ", ") -> str:
    """The first five names on one line, and dots where there are more."""
    return printable(between.join(named[:5])) + (" …" if len(named) > 5 else "")
