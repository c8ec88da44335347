"""Scenes as values, and their drawing: flat colours, anti-aliased edges, Pillow only.

Lengths are fractions of the image's side, x to the right, y downwards. A shape is a list of outlines around (0, 0) in
units of its radius; what lies inside an odd number of outlines is filled (so a ring is two circles).
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from PIL import Image, ImageDraw

from fluxrun.shapes.vocabulary import COLOURS, OPPOSITE, place_direction

SUPERSAMPLING = 4
RADIUS = {"small": 0.105, "medium": 0.18, "large": 0.28}
PAIR_RADIUS = {"small": 0.095, "medium": 0.15, "large": 0.205}
CONTAINER_RADIUS = 0.35
INSIDE_RADIUS = 0.125
RING_HOLE = 0.6
MARGIN = 0.06


@dataclasses.dataclass(frozen=True, kw_only=True)
class Object:
    """One coloured shape; `size` and `place` are canonical words, None where nothing was said."""

    colour: str
    shape: str
    size: str | None = None
    place: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """One or two objects on a background; with a relation, the first object stands `relation` the second."""

    objects: tuple[Object, ...]
    relation: str | None = None
    background: str | None = None

    @property
    def background_colour(self) -> str:
        """The background said, or the one drawn when none was: white, unless an object is white."""
        if self.background is not None:
            return self.background
        used = {thing.colour for thing in self.objects}
        return next(colour for colour in ("white", "blue", "black") if colour not in used)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placed:
    """An object laid out on the canvas: centre and radius in fractions of the side."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float


def _circle(radius: float = 1.0, points: int = 96) -> np.ndarray:
    angles = np.linspace(0, 2 * np.pi, points, endpoint=False)
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _star() -> np.ndarray:
    angles = np.arange(10) * np.pi / 5 - np.pi / 2
    radii = np.where(np.arange(10) % 2 == 0, 1.1, 0.47)
    points = radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    centred: np.ndarray = points + np.array([0.0, 0.07])  # the optical centre of a star is below its circumcentre
    return centred


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x / 16, (y - 2.5) / 16], axis=1)


def _cross() -> np.ndarray:
    a, b = 0.33, 0.98
    quarter = [(a, -b), (a, -a), (b, -a)]
    points = [np.array(quarter)]
    for _ in range(3):
        points.append(points[-1] @ np.array([[0.0, 1.0], [-1.0, 0.0]]))
    return np.concatenate(points)


@functools.cache
def outlines(shape: str) -> tuple[np.ndarray, ...]:
    """The outlines of a shape, each an array [points, 2] in units of the radius. KeyError: no such shape."""
    hexagon = np.arange(6) * np.pi / 3
    table = {
        "circle": (_circle(),),
        "square": (np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.9,),
        "triangle": (np.array([(0, -1.05), (1.04, 0.76), (-1.04, 0.76)]),),
        "star": (_star(),),
        "ring": (_circle(), _circle(RING_HOLE)),
        "cross": (_cross(),),
        "heart": (_heart(),),
        "hexagon": (np.stack([np.cos(hexagon), np.sin(hexagon)], axis=1),),
    }
    return table[shape]


def _at_place(thing: Object, radii: dict[str, float]) -> Placed:
    radius = radii[thing.size or "medium"]
    column, row = place_direction(thing.place or "center")
    reach = 0.5 - max(radius + MARGIN, 0.22)
    x, y = 0.5 + column * reach, 0.5 + row * reach
    return Placed(colour=thing.colour, shape=thing.shape, x=x, y=y, radius=radius)


def _side_by_side(scene: Scene) -> list[Placed]:
    first, second = (_at_place(thing, PAIR_RADIUS) for thing in scene.objects)
    offset = -0.235 if scene.relation in ("left of", "above") else 0.235
    along, across = (0.5 + offset, 0.5 - offset), (0.5, 0.5)
    xs, ys = (along, across) if scene.relation in ("left of", "right of") else (across, along)
    return [dataclasses.replace(placed, x=x, y=y) for placed, x, y in zip((first, second), xs, ys, strict=True)]


def _nested(scene: Scene) -> list[Placed]:
    inner, outer = scene.objects
    return [
        Placed(colour=inner.colour, shape=inner.shape, x=0.5, y=0.5, radius=INSIDE_RADIUS),
        Placed(colour=outer.colour, shape=outer.shape, x=0.5, y=0.5, radius=CONTAINER_RADIUS),
    ]


def layout(scene: Scene) -> list[Placed]:
    """Where each object of the scene goes, in the scene's order.

    The scene alone decides: a small model told to choose a place by the noise draws a blend of several.
    """
    if len(scene.objects) == 1:
        return [_at_place(scene.objects[0], RADIUS)]
    if scene.relation == "inside":
        return _nested(scene)
    if scene.relation is None:
        return [_at_place(thing, PAIR_RADIUS) for thing in scene.objects]
    return _side_by_side(scene)


def draw(scene: Scene, size: int = 256) -> Image.Image:
    """The scene as an RGB image of size x size pixels."""
    return draw_placed(layout(scene), COLOURS[scene.background_colour], size)


def draw_placed(things: list[Placed], background: tuple[int, int, int], size: int = 256) -> Image.Image:
    """Draw laid-out objects, the first one topmost."""
    image = Image.new("RGB", (size, size), background)
    for thing in reversed(things):
        image.paste(COLOURS[thing.colour], mask=coverage(thing, size))
    return image


def coverage(thing: Placed, size: int) -> Image.Image:
    """How much of each pixel an object covers, as a mask ("L") of size x size pixels."""
    big = size * SUPERSAMPLING
    mask = Image.new("L", (big, big), 0)
    pen = ImageDraw.Draw(mask)
    for index, outline in enumerate(outlines(thing.shape)):
        points = (outline * thing.radius + [thing.x, thing.y]) * big - 0.5
        pen.polygon([tuple(point) for point in points], fill=0 if index % 2 else 255)
    return mask.resize((size, size), Image.Resampling.BOX)


def mirrored(scene: Scene) -> Scene:
    """The same picture told from the second object: "A left of B" is "B right of A". ValueError: not such a pair."""
    if scene.relation not in OPPOSITE:
        raise ValueError(f"only left, right, above and below can be told the other way round, not {scene.relation}")
    return dataclasses.replace(scene, objects=scene.objects[::-1], relation=OPPOSITE[scene.relation])
