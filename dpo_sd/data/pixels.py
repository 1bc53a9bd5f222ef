"""Images that the training step encodes by itself: read and framed at every visit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dpo_sd.data.frames import pixels, time_ids
from dpo_sd.files.images import decoding_problems, load_image

if TYPE_CHECKING:
    from torch import Tensor

    from dpo_sd.data.frames import Frames
    from dpo_sd.data.samples import ImageFiles, Samples


class Pixels:
    """One image of each sample, as bytes of its pixels.

    Args:
        side: the files.
        frames: the size of each, and the part of it that fills that size.
    """

    def __init__(self, side: ImageFiles, frames: Frames):
        self.side, self.frames = side, frames

    def read(self, row: int, flip: bool, where: tuple[float, float]) -> tuple[Tensor, Tensor]:
        """The image, (3, h, w), uint8, and its time ids, (6,), fp32: see `dpo_sd.data.batches.Images`.

        Raises:
            UserError: if the file can no longer be read.
        """
        import torch

        framed = self.frames.of(self.side, row, where)
        image = load_image(self.side.folder / self.side.paths[row])
        (ids,) = time_ids(self.side.sizes[row : row + 1], np.array([framed]), flip)
        return pixels(image, framed, flip), torch.from_numpy(ids).float()


def undecodable(samples: Samples, part: str) -> dict[int, str]:
    """Why samples cannot be decoded, by row: found once and remembered, and not in the middle of a training.

    Args:
        part: name of the samples in the progress bar.
    """
    from tqdm import tqdm

    problems: dict[int, str] = {}
    for side in samples.sides:
        found = decoding_problems(side.folder / path for path in side.paths)
        for row, problem in enumerate(tqdm(found, f"checking {part} pictures", len(samples), unit="picture", delay=2)):
            if problem:
                problems.setdefault(row, problem)
    return problems
