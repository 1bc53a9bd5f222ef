"""Scenes: the vocabulary of the shapes world, one scene, and scenes drawn at random."""

from __future__ import annotations

import itertools
import math
import zlib
from dataclasses import dataclass

import numpy as np

RESOLUTION = 64  # pixels, width and height of every image

COLOURS: dict[str, tuple[int, int, int]] = {  # sRGB
    "red": (220, 40, 40),
    "orange": (245, 135, 25),
    "yellow": (250, 220, 50),
    "green": (45, 165, 70),
    "cyan": (70, 205, 225),
    "blue": (45, 80, 215),
    "purple": (140, 60, 180),
    "pink": (250, 150, 195),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "gray": (128, 128, 128),
    "black": (20, 20, 20),
    **{name: COLOURS[name] for name in ("red", "yellow", "green", "blue")},
}
SIZES: dict[str, tuple[float, float]] = {  # pixels, radius of the disc of equal area
    "small": (6.0, 7.5),
    "large": (11.5, 13.5),
}
POSITIONS: dict[str, tuple[int, int]] = {  # direction from the centre, x to the right and y downwards
    "top left": (-1, -1),
    "top": (0, -1),
    "top right": (1, -1),
    "left": (-1, 0),
    "centre": (0, 0),
    "right": (1, 0),
    "bottom left": (-1, 1),
    "bottom": (0, 1),
    "bottom right": (1, 1),
}
MIDDLE = 0.4  # share of the room to the edge; nearer to the centre of an axis than this is neither left nor right
STYLES = ("flat", "outlined", "pastel", "striped")  # the shipped model has seen `flat` only


def _regular(corners: int, inner: float = 1.0) -> np.ndarray:
    """Corners of a regular polygon on its base, or of a star whose inner corners lie at `inner`: (corners, 2)."""
    angles = -math.pi / 2 + 2 * math.pi * np.arange(corners) / corners
    radii = np.where(np.arange(corners) % 2 == 0, 1.0, inner)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _unit_area(polygon: np.ndarray) -> np.ndarray:
    """The polygon around its centroid, with the area of the unit disc: `radius` means the same for every shape."""
    x, y = polygon.T
    cross = x * np.roll(y, -1) - np.roll(x, -1) * y
    area = cross.sum() / 2
    centroid = ((polygon + np.roll(polygon, -1, axis=0)) * cross[:, None]).sum(axis=0) / (6 * area)
    return (polygon - centroid) * math.sqrt(math.pi / abs(area))


_ARM = 0.36  # half the width of a cross's arm, its length being 1
POLYGONS: dict[str, np.ndarray | None] = {  # None is the disc
    "circle": None,
    "square": _unit_area(np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], float)),
    "triangle": _unit_area(_regular(3)),
    "star": _unit_area(_regular(10, inner=0.45)),
    "cross": _unit_area(
        np.array(
            [(-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM),
             (_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)]
        )
    ),
}  # fmt: skip
SHAPES = tuple(POLYGONS)


def reach(shape: str, radius: float) -> float:
    """Largest distance in pixels, on either axis, of a shape's centre from the image's with the shape still inside."""
    polygon = POLYGONS[shape]
    extent = radius * (1.0 if polygon is None else float(np.abs(polygon).max()))
    return RESOLUTION / 2 - 1 - extent


@dataclass(frozen=True)
class Scene:
    """One shape on a plain background.

    Args:
        size, colour, shape, background: words of `SIZES`, `COLOURS`, `POLYGONS` and `BACKGROUNDS`.
        x, y: centre of the shape in pixels from the left and the top edge.
        radius: pixels, radius of the disc of the same area.
        style: one of `STYLES`.
    """

    size: str
    colour: str
    shape: str
    background: str
    x: float = RESOLUTION / 2
    y: float = RESOLUTION / 2
    radius: float = 0.0
    style: str = "flat"

    @property
    def kind(self) -> tuple[str, str, str, str]:
        """Size, colour, shape and background, one of `KINDS`."""
        return self.size, self.colour, self.shape, self.background

    @property
    def position(self) -> str:
        """Name of the shape's place, one of `POSITIONS`."""
        return position_name(self.x, self.y, self.shape, self.radius)


def place(x: float, y: float, shape: str, radius: float) -> tuple[float, float]:
    """Share of its room to the edge that a shape uses on each axis: 0 in the middle, -1 and 1 at the image's edges."""
    room = max(reach(shape, radius), 1.0)
    return (x - RESOLUTION / 2) / room, (y - RESOLUTION / 2) / room


def position_name(x: float, y: float, shape: str, radius: float) -> str:
    """Name of a shape's place: below `MIDDLE` of its room on an axis counts as the middle."""
    cell = tuple(0 if abs(u) < MIDDLE else (1 if u > 0 else -1) for u in place(x, y, shape, radius))
    return next(name for name, direction in POSITIONS.items() if direction == cell)


KINDS: tuple[tuple[str, str, str, str], ...] = tuple(
    kind for kind in itertools.product(SIZES, COLOURS, SHAPES, BACKGROUNDS) if kind[1] != kind[3]
)  # every (size, colour, shape, background); a shape in the colour of its background cannot be seen


def held_out(kind: tuple[str, str, str, str]) -> bool:
    """Whether the shipped model never saw this combination in its training: one in eight, fixed by its name."""
    return zlib.crc32(" ".join(kind).encode()) % 8 == 0


def random_scene(
    rng: np.random.Generator,
    kind: tuple[str, str, str, str],
    position: str | None = None,
    style: str = "flat",
) -> Scene:
    """A scene of the given kind, its exact size and place drawn at random.

    Args:
        rng: generator of the draws.
        kind: size, colour, shape and background, one of `KINDS`.
        position: a name of `POSITIONS` to stay close to; None draws the place uniformly from all where the shape fits.
        style: one of `STYLES`.
    """
    size, _, shape, _ = kind
    radius = rng.uniform(*SIZES[size])
    room = reach(shape, radius)
    if position is None:
        u, v = rng.uniform(-1, 1, size=2)
    else:
        u, v = (d * rng.uniform(0.7, 1.0) if d else rng.uniform(-0.2, 0.2) for d in POSITIONS[position])
    middle = RESOLUTION / 2
    return Scene(*kind, x=middle + u * room, y=middle + v * room, radius=radius, style=style)
