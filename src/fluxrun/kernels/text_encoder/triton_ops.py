"""The kernels between a Qwen3 layer's matmuls, rounding to bfloat16 wherever transformers' operations do.

A norm's sum must be added up in the order of torch's reduction (aten/src/ATen/native/cuda/Reduce.cuh), or a last bit
differs: a warp for each row, four sums in each of its 32 lanes, the four added one after the other, then the lanes. In
which order a lane reads, and how the lanes pair, differs between versions of torch. So the order is an argument, and
``proof.py`` finds out which one is torch's here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fluxrun.kernels.text_encoder.torch_ops import Heads, Norm

EXACT = {"enable_fp_fusion": False}
"""A multiply-add contracted into one operation would skip the rounding between the two."""

LANES: tl.constexpr = tl.constexpr(32)

STEP = 128
"""Values that a warp reads at once, four in each lane: widths must be multiples."""

AT_ONCE = 1024
"""Elements of a program that does the same to each."""

HEADS_AT_ONCE = 4


class Order(NamedTuple):
    """How torch adds up a row."""

    side_by_side: bool
    """Whether a lane's four values lie next to each other, or 32 apart."""
    neighbours: bool
    """Whether lanes pair with the next one first, or with the one 16 away."""


ORDERS = (Order(True, False), Order(False, False), Order(True, True), Order(False, True))
"""The likeliest first: in recent torch sources lanes pair 16 apart, and wide rows are read four side by side."""


