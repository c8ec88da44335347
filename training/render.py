"""Draw batches of scenes on the training device: the same outlines as `fluxrun.shapes.scenes`, as distance fields.

Each shape's signed distance is tabulated once; a drawing looks it up. So data is never what training waits for.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F

from fluxrun.shapes.scenes import Scene, layout, outlines
from fluxrun.shapes.vocabulary import COLOURS, SHAPES

EXTENT, GRID = 1.5, 256  # the table spans [-EXTENT, EXTENT] radii with GRID x GRID points
MAX_OBJECTS = 2


def _distance(points: np.ndarray, outline: np.ndarray) -> np.ndarray:
    """Signed distance of points [n, 2] to a closed outline [k, 2], negative inside."""
    nearest, inside = np.full(len(points), np.inf), np.zeros(len(points), bool)
    for a, b in zip(outline, np.roll(outline, -1, axis=0), strict=True):
        edge, offset = b - a, points - a
        along = np.clip(offset @ edge / (edge @ edge), 0, 1)
        nearest = np.minimum(nearest, np.linalg.norm(offset - along[:, None] * edge, axis=1))
        if a[1] != b[1]:
            crosses = (a[1] > points[:, 1]) != (b[1] > points[:, 1])
            inside ^= crosses & (points[:, 0] < a[0] + (points[:, 1] - a[1]) * edge[0] / edge[1])
    return np.where(inside, -nearest, nearest)


def distance_table(device: torch.device) -> torch.Tensor:
    """Signed distances of all shapes, float [shapes, 1, GRID, GRID], in radii."""
    axis = np.linspace(-EXTENT, EXTENT, GRID)
    points = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    fields = []
    for shape in SHAPES:
        outer, *holes = (_distance(points, outline) for outline in outlines(shape))
        fields.append(np.maximum.reduce([outer, *(-hole for hole in holes)]))
    table = np.stack(fields).reshape(len(SHAPES), 1, GRID, GRID)
    return torch.tensor(table, dtype=torch.float32, device=device)


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A batch of laid-out scenes: n objects each, the first topmost; radius 0 means "no object"."""

    shape: torch.Tensor  # long [b, n]
    centre: torch.Tensor  # float [b, n, 2], fractions of the side
    radius: torch.Tensor  # float [b, n], fractions of the side
    colour: torch.Tensor  # float [b, n, 3] in [-1, 1]
    background: torch.Tensor  # float [b, 3] or [b, 3, size, size] in [-1, 1]

    def to(self, device: torch.device) -> Drawing:
        return Drawing(*(getattr(self, field.name).to(device) for field in dataclasses.fields(self)))

    def __getitem__(self, index: slice | torch.Tensor) -> Drawing:
        return Drawing(*(getattr(self, field.name)[index] for field in dataclasses.fields(self)))


def render(drawing: Drawing, table: torch.Tensor, size: int = 256, scale: int = 256) -> torch.Tensor:
    """Images [b, 3, size, size] in [-1, 1]; `size` below `scale` draws only the top left part (a crop)."""
    count = drawing.shape.shape[1]
    background = drawing.background
    image = background[..., None, None].expand(-1, -1, size, size) if background.ndim == 2 else background
    axis = (torch.arange(size, device=table.device) + 0.5) / scale
    pixels = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)
    for index in reversed(range(count)):
        radius = drawing.radius[:, index, None, None].clamp(min=1e-6)
        units = (pixels - drawing.centre[:, index, None, None]) / radius[..., None] / EXTENT
        field = F.grid_sample(table[drawing.shape[:, index]], units, padding_mode="border", align_corners=True)
        coverage = (0.5 - field * radius[:, None] * scale).clamp(0, 1) * (
            drawing.radius[:, index, None, None, None] > 0
        )
        image = torch.lerp(image, drawing.colour[:, index, :, None, None].expand_as(image), coverage)
    return image


def palette(device: torch.device | None = None) -> torch.Tensor:
    """The colours in [-1, 1], [colours, 3], in the vocabulary's order."""
    return torch.tensor(list(COLOURS.values()), dtype=torch.float32, device=device) / 127.5 - 1


def scene_rows(scene: Scene) -> np.ndarray:
    """A laid-out scene as numbers, float [MAX_OBJECTS + 1, 5]: background index, then shape, x, y, radius, colour."""
    rows = np.zeros((MAX_OBJECTS + 1, 5), np.float32)
    names = list(COLOURS)
    rows[0, 0] = names.index(scene.background_colour)
    for index, thing in enumerate(layout(scene)):
        rows[index + 1] = SHAPES.index(thing.shape), thing.x, thing.y, thing.radius, names.index(thing.colour)
    return rows


def from_rows(rows: torch.Tensor) -> Drawing:
    """A batch of `scene_rows`, float [b, MAX_OBJECTS + 1, 5], as a drawing on its device."""
    colours, things = palette(rows.device), rows[:, 1:]
    return Drawing(
        shape=things[..., 0].long(),
        centre=things[..., 1:3],
        radius=things[..., 3],
        colour=colours[things[..., 4].long()],
        background=colours[rows[:, 0, 0].long()],
    )


def random_drawing(batch: int, size: int, scale: int, device: torch.device) -> Drawing:
    """Anything at all, for the autoencoder: 0-4 objects of any size and colour, on flat or shaded backgrounds."""
    count, span = 4, size / scale
    colours = palette(device)

    def colour(*shape: int) -> torch.Tensor:
        named = colours[torch.randint(len(colours), shape, device=device)]
        free = torch.rand(*shape, 3, device=device) * 2 - 1
        return torch.where(torch.rand(*shape, 1, device=device) < 0.7, named, free)

    flat = torch.where(torch.rand(batch, 1, device=device) < 0.3, colours[9], colour(batch))
    other, ramp = colour(batch), torch.linspace(0, 1, size, device=device)
    ramp = torch.where(torch.rand(batch, 1, 1, device=device) < 0.5, ramp[None, :, None], ramp[None, None, :])
    shaded = torch.lerp(flat[..., None, None], other[..., None, None], ramp[:, None].expand(-1, 3, size, size))
    is_shaded = torch.rand(batch, 1, 1, 1, device=device) < 0.12
    radius = 0.06 + 0.32 * torch.rand(batch, count, device=device) ** 1.5
    present = torch.rand(batch, count, device=device) < torch.tensor([0.85, 0.5, 0.25, 0.15], device=device)
    return Drawing(
        shape=torch.randint(len(SHAPES), (batch, count), device=device),
        centre=(torch.rand(batch, count, 2, device=device) * 1.2 - 0.1) * span,
        radius=radius * present,
        colour=colour(batch, count),
        background=torch.where(is_shaded, shaded, flat[..., None, None].expand(-1, -1, size, size)),
    )
