"""How pictures of any size become tensors of few sizes: aspect-ratio buckets, scaling, cropping, flipping."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from dpo_sd.errors import UserError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

MIDDLE = (0.5, 0.5)
WIDEST = 2.0  # longer side over shorter side of the most extreme bucket


class Frame(NamedTuple):
    """The part of a scaled picture that is trained on.

    Args:
        width, height: of the part, in pixels.
        scaled_width, scaled_height: of the whole picture after scaling, in pixels.
        left, top: corner of the part in the scaled picture, in pixels.
    """

    width: int
    height: int
    scaled_width: int
    scaled_height: int
    left: int
    top: int


class Framing:
    """How pictures are brought to size.

    Args:
        resolution: side in pixels of a square that has the area of every bucket; None takes what the model was trained
            for.
        buckets: keeps aspect ratios up to 2:1 by aspect-ratio buckets (NovelAI 2022); otherwise the middle square is
            taken.
        flip: mirrors a picture at half of its visits; both pictures of a pair alike.
        random_crop: cuts another part at every visit, instead of the middle; at the same place in both pictures of a
            pair. It needs cache=off.

    Raises:
        UserError: when the resolution is out of range.
    """

    def __init__(
        self, resolution: int | None = None, buckets: bool = True, flip: bool = False, random_crop: bool = False
    ):
        if resolution is not None and resolution < 64:
            raise UserError(f"resolution must be at least 64 pixels, got {resolution}")
        self.resolution, self.buckets, self.flip, self.random_crop = resolution, buckets, flip, random_crop

    def sizes(self, resolution: int, step: int) -> list[tuple[int, int]]:
        """Width and height of the buckets, multiples of `step`, of at most resolution² pixels, from tall to wide."""
        if not self.buckets:
            return [(resolution, resolution)]
        area, found = resolution**2, set()
        for width in range(step, round(resolution * math.sqrt(WIDEST)) + 1, step):
            height = area // width // step * step
            if max(width, height) <= WIDEST * min(width, height):
                found |= {(width, height), (height, width)}
        return sorted(found | {(resolution, resolution)}, key=lambda size: size[0] / size[1])


def nearest_size(sizes: list[tuple[int, int]], *pictures: tuple[int, int]) -> tuple[int, int]:
    """The bucket whose aspect ratio is nearest to that of the pictures, their geometric mean where there are several.

    Args:
        sizes: widths and heights of the buckets.
        pictures: widths and heights of the pictures that share a bucket.
    """
    wanted = sum(math.log(width / height) for width, height in pictures) / len(pictures)
    return min(sizes, key=lambda size: (abs(math.log(size[0] / size[1]) - wanted), -size[0] * size[1]))


def frame(picture: tuple[int, int], size: tuple[int, int], where: tuple[float, float] = MIDDLE) -> Frame:
    """The picture scaled until it covers a bucket, and the part of it that fills the bucket.

    Args:
        picture: its width and height in pixels.
        size: those of the bucket.
        where: how far right and down the part lies, each in [0, 1].
    """
    scale = max(size[0] / picture[0], size[1] / picture[1])
    width, height = (max(round(side * scale), least) for side, least in zip(picture, size, strict=True))
    left, top = (round((whole - part) * at) for whole, part, at in zip((width, height), size, where, strict=True))
    return Frame(*size, width, height, left, top)


def time_ids(picture: tuple[int, int], framed: Frame) -> tuple[int, int, int, int, int, int]:
    """SDXL's micro-conditioning (Podell et al. 2023, arXiv:2307.01952, §2.2): original height and width, top and left
    corner of the crop, height and width of the target, in pixels."""
    return picture[1], picture[0], framed.top, framed.left, framed.height, framed.width


def pixels(picture: Image.Image, framed: Frame, flip: bool = False) -> Tensor:
    """The framed part of an RGB picture: (3, height, width), uint8."""
    import numpy as np
    import torch
    from PIL import Image

    if picture.size != (framed.scaled_width, framed.scaled_height):
        picture = picture.resize((framed.scaled_width, framed.scaled_height), Image.Resampling.LANCZOS)
    picture = picture.crop((framed.left, framed.top, framed.left + framed.width, framed.top + framed.height))
    if flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
