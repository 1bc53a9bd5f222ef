"""Framing: images of any size become tensors of few sizes by buckets, scaling, cropping and flipping."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dpo_sd.errors import UserError, check_range
from dpo_sd.files.tensors import KEY

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from dpo_sd.data.samples import ImageFiles, Samples
    from dpo_sd.models.stable_diffusion import StableDiffusion

MIDDLE = (0.5, 0.5)
WIDEST = 2.0  # longer side over shorter side of the most extreme bucket


class Frame(NamedTuple):
    """The part of a scaled image that is trained on.

    Args:
        width, height: size of the part, in pixels.
        scaled_width, scaled_height: size of the whole image after scaling, in pixels.
        left, top: corner of the part in the scaled image, in pixels.
    """

    width: int
    height: int
    scaled_width: int
    scaled_height: int
    left: int
    top: int


class Framing:
    """Settings of how images are brought to size.

    Args:
        resolution: side in pixels of a square that has the area of every bucket; None takes the one that the model was
            trained for.
        buckets: keeps aspect ratios up to 2:1 by aspect-ratio buckets (NovelAI 2022); otherwise the middle square is
            taken.
        flip: mirrors an image at half of its visits; both images of a pair alike.
        random_crop: cuts another part at every visit, instead of the middle; at the same place in both images of a
            pair. It needs cache=off.

    Raises:
        UserError: if the resolution is out of range.
    """

    def __init__(
        self, resolution: int | None = None, buckets: bool = True, flip: bool = False, random_crop: bool = False
    ):
        if resolution is not None:
            check_range("resolution", resolution, 64, 8192)
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


def nearest_sizes(sizes: Sequence[tuple[int, int]], images: np.ndarray) -> np.ndarray:
    """The number of the bucket whose aspect ratio is nearest to the geometric mean of the images': (n,), int16.

    Args:
        sizes: widths and heights of the buckets; of two that are equally near the larger one is taken.
        images: widths and heights of the images that share a bucket, (n, images, 2).
    """
    larger_first = sorted(range(len(sizes)), key=lambda number: -math.prod(sizes[number]))
    ratios = np.array([math.log(sizes[number][0] / sizes[number][1]) for number in larger_first])
    nearest = np.empty(len(images), np.int16)
    for start in range(0, len(images), 4096):  # the table of distances stays small
        part = slice(start, start + 4096)
        wanted = np.log(images[part, :, 0] / images[part, :, 1]).mean(axis=1)
        nearest[part] = np.array(larger_first)[np.abs(ratios - wanted[:, None]).argmin(axis=1)]
    return nearest


def frames(images: np.ndarray, sizes: np.ndarray, where: tuple[float, float] = MIDDLE) -> np.ndarray:
    """The parts that fill the buckets of images that are scaled until they cover them: (n, 6), int32, as in `Frame`.

    Args:
        images, sizes: widths and heights of the images and of their buckets in pixels, (n, 2).
        where: how far right and down the part lies, each in [0, 1].
    """
    scale = (sizes / images).max(axis=1, keepdims=True)
    scaled = np.maximum(np.rint(images * scale), sizes)
    return np.concatenate([sizes, scaled, np.rint((scaled - sizes) * where)], axis=1).astype(np.int32)


def time_ids(images: np.ndarray, framed: np.ndarray, flip: bool = False) -> np.ndarray:
    """SDXL's micro-conditioning (Podell et al. 2023, arXiv:2307.01952, §2.2): original height and width, top and left
    corner of the crop, height and width of the target, in pixels; (n, 6), int32.

    Args:
        images: widths and heights in pixels, (n, 2).
        framed: rows as `frames` gives them, (n, 6).
        flip: the image is mirrored, and so is the place of its part: what lay on the right lies on the left.
    """
    width, _, scaled_width, _, left, top = framed.T
    left = scaled_width - width - left if flip else left
    return np.stack([images[:, 1], images[:, 0], top, left, framed[:, 1], width], axis=1).astype(np.int32)


def pixels(image: Image.Image, framed: Frame, flip: bool = False) -> Tensor:
    """The framed part of an RGB image: (3, height, width), uint8."""
    import torch
    from PIL import Image

    if image.size != (framed.scaled_width, framed.scaled_height):
        image = image.resize((framed.scaled_width, framed.scaled_height), Image.Resampling.LANCZOS)
    image = image.crop((framed.left, framed.top, framed.left + framed.width, framed.top + framed.height))
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class Frames:
    """The size that each sample is trained at, and the part of each of its images that fills it.

    Args:
        model: model whose UNet takes the sizes.
        samples: the samples.
        framing: how they are brought to size.

    Raises:
        UserError: if the UNet cannot take the resolution.
    """

    def __init__(self, model: StableDiffusion, samples: Samples, framing: Framing):
        # the UNet halves the latents at every block but the last
        step = model.factor * 2 ** (len(model.unet.config["block_out_channels"]) - 1)
        resolution = framing.resolution or model.resolution
        if resolution % step:
            below = resolution // step * step
            raise UserError(
                f"framing.resolution={resolution} is no multiple of {step} pixels, which {model.name} needs: "
                f"use {below or step} or {below + step}"
            )
        self.flips = (False, True) if framing.flip else (False,)
        self.vae, self.factor = model.fingerprints.vae, model.factor
        self.all_sizes = framing.sizes(resolution, step)
        together = np.stack([side.sizes for side in samples.sides], axis=1)
        unique, inverse = np.unique(together, axis=0, return_inverse=True)
        self.numbers = nearest_sizes(self.all_sizes, unique)[inverse.reshape(-1)]
        self.sizes = np.array(self.all_sizes, np.int32)[self.numbers]
        self._sides = samples.sides

    def of(self, side: ImageFiles, row: int, where: tuple[float, float] = MIDDLE) -> Frame:
        """The part of an image that is trained on."""
        return Frame(*frames(side.sizes[row : row + 1], self.sizes[row : row + 1], where)[0].tolist())

    def keys(self, side: ImageFiles) -> np.ndarray:
        """The keys of the latents of a side in the cache: of all rows and, where images are mirrored, of all again.

        A key is the hash of the VAE, the flip, the image (64 ASCII digits) and the frame (six numbers of four bytes).
        """
        images, framed = side.sha256.tobytes(), frames(side.sizes, self.sizes).astype("<i4").tobytes()
        keys = bytearray()
        for flip in self.flips:
            kind = json.dumps({"kind": "latent 1", "vae": self.vae, "flip": flip}, sort_keys=True).encode()
            for row in range(len(side.paths)):
                made_from = kind + images[64 * row : 64 * row + 64] + framed[24 * row : 24 * row + 24]
                keys += hashlib.sha256(made_from).hexdigest()[:KEY].encode()
        return np.frombuffer(keys, f"S{KEY}")

    def time_ids(self, side: ImageFiles) -> np.ndarray:
        """SDXL's micro-conditioning on the sizes of a side, in the order of `keys`: (n, 6) or (2·n, 6), int32."""
        framed = frames(side.sizes, self.sizes)
        return np.concatenate([time_ids(side.sizes, framed, flip) for flip in self.flips])

    def upscaled(self) -> int:
        """How many images are smaller than their size in some direction."""
        return int(sum((side.sizes < self.sizes).any(axis=1).sum() for side in self._sides))
