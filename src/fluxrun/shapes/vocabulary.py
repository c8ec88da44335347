"""The words of the shapes world: colours, shapes, sizes, places, relations, and the ways people say them.

Every table maps a canonical name to the phrases that mean it, all lower case; the first phrase is the commonest.
"""

from __future__ import annotations

RGB = tuple[int, int, int]

COLOURS: dict[str, RGB] = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 210, 40),
    "orange": (245, 140, 30),
    "purple": (140, 60, 180),
    "pink": (245, 150, 190),
    "brown": (125, 75, 40),
    "black": (20, 20, 24),
    "white": (255, 255, 255),
    "gray": (140, 142, 148),
}

COLOUR_WORDS: dict[str, tuple[str, ...]] = {
    "red": ("red", "crimson", "scarlet"),
    "green": ("green",),
    "blue": ("blue",),
    "yellow": ("yellow",),
    "orange": ("orange",),
    "purple": ("purple", "violet"),
    "pink": ("pink",),
    "brown": ("brown",),
    "black": ("black",),
    "white": ("white",),
    "gray": ("gray", "grey"),
}

SHAPE_WORDS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "disc", "disk", "dot", "ball"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "ring": ("ring", "donut", "hoop"),
    "cross": ("cross", "plus sign", "plus"),
    "heart": ("heart",),
    "hexagon": ("hexagon",),
}

SIZE_WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "tiny", "little"),
    "medium": ("medium", "medium-sized", "mid-sized"),
    "large": ("large", "big", "huge"),
}

PLACE_PHRASES: dict[str, tuple[str, ...]] = {
    "center": (
        "in the center",
        "in the middle",
        "at the center",
        "in the centre",
        "at the centre",
        "centered",
        "in the middle of the image",
        "in the center of the picture",
    ),
    "top": ("at the top", "on top", "in the top center", "at the top center", "in the upper part", "near the top"),
    "bottom": (
        "at the bottom",
        "in the bottom center",
        "at the bottom center",
        "in the lower part",
        "near the bottom",
    ),
    "left": ("on the left", "at the left", "on the left side", "at the left edge", "to the left", "near the left"),
    "right": (
        "on the right",
        "at the right",
        "on the right side",
        "at the right edge",
        "to the right",
        "near the right",
    ),
    "top left": (
        "in the top left corner",
        "at the top left",
        "in the top left",
        "in the upper left corner",
        "top left",
        "in the upper left",
        "in the top-left corner",
        "on the top left",
    ),
    "top right": (
        "in the top right corner",
        "at the top right",
        "in the top right",
        "in the upper right corner",
        "top right",
        "in the upper right",
        "in the top-right corner",
        "on the top right",
    ),
    "bottom left": (
        "in the bottom left corner",
        "at the bottom left",
        "in the bottom left",
        "in the lower left corner",
        "bottom left",
        "in the lower left",
        "in the bottom-left corner",
        "on the bottom left",
    ),
    "bottom right": (
        "in the bottom right corner",
        "at the bottom right",
        "in the bottom right",
        "in the lower right corner",
        "bottom right",
        "in the lower right",
        "in the bottom-right corner",
        "on the bottom right",
    ),
}

RELATION_PHRASES: dict[str, tuple[str, ...]] = {
    "left of": ("left of", "to the left of", "on the left of", "on the left side of", "at the left of"),
    "right of": ("right of", "to the right of", "on the right of", "on the right side of", "at the right of"),
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "beneath", "underneath"),
    "inside": ("inside", "inside of", "in", "within"),
}

# Said of two things without an order: drawn in reading order, the first one left of the second.
BESIDE_PHRASES: tuple[str, ...] = ("next to", "beside", "and", "and", "and", "with", "near")

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

SHAPES: tuple[str, ...] = tuple(SHAPE_WORDS)
SIZES: tuple[str, ...] = tuple(SIZE_WORDS)
PLACES: tuple[str, ...] = tuple(PLACE_PHRASES)
RELATIONS: tuple[str, ...] = tuple(RELATION_PHRASES)

# What can hold another object, and stays recognisable around it.
CONTAINERS: tuple[str, ...] = ("circle", "square", "hexagon", "heart", "ring")


def place_direction(place: str) -> tuple[int, int]:
    """(column, row) of a place in the 3x3 grid, each -1, 0 or 1; the origin is the centre, rows grow downwards."""
    column = -1 if "left" in place else 1 if "right" in place else 0
    row = -1 if "top" in place else 1 if "bottom" in place else 0
    return column, row
