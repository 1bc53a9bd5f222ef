"""Oracle: measures an image of the shapes world against its caption, from pixels alone.

The background is the common colour of the frame, the object the largest connected patch of anything else. Every shape
of the world is then fitted to the object as the renderer would draw it (place, radius and fill colour, by least
squares), and the one that fits best is the shape of the object. Scores are continuous, and at least 0.5 exactly where
the property is right.

Its limits:

- Small faults of form are overlooked: a shape turned by ten degrees or squeezed to four fifths of its height mostly
  counts as right, one without a quarter of itself sometimes. Softness lowers the score of the shape, but a blur of 1.5
  pixels mostly passes; no score is for sharpness alone.
- Whatever touches the object is taken as part of it and shows only as a worse fit of the shape, in the object's own
  colour perhaps not at all. The colour of a two-coloured object is the mean of both.
- Faint marks are overlooked: whatever is nearer to the background than 20 (an object) or 32 (clutter) of 255 in RGB
  distance, such as a gentle gradient; so are the 2 pixels around the object, and 20 stray pixels.
- An image is read in the style that is given. Where a soft image in `outlined` mixes ink into a small fill, colours
  are named a little less surely; small soft stripes are sometimes taken for another style.
- A caption speaks of one object, whatever its order and number; everything else in the image is clutter.
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace

import numpy as np
from PIL import Image
from scipy import ndimage

from dpo_sd.errors import UserError
from dpo_sd.shapes.captions import Demand, parse
from dpo_sd.shapes.render import decoration, palette_colour, render_array, unit_distance
from dpo_sd.shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    MIDDLE,
    POLYGONS,
    POSITIONS,
    RESOLUTION,
    SHAPES,
    SIZES,
    STYLES,
    Scene,
    place,
    position_name,
)

COLOUR_TOLERANCE = 25.0  # CIE Lab; neighbours in the palettes are at least 29 apart, in pastel 19
SHAPE_TOLERANCE = 0.2  # 1 - soft IoU
SIZE_TOLERANCE = 2.0  # pixels beyond the range of the word; the gap between small and large is twice as wide
CLUTTER_TOLERANCE = 0.005  # share of the image: 20 pixels
OBJECT_CONTRAST = 20.0  # RGB distance from the background; the palest pair of colours is 44 apart
CLUTTER_CONTRAST = 32.0  # RGB distance from the background from which a pixel counts as something else
OBJECT_PIXELS = (20, RESOLUTION**2 // 2)  # a smaller patch is a speck, a larger one is not an object on a background
_MIDDLE = RESOLUTION / 2
_LAST = RESOLUTION - 1
_FRAME = np.ones((RESOLUTION, RESOLUTION), bool)
_FRAME[2:-2, 2:-2] = False
_XYZ = np.array([[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]])  # of linear sRGB
_ITERATIONS = 3
_EXTENT = max(1.0, *(np.abs(polygon).max() for polygon in POLYGONS.values() if polygon is not None))
_TABLE_REACH, _TABLE_STEP = 3.0, 1 / 32  # in radii


@dataclass(frozen=True)
class Measurement:
    """Measurement of an image; without an object `colours` and `ious` are empty, x, y and radius nan, its words None.

    Args:
        backgrounds: distances of the background's colour from each of `BACKGROUNDS`, in CIE Lab.
        colours: distances of the object's colour from each of `COLOURS`, in CIE Lab.
        ious: soft intersection over union of the object and the best fit of each of `SHAPES`, in [0, 1].
        x, y, radius: centre and radius of the best fit in pixels; the radius is that of the disc of equal area.
        clutter: share of the image's pixels that belong to neither the object nor the background.
    """

    backgrounds: Mapping[str, float]
    colours: Mapping[str, float]
    ious: Mapping[str, float]
    x: float
    y: float
    radius: float
    clutter: float

    @property
    def found(self) -> bool:
        """Whether there is an object."""
        return bool(self.ious)

    @property
    def background(self) -> str:
        """Nearest of `BACKGROUNDS`."""
        return min(self.backgrounds, key=self.backgrounds.__getitem__)

    @property
    def colour(self) -> str | None:
        """Nearest of `COLOURS`."""
        return min(self.colours, key=self.colours.__getitem__) if self.found else None

    @property
    def shape(self) -> str | None:
        """The one of `SHAPES` that fits best."""
        return max(self.ious, key=self.ious.__getitem__) if self.found else None

    @property
    def size(self) -> str | None:
        """The one of `SIZES` whose radii are nearest."""
        return min(SIZES, key=lambda name: _beyond(self.radius, SIZES[name])) if self.found else None

    @property
    def position(self) -> str | None:
        """One of `POSITIONS`."""
        return position_name(self.x, self.y, self.shape, self.radius) if self.shape else None

    def scene(self, style: str) -> Scene | None:
        """The measured scene, to be drawn in a style; None without an object."""
        if not (self.size and self.colour and self.shape):
            return None
        return Scene(self.size, self.colour, self.shape, self.background, self.x, self.y, self.radius, style)


@dataclass(frozen=True)
class Scores:
    """Scores of an image against its caption: each in [0, 1], at least 0.5 if right, None where nothing is asked."""

    shape: float
    colour: float | None
    size: float | None
    background: float | None
    position: float | None
    clean: float  # nothing else is in the image

    @property
    def named(self) -> dict[str, float]:
        """The scores that are not None, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def overall(self) -> float:
        """Mean of the scores."""
        return sum(self.named.values()) / len(self.named)

    @property
    def faithful(self) -> bool:
        """Whether everything that the caption asks for is right."""
        return min(self.named.values()) >= 0.5


