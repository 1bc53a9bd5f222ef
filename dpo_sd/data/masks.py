"""Masks of images: how much the error of each latent pixel counts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dpo_sd.data.frames import pixels
from dpo_sd.data.samples import ImageFiles
from dpo_sd.data.usable import some
from dpo_sd.errors import UserError
from dpo_sd.files.images import decoding_problems, facts, load_image

if TYPE_CHECKING:
    from torch import Tensor

    from dpo_sd.data.frames import Frames


class Masks:
    """The mask of each sample, framed as its image.

    Args:
        files: the masks, of the images' sizes; an empty path is none.
        frames: sizes and frames of the images.
        outside: weight where a mask is black, in [0, 1).
    """

    def __init__(self, files: ImageFiles, frames: Frames, outside: float):
        self.files, self.frames, self.outside = files, frames, outside

    def read(self, row: int, flip: bool, where: tuple[float, float]) -> Tensor:
        """Weights of the latent pixels of a sample, (1, h/8, w/8), fp32, each the mean of those of its pixels.

        Args:
            row, flip, where: as in `dpo_sd.data.batches.Images`.

        Raises:
            UserError: if the file can no longer be read.
        """
        import torch
        from torch.nn.functional import avg_pool2d

        framed = self.frames.of(self.files, row, where)
        if not (path := self.files.paths[row]):
            return torch.ones(1, framed.height // self.frames.factor, framed.width // self.frames.factor)
        white = pixels(load_image(self.files.folder / path), framed, flip)[:1] / 255
        return self.outside + (1 - self.outside) * avg_pool2d(white, self.frames.factor)


def found_masks(folder: Path, paths: Sequence[str], images: ImageFiles) -> ImageFiles:
    """The masks of images, which can be decoded to their end and have the images' sizes.

    Args:
        paths: one per image, below the folder; an empty one is none.

    Raises:
        UserError: if one cannot be used.
    """
    rows = [row for row, path in enumerate(paths) if path]
    files = [folder / paths[row] for row in rows]
    sha256, problems = np.zeros(len(paths), "S64"), []
    for row, known, undecodable in zip(rows, facts(files), decoding_problems(files), strict=True):
        sha256[row] = known.sha256.encode()
        if problem := known.problem or undecodable:
            problems.append(problem)
        elif (known.width, known.height) != tuple(images.sizes[row]):
            picture = "{} × {} of its picture".format(*images.sizes[row])
            problems.append(f"{paths[row]} has {known.width} × {known.height} pixels, not the {picture}")
    if problems:
        raise UserError(f"{len(problems)} masks of {folder} cannot be used: {some(problems, '; ')}")
    return ImageFiles(folder, paths, sha256, images.sizes)
