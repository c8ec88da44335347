"""The scales of float8 attention, computed on the GPU: the CPU never waits for the values' largest element."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl

from fluxrun.kernels.ahead import launch
from fluxrun.kernels.transformer.triton_ops import FP8_MAX, TINY, warps

ROWS_PER_PROGRAM = 8


def fp8_scales(
    values: Sequence[torch.Tensor], bounds: torch.Tensor, shared: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scales, their reciprocals), float32 [3] each, of queries, keys and values that are to fill float8's range.

    ``values``: rows [n, width] of each stream; ``bounds``: float32 [2], what queries and keys cannot exceed. ``shared``
    makes of the largest value in this process the largest of all, where others have tokens of the same picture.
    """
    largest = torch.zeros(1, dtype=torch.float32, device=bounds.device)
    for part in values:
        rows, width = part.shape
        launch(_largest_kernel, (triton.cdiv(rows, ROWS_PER_PROGRAM),))(
            part, largest, rows, part.stride(0),
            WIDTH=width, BLOCK=triton.next_power_of_2(width), ROWS=ROWS_PER_PROGRAM, num_warps=warps(width),
        )  # fmt: skip
    largest = largest if shared is None else shared(largest)
    out = torch.empty(6, dtype=torch.float32, device=bounds.device)
    launch(_scales_kernel, (1,))(bounds, largest, out, num_warps=1)
    return out[:3], out[3:]


@triton.jit
def _largest_kernel(values, largest, rows, row_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    found = tl.zeros((BLOCK,), tl.float32)
    for step in range(ROWS):
        row = tl.program_id(0) * ROWS + step
        mask = (columns < WIDTH) & (row < rows)
        value = tl.load(values + row.to(tl.int64) * row_stride + columns, mask=mask, other=0.0).to(tl.float32)
        found = tl.maximum(found, tl.abs(value))
    tl.atomic_max(largest, tl.max(found))


@triton.jit
def _scales_kernel(bounds, largest, out):
    for index in tl.static_range(3):
        bound = tl.load(bounds + index) if index < 2 else tl.maximum(tl.load(largest), TINY)
        tl.store(out + index, FP8_MAX / bound)
        tl.store(out + 3 + index, bound / FP8_MAX)
