"""A pixel checker: what does this image show, and is it the scene that was asked for?

It knows the palette and the outlines of the shapes, and nothing of any model: colours are segmented, connected regions
are compared with the canonical shapes. An image is a uint8 array [height, width, 3].
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import numpy as np
from PIL import Image
from scipy import ndimage

from fluxrun.shapes.scenes import PAIR_RADIUS, RADIUS, Object, Placed, Scene, coverage, outlines
from fluxrun.shapes.vocabulary import COLOURS, SHAPES, place_direction

MAX_DISTANCE = 60.0  # in RGB units; the two closest colours of the palette are 78 apart
MAX_BLEND = 160.0  # the same for blended pixels along an edge, which go to the nearer side
MIN_AREA = 0.004  # of the image; the smallest shape covers 0.01
MIN_MATCH = 0.6  # intersection over union with the best canonical shape: below, it is no shape
CRISP_MATCH = 0.82  # from here on it is well drawn, too: true edges, pointed tips
SIDE_THRESHOLD = 0.11  # how far from the centre a place begins; drawn at 0.16 or more, and within 0.07 of the centre
TEMPLATE = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """One region of the image: lengths in fractions of the side, `bbox` = (left, top, right, bottom) in pixels."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float
    bbox: tuple[int, int, int, int]
    match: float

    @property
    def place(self) -> tuple[int, int]:
        """(column, row) in the 3x3 grid, each -1, 0 or 1."""
        column, row = (int(np.sign(v - 0.5)) * (abs(v - 0.5) > SIDE_THRESHOLD) for v in (self.x, self.y))
        return column, row

    def size(self, radii: dict[str, float]) -> str:
        """The size word whose radius is nearest, by ratio."""
        return min(radii, key=lambda name: abs(np.log(self.radius / radii[name])))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """What an image shows: the background's colour word ("?" if it is none) and the objects, largest first."""

    background: str
    objects: tuple[Found, ...]


def nearest_colours(pixels: np.ndarray, among: list[int] | None = None, limit: float = MAX_DISTANCE) -> np.ndarray:
    """Index into the palette for each pixel [..., 3], of all colours or `among` these; -1 beyond `limit`."""
    chosen = list(range(len(COLOURS))) if among is None else among
    palette = np.array(list(COLOURS.values()), dtype=np.float32)[chosen]
    values = pixels.astype(np.float32)
    distance = np.stack([np.square(values - colour).sum(-1) for colour in palette])
    return np.where(distance.min(0) < limit**2, np.array(chosen)[distance.argmin(0)], -1)