def measure(image: Image.Image, style: str = "flat") -> Measurement:
    """Measures an image.

    Args:
        image: 64x64 pixels; any mode is read as RGB, a transparent image as if it were opaque.
        style: one of `STYLES`: the palette and the decoration to expect.

    Raises:
        UserError: if the image has another size or the style is unknown.
    """
    check_known(style, STYLES, "style")
    pixels = _pixels(image)
    ground = np.median(pixels[_FRAME], axis=0)
    backgrounds = _distances(ground, BACKGROUNDS, style)
    name = min(backgrounds, key=backgrounds.__getitem__)
    contrast = np.linalg.norm(pixels - ground, axis=-1)
    patch = _largest_patch(contrast > OBJECT_CONTRAST)
    foreign = contrast > CLUTTER_CONTRAST
    if not OBJECT_PIXELS[0] <= patch.sum() <= OBJECT_PIXELS[1]:
        return Measurement(backgrounds, {}, {}, math.nan, math.nan, math.nan, clutter=float(foreign.mean()))

    near = np.asarray(ndimage.binary_dilation(patch, iterations=2), bool)
    target = np.where(near[..., None], pixels - ground, 0)
    fits, fills, ious = _fit(target, patch, ground, style, name)
    best = int(ious.argmax())
    x, y, radius = (float(value) for value in fits[best])
    colours = _distances(fills[best], COLOURS, style)
    clutter = float((foreign & ~near).mean())
    return Measurement(backgrounds, colours, dict(zip(SHAPES, ious.tolist(), strict=True)), x, y, radius, clutter)


def score(image: Image.Image, prompt: str, style: str = "flat") -> Scores:
    """Scores an image against its caption.

    Args:
        image: 64x64 pixels.
        prompt: caption that `captions.parse` can read.
        style: one of `STYLES`: the palette and the decoration to expect.

    Raises:
        UserError: if the image has another size, the style is unknown or the prompt cannot be read.
    """
    return _score(measure(image, style), parse(prompt))


def style_score(image: Image.Image, style: str) -> float:
    """Score of an image as drawn in one style rather than in the others: in [0, 1], above 0.5 if that style fits best.

    The image is read in each style, the scene so measured is drawn again in that style, and the errors are compared.

    Args:
        image: 64x64 pixels.
        style: one of `STYLES`.

    Raises:
        UserError: if the image has another size or the style is unknown.
    """
    check_known(style, STYLES, "style")
    pixels = _pixels(image)
    errors = {}
    for name in STYLES:
        scene = measure(image, name).scene(name)
        if scene is None:
            return 0.0
        errors[name] = float(np.sqrt(((render_array(scene) - pixels) ** 2).mean()))
    return _truth(errors, style)


def centred(image: Image.Image, prompt: str, style: str = "flat") -> float:
    """Minus the distance in pixels of the object from the middle of the image, whatever place the caption names."""
    return _if_kept(image, prompt, style, lambda seen: -math.hypot(seen.x - _MIDDLE, seen.y - _MIDDLE))


def large(image: Image.Image, prompt: str, style: str = "flat") -> float:
    """Radius of the object in pixels, whatever size the caption names."""
    return _if_kept(image, prompt, style, lambda seen: seen.radius)


def faithful(image: Image.Image, prompt: str, style: str = "flat") -> float:
    """Overall score against the caption, in [0, 1]."""
    return score(image, prompt, style).overall


def in_style(image: Image.Image, prompt: str, style: str = "flat") -> float:
    """Score of the style, in [0, 1], whatever the caption says."""
    return style_score(image, style)


UTILITIES: dict[str, Callable[[Image.Image, str, str], float]] = {
    "centred": centred,
    "faithful": faithful,
    "large": large,
    "style": in_style,
}


