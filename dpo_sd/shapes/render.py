"""Renderer: draws a scene, antialiased by the signed distance to the outline of its shape."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from dpo_sd.shapes.scenes import BACKGROUNDS, COLOURS, POLYGONS, RESOLUTION, Scene

_Y, _X = np.mgrid[0:RESOLUTION, 0:RESOLUTION] + 0.5  # centres of the pixels


def unit_distance(shape: str, px: np.ndarray, py: np.ndarray) -> np.ndarray:
    """Distances from points to the outline of a shape of radius 1 at the origin, negative inside; shape of `px`."""
    polygon = POLYGONS[shape]
    if polygon is None:
        return np.hypot(px, py) - 1
    start, end = polygon, np.roll(polygon, -1, axis=0)
    edge = end - start
    relative = np.stack([px, py], axis=-1)[..., None, :] - start  # (..., edges, 2)
    along = np.clip((relative * edge).sum(-1) / (edge * edge).sum(-1), 0, 1)
    distance = np.linalg.norm(relative - along[..., None] * edge, axis=-1).min(axis=-1)
    # even-odd rule: a ray to the right crosses the outline an odd number of times from inside
    above_start, above_end = py[..., None] >= start[:, 1], py[..., None] >= end[:, 1]
    cross = edge[:, 0] * relative[..., 1] - edge[:, 1] * relative[..., 0]
    crossed = (above_start != above_end) & ((cross < 0) == above_end)
    inside = crossed.sum(axis=-1) % 2 == 1
    return np.where(inside, -distance, distance)


def signed_distance(shape: str, x: float, y: float, radius: float) -> np.ndarray:
    """Distance in pixels from each pixel's centre to the outline of a shape, negative inside: (64, 64)."""
    return unit_distance(shape, (_X - x) / radius, (_Y - y) / radius) * radius


def coverage(shape: str, x: float, y: float, radius: float) -> np.ndarray:
    """Share of each pixel that the shape covers, in [0, 1]: (64, 64)."""
    return np.clip(0.5 - signed_distance(shape, x, y, radius), 0, 1)


def render(scene: Scene) -> Image.Image:
    """Draws a scene in its style as a 64x64 RGB image."""
    return Image.fromarray(np.rint(render_array(scene)).astype(np.uint8))


def palette_colour(colour: ArrayLike, style: str) -> np.ndarray:
    """Colours of the palettes as a style paints them: (..., 3), sRGB in [0, 255]."""
    value = np.asarray(colour, float)
    return 0.5 * value + 0.5 * 255 if style == "pastel" else value


def decoration(style: str, background: str, distance: np.ndarray, diagonal: np.ndarray) -> tuple[np.ndarray, float]:
    """The ink that a style paints over the fill of a shape.

    Args:
        style: one of `STYLES`.
        background: name of the background's colour.
        distance: distances to the outline in pixels, negative inside, in an array of any shape.
        diagonal: x + y of the same places in pixels, broadcast to `distance`.

    Returns:
        The share of the ink in the fill, in [0, 1], shape of `distance`; and the grey value of the ink, in [0, 255].
    """
    if style == "striped":
        stripes = np.clip(2 * np.sin(diagonal * (2 * np.pi / 6)) + 0.5, 0, 1)  # six pixels a stripe pair
        return np.broadcast_to(0.55 * stripes, distance.shape), 255.0
    if style == "outlined":
        return np.clip(distance + 2.5, 0, 1), 255.0 if background == "black" else 0.0  # the outer two pixels
    return np.zeros(distance.shape), 0.0


def render_array(scene: Scene) -> np.ndarray:
    """Draws a scene in its style: (64, 64, 3), sRGB in [0, 255], not rounded."""
    colour = palette_colour(COLOURS[scene.colour], scene.style)
    background = palette_colour(BACKGROUNDS[scene.background], scene.style)
    distance = signed_distance(scene.shape, scene.x, scene.y, scene.radius)
    share, ink = decoration(scene.style, scene.background, distance, _X + _Y)
    fill = colour + share[..., None] * (ink - colour)
    inside = np.clip(0.5 - distance, 0, 1)[..., None]
    return background + inside * (fill - background)