@triton.jit
def _rounded(value, like):
    """``value`` as it would be after a store to and a load from a tensor of ``like``'s dtype."""
    return value.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def _halved(sums, ROWS: tl.constexpr, COUNT: tl.constexpr, NEIGHBOURS: tl.constexpr):
    """[ROWS, COUNT] -> [ROWS, COUNT / 2]: each lane's sum plus its partner's."""
    if NEIGHBOURS:
        first, second = tl.split(tl.reshape(sums, (ROWS, COUNT // 2, 2)))
    else:
        first, second = tl.split(tl.permute(tl.reshape(sums, (ROWS, 2, COUNT // 2)), (0, 2, 1)))
    return first + second


@triton.jit
def _inverse(
    first, second, third, fourth, WIDTH: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr, NEIGHBOURS: tl.constexpr
):
    """The four sums of squares of each lane, [ROWS, LANES] -> [ROWS, 1], 1 / sqrt(mean + eps)."""
    sums = ((first + second) + third) + fourth
    sums = _halved(sums, ROWS, 32, NEIGHBOURS)
    sums = _halved(sums, ROWS, 16, NEIGHBOURS)
    sums = _halved(sums, ROWS, 8, NEIGHBOURS)
    sums = _halved(sums, ROWS, 4, NEIGHBOURS)
    sums = _halved(sums, ROWS, 2, NEIGHBOURS)
    return tl.rsqrt(sums * (1.0 / WIDTH) + EPS)


@triton.jit
def _stream_part(x, y, columns, ADD: tl.constexpr):
    """Some values of ``x``, or of ``x + y``."""
    value = tl.load(x + columns).to(tl.float32)
    if ADD:
        value = _rounded(value + tl.load(y + columns).to(tl.float32), x)
    return value


@triton.jit
def _rms_norm_kernel(
    x, y, weight, summed, out,
    WIDTH: tl.constexpr, EPS: tl.constexpr, ADD: tl.constexpr, SIDE_BY_SIDE: tl.constexpr, NEIGHBOURS: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * WIDTH
    lanes = tl.arange(0, LANES)[None, :]
    first_column = lanes * 4 if SIDE_BY_SIDE else lanes
    apart: tl.constexpr = 1 if SIDE_BY_SIDE else 32
    first = tl.zeros((1, LANES), tl.float32)
    second, third, fourth = first, first, first
    for step in tl.static_range(WIDTH // 128):
        columns = start + step * 128 + first_column
        value = _stream_part(x, y, columns, ADD)
        first += value * value
        value = _stream_part(x, y, columns + apart, ADD)
        second += value * value
        value = _stream_part(x, y, columns + 2 * apart, ADD)
        third += value * value
        value = _stream_part(x, y, columns + 3 * apart, ADD)
        fourth += value * value
    inverse = _inverse(first, second, third, fourth, WIDTH, EPS, 1, NEIGHBOURS)
    for step in tl.static_range(WIDTH // 128):
        columns = step * 128 + tl.arange(0, 128)[None, :]
        value = _stream_part(x, y, start + columns, ADD)
        if ADD:
            tl.store(summed + start + columns, value.to(summed.dtype.element_ty))
        factor = tl.load(weight + columns).to(tl.float32)
        tl.store(out + start + columns, (factor * _rounded(value * inverse, x)).to(out.dtype.element_ty))


@triton.jit
def _quarter(source, factor, inverse, mask, channel, like):
    """32 channels of each head, normed and weighted."""
    value = tl.load(source + channel, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(factor + channel + mask.to(tl.int32) * 0).to(tl.float32)
    return _rounded(weight * _rounded(value * inverse, like), like)


@triton.jit
def _square(source, channel, mask):
    value = tl.load(source + channel, mask=mask, other=0.0).to(tl.float32)
    return value * value


@triton.jit
def _turned(value, partner, cos, sin, channel, like, SECOND: tl.constexpr):
    """``value * cos`` plus the other half, its sign changed for the first half, times ``sin``."""
    straight = _rounded(value * tl.load(cos + channel).to(tl.float32), like)
    crossed = _rounded(partner * tl.load(sin + channel).to(tl.float32), like)
    return straight + crossed if SECOND else straight - crossed


@triton.jit
def _store_repeated(target, value, head, channel, mask, head_stride, REPEATS: tl.constexpr):
    """Each head's ``value`` as so many heads."""
    for repeat in tl.static_range(REPEATS):
        place = target + (head * REPEATS + repeat) * head_stride + channel
        tl.store(place, value.to(target.dtype.element_ty), mask=mask)


@triton.jit
def _heads_kernel(
    projected, factor, cos, sin, out, tokens, rotary_stride, heads, row_stride, batch_stride, token_stride, head_stride,
    HEADS: tl.constexpr, EPS: tl.constexpr, NORM: tl.constexpr, REPEATS: tl.constexpr,
    SIDE_BY_SIDE: tl.constexpr, NEIGHBOURS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    sample, token = row // tokens, row % tokens
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    mask = (head < heads) & (lane >= 0)
    source = projected + row.to(tl.int64) * row_stride + head * 128
    target = out + sample.to(tl.int64) * batch_stride + token.to(tl.int64) * token_stride
    if NORM:
        squared = lane * 4 if SIDE_BY_SIDE else lane
        apart: tl.constexpr = 1 if SIDE_BY_SIDE else 32
        inverse = _inverse(
            _square(source, squared, mask), _square(source, squared + apart, mask),
            _square(source, squared + 2 * apart, mask), _square(source, squared + 3 * apart, mask),
            128, EPS, HEADS, NEIGHBOURS,
        )  # fmt: skip
        angles = sample.to(tl.int64) * rotary_stride + token.to(tl.int64) * 128
        first = _quarter(source, factor, inverse, mask, lane, projected)
        second = _quarter(source, factor, inverse, mask, lane + 32, projected)
        third = _quarter(source, factor, inverse, mask, lane + 64, projected)
        fourth = _quarter(source, factor, inverse, mask, lane + 96, projected)
        cos, sin = cos + angles, sin + angles
        value = _turned(first, third, cos, sin, lane, projected, False)
        _store_repeated(target, value, head, lane, mask, head_stride, REPEATS)
        value = _turned(second, fourth, cos, sin, lane + 32, projected, False)
        _store_repeated(target, value, head, lane + 32, mask, head_stride, REPEATS)
        value = _turned(third, first, cos, sin, lane + 64, projected, True)
        _store_repeated(target, value, head, lane + 64, mask, head_stride, REPEATS)
        value = _turned(fourth, second, cos, sin, lane + 96, projected, True)
        _store_repeated(target, value, head, lane + 96, mask, head_stride, REPEATS)
    else:
        for part in tl.static_range(4):
            value = tl.load(source + lane + 32 * part, mask=mask, other=0.0)
            _store_repeated(target, value, head, lane + 32 * part, mask, head_stride, REPEATS)


@triton.jit
def _swiglu_kernel(gate, up, out, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < count
    value = tl.load(gate + place, mask=mask, other=0.0).to(tl.float32)
    factor = tl.load(up + place, mask=mask, other=0.0).to(tl.float32)
    value = _rounded(value / (1.0 + tl.exp(-value)), gate)
    tl.store(out + place, (value * factor).to(out.dtype.element_ty), mask=mask)


# -- what the layers call --------------------------------------------------------------------------------------------


def add_rms_norm(
    x: torch.Tensor, y: torch.Tensor | None, norm: Norm, order: Order
) -> tuple[torch.Tensor, torch.Tensor]:
    """(``x + y``, RMSNorm of it); without ``y`` of ``x`` itself. Contiguous, [..., width], 128 divides the width."""
    width = x.shape[-1]
    summed, out = x if y is None else torch.empty_like(x), torch.empty_like(x)
    _rms_norm_kernel[(x.numel() // width,)](
        x, x if y is None else y, norm.weight, summed, out,
        WIDTH=width, EPS=norm.eps, ADD=y is not None, SIDE_BY_SIDE=order.side_by_side, NEIGHBOURS=order.neighbours,
        num_warps=1, **EXACT,
    )  # fmt: skip
    return summed, out


def heads(
    projected: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    norms: tuple[Norm, Norm],
    rotary: tuple[torch.Tensor, torch.Tensor],
    order: Order,
) -> Heads:
    """As ``torch_ops.heads``, for heads of 128; the layouts in memory are those that transformers' operations leave."""
    batch, tokens = projected[0].shape[:2]
    count = projected[0].shape[2] // 128
    query = torch.empty((batch, tokens, count, 128), dtype=projected[0].dtype, device=projected[0].device)
    key, value = (torch.empty((batch, count, tokens, 128), dtype=query.dtype, device=query.device) for _ in range(2))
    cos, sin = rotary
    results = Heads(query.transpose(1, 2), key, value)
    for part, out, norm in zip(projected, results, (*norms, None), strict=True):
        own = part.shape[2] // 128
        grid = (batch * tokens, triton.cdiv(own, HEADS_AT_ONCE))
        _heads_kernel[grid](
            part, part if norm is None else norm.weight, cos, sin, out, tokens, cos.stride(0) if len(cos) > 1 else 0,
            own, part.stride(1), out.stride(0), out.stride(2), out.stride(1),
            HEADS=HEADS_AT_ONCE, EPS=0.0 if norm is None else norm.eps, NORM=norm is not None, REPEATS=count // own,
            SIDE_BY_SIDE=order.side_by_side, NEIGHBOURS=order.neighbours, num_warps=4, **EXACT,
        )  # fmt: skip
    return results


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``; both contiguous."""
    out = torch.empty_like(gate)
    count = gate.numel()
    _swiglu_kernel[(triton.cdiv(count, AT_ONCE),)](gate, up, out, count, BLOCK=AT_ONCE, num_warps=4, **EXACT)
    return out