def check_known(name: str, names: Iterable[str], what: str) -> None:
    """Refuses a name that is none of the known ones, with the nearest of them.

    Raises:
        UserError: if it is unknown.
    """
    if name not in (known := list(names)):
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {nearest[0]}?)" if nearest else ""
        raise UserError(f"unknown {what} {name!r}{hint}: write one of {', '.join(known)}")


def _if_kept(image: Image.Image, prompt: str, style: str, value: Callable[[Measurement], float]) -> float:
    """The value of the measurement if colour, background and cleanness are right; otherwise less than any such value.

    A taste must not unlearn the caption, but it should not be drowned by it either: a third of a small model's images
    miss their shape, and a label that speaks of the shape says nothing about the taste.
    """
    seen = measure(image, style)
    scores = replace(_score(seen, parse(prompt)), shape=1.0, size=None, position=None)
    if seen.found and scores.faithful:
        return value(seen)
    return -RESOLUTION * (2 - scores.overall)


def _score(seen: Measurement, demand: Demand) -> Scores:
    size = position = None
    if demand.size is not None:
        size = _nearness(_beyond(seen.radius, SIZES[demand.size]), SIZE_TOLERANCE) if seen.found else 0.0
    if demand.position is not None:
        position = _in_place(seen, demand.position)
    errors = {shape: 1 - iou for shape, iou in seen.ious.items()}
    return Scores(
        shape=_truth(errors, demand.shape, SHAPE_TOLERANCE),
        colour=_truth(seen.colours, demand.colour, COLOUR_TOLERANCE) if demand.colour else None,
        size=size,
        background=_truth(seen.backgrounds, demand.background, COLOUR_TOLERANCE) if demand.background else None,
        position=position,
        clean=0.5 ** (seen.clutter / CLUTTER_TOLERANCE),
    )


def _nearness(error: float, tolerance: float) -> float:
    return tolerance**2 / (tolerance**2 + error**2)


def _truth(errors: Mapping[str, float], name: str, tolerance: float = math.inf) -> float:
    """Score of a name among its rivals: at least 0.5 if its error is the least of all and within the tolerance."""
    if not errors:
        return 0.0
    rival = min(error for other, error in errors.items() if other != name)
    return _nearness(errors[name], min(tolerance, rival))


def _beyond(value: float, bounds: tuple[float, float]) -> float:
    return max(bounds[0] - value, value - bounds[1], 0.0)


def _in_place(seen: Measurement, position: str) -> float:
    if seen.shape is None:
        return 0.0
    scores = []
    for u, direction in zip(place(seen.x, seen.y, seen.shape, seen.radius), POSITIONS[position], strict=True):
        # 0.5 on the border of the demanded cell, 1 from halfway into it
        inside = (MIDDLE - abs(u)) / MIDDLE if direction == 0 else (direction * u - MIDDLE) / (1 - MIDDLE)
        scores.append(min(max(0.5 + inside, 0.0), 1.0))
    return min(scores)


def _pixels(image: Image.Image) -> np.ndarray:
    if image.size != (RESOLUTION, RESOLUTION):
        width, height = image.size
        raise UserError(f"the oracle measures pictures of {RESOLUTION}x{RESOLUTION} pixels, got {width}x{height}")
    return np.asarray(image.convert("RGB"), float)


