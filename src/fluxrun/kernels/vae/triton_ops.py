"""Triton kernels for the FLUX.2 VAE decoder in channels-last: GroupNorm with SiLU, residual sums, softmax.

Between two convolutions eager PyTorch passes over the picture six times (bias, statistics, normalize, SiLU, bias,
residual), and its GroupNorm leaves channels-last. Here it is two reads and one write: statistics, taken in the pass
that adds the residual where there is one, then normalize and SiLU. Sums and norms are float32 and rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fluxrun.kernels.ahead import launch

ELEMENTS = 16384  # of a tile: 32 KB of bfloat16, 64 values a thread, enough loads in flight without spilling

WARPS = 8

PARTIALS = 4096  # tiles whose statistics one step of the finishing kernel holds

SCORE_BYTES = 2**28  # of one slice of the attention matrix

SIZES = ("pixels", "tiles")  # not compiled in: what a small picture compiled serves one of any size

SCORES = 8192  # of a row that one step of the softmax holds


@triton.jit(do_not_specialize=SIZES)
def _tile_kernel(
    x, bias, residual, out, means, squares, pixels, tiles,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Statistics of one tile of ``x + bias (+ residual)``; the sum is stored when there is a residual."""
    tile, sample = tl.program_id(0), tl.program_id(1)
    width: tl.constexpr = CHANNELS // GROUPS
    row = tile * ROWS + tl.arange(0, ROWS)[:, None]
    mask = row < pixels
    channel = tl.arange(0, CHANNELS)[None, :]
    place = (sample.to(tl.int64) * pixels + row) * CHANNELS + channel
    value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        value += tl.load(bias + channel)
    if ADD:
        value += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
        rounded = value.to(out.dtype.element_ty)
        tl.store(out + place, rounded, mask=mask)
        value = rounded.to(tl.float32)
    value = tl.where(mask, value, 0.0)
    count = tl.minimum(pixels - tile * ROWS, ROWS) * width
    mean = tl.sum(tl.reshape(tl.sum(value, 0), (GROUPS, width)), 1) / count
    spread = tl.reshape(tl.broadcast_to(mean[:, None], (GROUPS, width)), (1, CHANNELS))
    # The squares of what the tile's own mean leaves: no cancellation however far the mean is from zero.
    centred = tl.where(mask, value - spread, 0.0)
    square = tl.sum(tl.reshape(tl.sum(centred * centred, 0), (GROUPS, width)), 1)
    place_of_group = (sample * GROUPS + tl.arange(0, GROUPS)) * tiles + tile
    tl.store(means + place_of_group, mean)
    tl.store(squares + place_of_group, square)


@triton.jit(do_not_specialize=SIZES)
def _finish_kernel(
    means, squares, weight, offset, bias, scale, shift, pixels, tiles, eps,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """One group of one sample: its tiles' statistics put together, then what each channel is scaled and shifted by."""
    group, sample = tl.program_id(0), tl.program_id(1)
    start = (sample * GROUPS + group) * tiles
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, tiles, BLOCK):
        tile = first + tl.arange(0, BLOCK)
        rows = tl.minimum(pixels - tile * ROWS, ROWS).to(tl.float32)
        total += tl.where(tile < tiles, tl.load(means + start + tile, mask=tile < tiles, other=0.0) * rows, 0.0)
    mean = tl.sum(total, 0) / pixels
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, tiles, BLOCK):
        tile = first + tl.arange(0, BLOCK)
        rows = tl.minimum(pixels - tile * ROWS, ROWS).to(tl.float32) * WIDTH
        away = tl.load(means + start + tile, mask=tile < tiles, other=0.0) - mean
        square = tl.load(squares + start + tile, mask=tile < tiles, other=0.0)
        total += tl.where(tile < tiles, square + rows * away * away, 0.0)
    variance = tl.sum(total, 0) / (pixels.to(tl.float32) * WIDTH)
    channel = group * WIDTH + tl.arange(0, WIDTH)
    factor = tl.load(weight + channel) / tl.sqrt(variance + eps)
    moved = tl.load(offset + channel) - mean * factor
    if BIAS:
        moved += tl.load(bias + channel) * factor
    tl.store(scale + sample * GROUPS * WIDTH + channel, factor)
    tl.store(shift + sample * GROUPS * WIDTH + channel, moved)