def look(image: np.ndarray) -> Seen:
    """Segment an image into background and objects. ValueError: not a uint8 image [height, width, 3]."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"expected a uint8 image [height, width, 3], got {image.dtype} {list(image.shape)}")
    names = list(COLOURS)
    flat = nearest_colours(image)
    present = [colour for colour in range(len(names)) if _regions(flat == colour)]
    labels = nearest_colours(image, present, MAX_BLEND) if present else flat
    border = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    background = int(np.bincount(border + 1, minlength=len(names) + 1).argmax()) - 1
    regions = [
        (colour, region)
        for colour in range(len(names))
        if colour != background
        for region in _regions(labels == colour)
    ]
    around = [_surroundings(region, labels) for _, region in regions]
    found = [
        _describe(names[colour], region, labels == outside)
        for (colour, region), outside in zip(regions, around, strict=True)
        if not any(
            colour == other_outside and _encloses(other, region)
            for (_, other), other_outside in zip(regions, around, strict=True)
        )  # seen through a ring: part of what lies behind it
    ]
    found.sort(key=lambda thing: -thing.radius)
    return Seen(background=names[background] if background >= 0 else "?", objects=tuple(found))


def _regions(mask: np.ndarray) -> list[np.ndarray]:
    """Connected regions worth naming.

    Opening removes the blended pixels along other objects' edges; growing back within the mask restores sharp tips.
    """
    least = MIN_AREA * mask.size
    if mask.sum() < least:
        return []
    width = max(3, round(mask.shape[0] / 256 * 3))
    opened = ndimage.binary_opening(mask, np.ones((width, width), bool))
    labelled, count = ndimage.label(opened)
    areas = ndimage.sum_labels(opened, labelled, range(1, count + 1))
    cores = [labelled == index + 1 for index in range(count) if areas[index] >= least]
    return [ndimage.binary_dilation(core, iterations=2 * width, mask=mask) for core in cores]


def _surroundings(region: np.ndarray, labels: np.ndarray) -> int:
    """The commonest palette index just outside a region, past its blended edge."""
    solid = ndimage.binary_fill_holes(region)
    near = ndimage.binary_dilation(solid, iterations=3)
    rim = labels[ndimage.binary_dilation(near, iterations=2) & ~near]
    return int(np.bincount(rim[rim >= 0], minlength=1).argmax())


def _encloses(outer: np.ndarray, inner: np.ndarray) -> bool:
    return bool(ndimage.binary_fill_holes(outer)[inner].all()) and not outer[inner].any()


def _describe(colour: str, region: np.ndarray, outside: np.ndarray) -> Found:
    solid = _fill_covered(region, outside)
    rows, columns = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    shape, match = _classify(solid[top:bottom, left:right])
    height, width = region.shape
    radius = float(max((right - left) / width, (bottom - top) / height)) / 2
    dx, dy = _middle_of_box(shape)
    return Found(
        colour=colour,
        shape=shape,
        x=float(left + right) / 2 / width - dx * radius,
        y=float(top + bottom) / 2 / height - dy * radius,
        radius=radius,
        bbox=(int(left), int(top), int(right), int(bottom)),
        match=match,
    )


def _fill_covered(region: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """Fill holes that another object covers; a hole that shows what lies around (a ring's) stays a hole, all of it."""
    holes, count = ndimage.label(ndimage.binary_fill_holes(region) & ~region)
    solid = region.copy()
    for index in range(1, count + 1):
        hole = holes == index
        if outside[hole].mean() < 0.15:
            solid |= hole
    return solid


@functools.cache
def _template(shape: str) -> tuple[np.ndarray, float]:
    """(mask on a TEMPLATE x TEMPLATE grid stretched to its bounding box, width / height)."""
    thing = Placed(colour="black", shape=shape, x=0.5, y=0.5, radius=0.35)
    mask = np.asarray(coverage(thing, 256)) > 127
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    crop = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return _stretch(crop), crop.shape[1] / crop.shape[0]


@functools.cache
def _middle_of_box(shape: str) -> tuple[float, float]:
    """Where the bounding box's middle lies from the shape's centre, in halves of the box's longer side."""
    if shape not in SHAPES:
        return 0.0, 0.0
    points = outlines(shape)[0]
    low, high = points.min(0), points.max(0)
    x, y = (low + high) / max(high - low)
    return float(x), float(y)


def _stretch(mask: np.ndarray) -> np.ndarray:
    image = Image.fromarray(mask.astype(np.uint8) * 255).resize((TEMPLATE, TEMPLATE), Image.Resampling.BILINEAR)
    return np.asarray(image) > 127


def _classify(mask: np.ndarray) -> tuple[str, float]:
    """(best shape or "?", intersection over union, less for a wrong aspect ratio)."""
    stretched, aspect = _stretch(mask), mask.shape[1] / mask.shape[0]
    scores = {}
    for shape in SHAPES:
        template, expected = _template(shape)
        overlap = (stretched & template).sum() / (stretched | template).sum()
        scores[shape] = float(overlap * min(aspect / expected, expected / aspect) ** 0.5)
    best = max(scores, key=lambda shape: scores[shape])
    return (best if scores[best] >= MIN_MATCH else "?"), scores[best]


# -- against a scene -------------------------------------------------------------------------------------------------


def score(scene: Scene, image: np.ndarray) -> dict[str, bool]:
    """Which attributes of the scene the image shows.

    Keys: `count`, `colour`, `shape`, `size`, `position` (places, or for related objects the relation), `background`;
    `all` of these; and beside them `crisp`: every object is well drawn, which `shape` does not ask. An attribute is
    true if every object has it. Sizes of nested objects follow from the nesting and are true.
    """
    seen = look(image)
    count = len(seen.objects) == len(scene.objects)
    pairs = _assign(scene, seen.objects)
    complete = len(pairs) == len(scene.objects)
    result = {
        "count": count,
        "colour": complete and all(thing.colour == found.colour for thing, found in pairs),
        "shape": complete and all(thing.shape == found.shape for thing, found in pairs),
        "size": complete and _sizes_right(scene, pairs),
        "position": complete and _positions_right(scene, [found for _, found in pairs]),
        "background": seen.background == scene.background_colour,
    }
    crisp = complete and all(found.match >= CRISP_MATCH for _, found in pairs)
    return result | {"all": all(result.values()), "crisp": crisp}


def _assign(scene: Scene, found: tuple[Found, ...]) -> list[tuple[Object, Found]]:
    """The objects of the scene paired with what fits them best; shorter than the scene if too little was found."""
    count = len(scene.objects)
    if len(found) < count:
        return []

    def mismatches(candidate: tuple[Found, ...]) -> tuple[int, bool]:
        pairs = zip(scene.objects, candidate, strict=True)
        wrong = sum((thing.colour != hit.colour) + (thing.shape != hit.shape) for thing, hit in pairs)
        return wrong, not _positions_right(scene, list(candidate))  # equals are told apart by where they are

    best = min(itertools.permutations(found[:4], count), key=mismatches)
    return list(zip(scene.objects, best, strict=True))


def _sizes_right(scene: Scene, pairs: list[tuple[Object, Found]]) -> bool:
    if scene.relation == "inside":
        return True
    radii = RADIUS if len(scene.objects) == 1 else PAIR_RADIUS
    return all(found.size(radii) == (thing.size or "medium") for thing, found in pairs)


def _positions_right(scene: Scene, found: list[Found]) -> bool:
    if scene.relation is None:
        return all(
            hit.place == place_direction(thing.place or "center")
            for thing, hit in zip(scene.objects, found, strict=True)
        )
    first, second = found
    dx, dy = first.x - second.x, first.y - second.y
    if scene.relation == "inside":
        a, b = first.bbox, second.bbox
        return a[0] >= b[0] and a[1] >= b[1] and a[2] <= b[2] and a[3] <= b[3] and a != b
    across, along = (dy, dx) if scene.relation in ("left of", "right of") else (dx, dy)
    sign = -1 if scene.relation in ("left of", "above") else 1
    return along * sign > 0.1 and abs(across) < abs(along) / 2