def _lab(colours: np.ndarray) -> np.ndarray:
    """CIE L*a*b* under D65 of sRGB in [0, 255]: (..., 3)."""
    value = np.clip(colours, 0, 255) / 255
    linear = np.where(value > 0.04045, ((value + 0.055) / 1.055) ** 2.4, value / 12.92)
    relative = linear @ _XYZ / _XYZ.sum(axis=0)
    root = np.where(relative > (6 / 29) ** 3, np.cbrt(relative), relative / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = np.moveaxis(root, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def _distances(colour: np.ndarray, palette: Mapping[str, tuple[int, int, int]], style: str) -> dict[str, float]:
    swatches = _lab(palette_colour(list(palette.values()), style))
    return dict(zip(palette, np.linalg.norm(swatches - _lab(colour), axis=1).tolist(), strict=True))


def _largest_patch(mask: np.ndarray) -> np.ndarray:
    labels = np.empty(mask.shape, np.int32)
    if ndimage.label(mask, output=labels) == 0:
        return np.zeros_like(mask)
    return _filled(labels == 1 + np.bincount(labels.ravel())[1:].argmax())


def _filled(mask: np.ndarray) -> np.ndarray:
    return np.asarray(ndimage.binary_fill_holes(mask))


def _fit(
    target: np.ndarray, patch: np.ndarray, ground: np.ndarray, style: str, background: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fits every shape to an object by Gauss-Newton; the fill colour is at every step the one that suits best.

    The soft intersection over union is Tanimoto's, of the two images as vectors of differences from the background:
    for one-coloured pixels it is the usual ratio of areas, and noise counts less in it than in a sum of distances.

    Args:
        target: (64, 64, 3), sRGB of the image minus the background's colour, 0 away from the object.
        patch: (64, 64), bool, whether a pixel seems to belong to the object.
        ground: (3,), sRGB in [0, 255], the background's colour.
        style: one of `STYLES`.
        background: name of the background's colour.

    Returns:
        x, y and radius in pixels (shapes, 3); fill colours (shapes, 3); soft intersections over unions (shapes,).
    """
    contrast = np.linalg.norm(target, axis=-1)
    core = _filled(contrast > np.percentile(contrast[patch], 90) / 2)
    y, x = np.nonzero(core)
    radius = math.sqrt(len(x) / math.pi)
    rough = np.array([x.mean() + 0.5, y.mean() + 0.5, radius])
    fits = np.tile(rough, (len(SHAPES), 1))

    half = math.ceil(_EXTENT * radius) + 3
    side = 2 * half + 1
    left, top = (int(value) - half for value in rough[:2])
    grid_y, grid_x = np.mgrid[top : top + side, left : left + side].reshape(2, -1)
    row, column = np.clip(grid_y, 0, _LAST), np.clip(grid_x, 0, _LAST)
    inside = (row == grid_y) & (column == grid_x)
    seen = np.where(inside, target[row, column].T, 0)  # (3, n); beyond the edge of the image nothing is drawn
    grid_x, grid_y = grid_x + 0.5, grid_y + 0.5

    def draw(distance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images minus the background (shapes, 3, n), and their fill colours, from distances to the outlines."""
        cover = np.clip(0.5 - distance, 0, 1)
        share, ink = decoration(style, background, distance, grid_x + grid_y)
        filled = (cover * (1 - share))[:, None]
        rest = (cover * share * ink)[:, None] - cover[:, None] * ground[:, None]
        fill = (filled * (seen - rest)).sum(axis=-1) / ((filled**2).sum(axis=-1) + 1e-6)
        return filled * np.clip(fill, 0, 255)[..., None] + rest, fill

    for _ in range(_ITERATIONS):
        distance = _signed_distances(fits, grid_x, grid_y)
        drawn, _ = draw(distance)
        slope = draw(distance + 0.5)[0] - draw(distance - 0.5)[0]  # over a whole pixel, or straight edges get stuck
        down, right = (g.reshape(distance.shape) for g in np.gradient(distance.reshape(-1, side, side), axis=(1, 2)))
        x, y, radius = fits.T[..., None]
        grow = (distance - (grid_x - x) * right - (grid_y - y) * down) / radius
        moves = np.stack([-right, -down, grow], axis=1)  # distance by x, y and radius (shapes, 3, n)
        normal = (moves * (slope**2).sum(axis=1)[:, None]) @ moves.swapaxes(1, 2)
        normal += 1e-3 * np.trace(normal, axis1=1, axis2=2)[:, None, None] * np.eye(3) + 1e-6 * np.eye(3)
        gain = moves @ (slope * (seen - drawn)).sum(axis=1)[..., None]
        fits = fits + np.clip(np.linalg.solve(normal, gain)[..., 0], -1.5, 1.5)
        fits[:, 2] = np.clip(fits[:, 2], 2, RESOLUTION / 2)
    drawn, fills = draw(_signed_distances(fits, grid_x, grid_y))
    overlap = (drawn * seen).sum(axis=(1, 2))
    union = (drawn**2).sum(axis=(1, 2)) + (seen**2).sum() - overlap
    return fits, fills, np.clip(overlap / union, 0, 1)


@functools.cache
def _distance_table() -> np.ndarray:
    axis = np.arange(-_TABLE_REACH, _TABLE_REACH + _TABLE_STEP / 2, _TABLE_STEP)
    x, y = np.meshgrid(axis, axis)
    return np.stack([unit_distance(shape, x, y) for shape in SHAPES])


def _signed_distances(fits: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distances in pixels of n points from the outlines of all shapes, interpolated in a table: (shapes, n)."""
    centre_x, centre_y, radius = fits.T[..., None]
    rows, columns = (((p - c) / radius + _TABLE_REACH) / _TABLE_STEP for p, c in ((y, centre_y), (x, centre_x)))
    index = np.broadcast_to(np.arange(len(SHAPES))[:, None], rows.shape)
    return ndimage.map_coordinates(_distance_table(), [index, rows, columns], order=1, mode="nearest") * radius