@triton.jit(do_not_specialize=SIZES)
def _normalize_kernel(
    x, scale, shift, out, pixels,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Scale and shift by channel, then SiLU."""
    sample = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    mask = row < pixels
    channel = tl.arange(0, CHANNELS)[None, :]
    place = (sample.to(tl.int64) * pixels + row) * CHANNELS + channel
    factor = tl.load(scale + sample * CHANNELS + channel)
    moved = tl.load(shift + sample * CHANNELS + channel)
    value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32) * factor + moved
    if SILU:
        value = value / (1.0 + tl.exp(-value))
    tl.store(out + place, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _softmax_kernel(scores, out, columns, factor, BLOCK: tl.constexpr):
    """One row of attention: softmax of ``factor * scores``; two reads, the second from the cache."""
    start = tl.program_id(0).to(tl.int64) * columns
    peak = -float("inf")
    total = 0.0
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        value = tl.load(scores + start + column, mask=column < columns, other=-float("inf")) * factor
        higher = tl.maximum(peak, tl.max(value, 0))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(value - higher), 0)
        peak = higher
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        value = tl.load(scores + start + column, mask=column < columns, other=-float("inf")) * factor
        result = tl.exp(value - peak) / total
        tl.store(out + start + column, result.to(out.dtype.element_ty), mask=column < columns)


Partials = tuple[torch.Tensor, torch.Tensor]
"""A picture's statistics in pieces: float32 means and sums of squares, each [samples * groups, tiles]."""


def statistics(x: torch.Tensor, bias: torch.Tensor | None, groups: int) -> Partials:
    """Statistics of ``x + bias``: x [samples, channels, height, width] in channels-last, bias float32 [channels]."""
    return _tiles(x, bias, None, groups)[1]


def add(
    x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor, groups: int
) -> tuple[torch.Tensor, Partials]:
    """``x + bias + residual`` with its statistics. May overwrite ``x``."""
    return _tiles(x, bias, residual, groups)


def _tiles(
    x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None, groups: int
) -> tuple[torch.Tensor, Partials]:
    samples, channels, pixels = _shape(x)
    if residual is not None:
        _shape(residual)
    rows = max(1, ELEMENTS // channels)
    tiles = triton.cdiv(pixels, rows)
    means, squares = torch.empty((2, samples * groups, tiles), dtype=torch.float32, device=x.device).unbind()
    launch(_tile_kernel, (tiles, samples))(
        x, x if bias is None else bias, x if residual is None else residual, x, means, squares, pixels, tiles,
        CHANNELS=channels, GROUPS=groups, ROWS=rows, BIAS=bias is not None, ADD=residual is not None, num_warps=WARPS,
    )  # fmt: skip
    return x, (means, squares)


def normalize(
    x: torch.Tensor, bias: torch.Tensor | None, partials: Partials, norm: tuple[torch.Tensor, torch.Tensor, float],
    groups: int, *, silu: bool,
) -> torch.Tensor:  # fmt: skip
    """GroupNorm of ``x + bias`` from its statistics, then SiLU. ``norm``: float32 weight and bias, and epsilon."""
    samples, channels, pixels = _shape(x)
    weight, offset, eps = norm
    rows = max(1, ELEMENTS // channels)
    tiles = partials[0].shape[1]
    scale, shift = torch.empty((2, samples, channels), dtype=torch.float32, device=x.device).unbind()
    launch(_finish_kernel, (groups, samples))(
        *partials, weight, offset, weight if bias is None else bias, scale, shift, pixels, tiles, eps,
        WIDTH=channels // groups, GROUPS=groups, ROWS=rows, BLOCK=PARTIALS,
        BIAS=bias is not None, num_warps=WARPS,
    )  # fmt: skip
    out = torch.empty_like(x)
    launch(_normalize_kernel, (triton.cdiv(pixels, rows), samples))(
        x, scale, shift, out, pixels, CHANNELS=channels, ROWS=rows, SILU=silu, num_warps=WARPS
    )
    return out


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention of one head wider than flash kernels take, [samples, tokens, width] each, in slices of the matrix."""
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    tokens, factor = key.shape[1], query.shape[2] ** -0.5
    rows = max(128, SCORE_BYTES // (4 * tokens))
    for sample in range(query.shape[0]):
        for some, into in zip(query[sample].split(rows), out[sample].split(rows), strict=True):
            weights = _softmax(_scores(some, key[sample]), factor, query.dtype)
            torch.mm(weights, value[sample], out=into)
    return out


def _scores(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """float32 [rows, tokens]: rounded to bfloat16, large scores would be off by percents."""
    if query.dtype == torch.float32 or not query.is_cuda:
        return query.float() @ key.float().t()
    return torch.mm(query, key.t(), out_dtype=torch.float32)


def _softmax(scores: torch.Tensor, factor: float, dtype: torch.dtype) -> torch.Tensor:
    """softmax(factor * scores) of each row, in ``dtype``."""
    rows, columns = scores.shape
    out = torch.empty((rows, columns), dtype=dtype, device=scores.device)
    launch(_softmax_kernel, (rows,))(scores, out, columns, factor, BLOCK=SCORES, num_warps=WARPS)
    return out


def _shape(x: torch.Tensor) -> tuple[int, int, int]:
    """(samples, channels, pixels) of a picture in channels-last."""
    samples, channels, height, width = x.shape
    if not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"expected channels-last, got strides {x.stride()} for {tuple(x.shape)}")
    return samples, channels, height * width
