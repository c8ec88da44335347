"""The fused kernels themselves. Each rounds to the tensors' dtype wherever diffusers' eager code does.

Between two matmuls a FLUX.2 block reads and writes the same rows several times (norm, modulation, rotary, SwiGLU,
concatenation, and with float8 the row maximum and the cast). Each kernel here does one such stretch in one pass.

In bfloat16, unquantized, and for widths that 512 divides, the results are eager's to the bit: a last bit that differs
in one norm moves the output of a whole model by as much as another attention kernel does (2e-2 for klein-4B, 5e-2 for
dev, on random weights). So sums are taken in the order of torch's CUDA kernel
(aten/src/ATen/native/cuda/layer_norm_kernel.cu, ``vectorized_layer_norm_kernel``): 128 threads, each over its 4 of
every 512 values, then pairwise, 16 threads apart, 8, 4, 2, 1, and so the 4 warps. Triton's own reductions pair in
that order where a thread holds those 4 values, which is why programs here have 4 warps and 512 values at a time. So
it is with torch 2.11 and Triton 3.6, by ``tests/gpu/test_kernels.py``; if either changes its order, last bits differ.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fluxrun.kernels.ahead import launch
from fluxrun.kernels.transformer.exchange import head_layout

FP8_MAX: tl.constexpr = tl.constexpr(448.0)  # largest float8_e4m3fn

TINY: tl.constexpr = tl.constexpr(1e-12)  # keeps the scale of an all-zero row finite; torchao's value

EXACT = {"enable_fp_fusion": False}
"""A multiply-add contracted into one operation would skip the rounding that eager does between the two."""


class Scaled(NamedTuple):
    """Rows in float8 with one scale each: what a float8 matmul with row-wise scaling takes."""

    data: torch.Tensor
    """float8_e4m3fn [rows, features]"""
    scale: torch.Tensor
    """float32 [rows, 1]"""


Rows = torch.Tensor | Scaled

AT_ONCE: tl.constexpr = tl.constexpr(512)
"""Values that torch's norm kernel reads at once, 4 in each of 128 threads."""

THREADS: tl.constexpr = tl.constexpr(128)


@triton.jit
def _rounded(value, like):
    """``value`` as it would be after a store to and a load from a tensor of ``like``'s dtype."""
    return value.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def _cast(value, multiplier, like, QUANTIZE: tl.constexpr):
    """``value`` in ``like``'s dtype; scaled and held to float8's range if ``QUANTIZE``."""
    if QUANTIZE:
        value = tl.minimum(tl.maximum(value * multiplier, -FP8_MAX), FP8_MAX)
    return value.to(like.dtype.element_ty)


@triton.jit
def _store(value, out, scales, row, columns, mask, width, QUANTIZE: tl.constexpr):
    """Store one row: as it is, or as float8 with its scale. Masked-out values must be 0."""
    if QUANTIZE:
        scale = tl.maximum(tl.max(tl.abs(value)), TINY) / FP8_MAX
        tl.store(scales + row, scale)
        value = tl.minimum(tl.maximum(value / scale, -FP8_MAX), FP8_MAX)
    tl.store(out + row.to(tl.int64) * width + columns, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _modulated(normed, scale, shift, like):
    """``(1 + scale) * normed + shift``, each step rounded as eager rounds it."""
    return _rounded(_rounded(_rounded(1.0 + scale, like) * normed, like) + shift, like)


@triton.jit
def _fours(value, ROWS: tl.constexpr, THREADS: tl.constexpr):
    """[ROWS, 4 * THREADS] -> the first, second, third and fourth value of each thread, [ROWS, THREADS] each."""
    odd, even = tl.split(tl.reshape(value, (ROWS, THREADS, 2, 2)))
    first, third = tl.split(odd)
    second, fourth = tl.split(even)
    return first, second, third, fourth


@triton.jit
def _with(mean, squares, value, COUNT: tl.constexpr):
    """Welford's running mean and sum of squared differences with one more value, the COUNT-th."""
    delta = value - mean
    updated = tl.fma(delta, 1.0 / COUNT, mean)
    return updated, tl.fma(delta, value - updated, squares)


@triton.jit
def _merged(mean_a, squares_a, count_a, mean_b, squares_b, count_b):
    """Two of Welford's results as one."""
    delta = mean_a - mean_b
    count = count_a + count_b
    share_a, share_b = tl.div_rn(count_a, count), tl.div_rn(count_b, count)
    return share_a * mean_a + share_b * mean_b, squares_a + squares_b + delta * delta * count_a * share_b, count


@triton.jit
def _stream_part(x, y, gate, start, gate_start, columns, ADD: tl.constexpr):
    """Some columns of a row of ``x``, or of ``x + gate * y``."""
    value = tl.load(x + start + columns).to(tl.float32)
    if ADD:
        update = tl.load(y + start + columns).to(tl.float32)
        amount = tl.load(gate + gate_start + columns).to(tl.float32)
        value = _rounded(value + _rounded(amount * update, x), x)
    return value


@triton.jit
def _norm_modulate_kernel(
    x, y, gate, shift, scale, summed, out, tokens, gate_stride, mod_stride,
    WIDTH: tl.constexpr, EPS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    sample = row // tokens
    start = row.to(tl.int64) * WIDTH
    mean = tl.zeros((1, THREADS), tl.float32)
    squares = tl.zeros((1, THREADS), tl.float32)
    for part in tl.static_range(WIDTH // AT_ONCE):
        columns = part * AT_ONCE + tl.arange(0, AT_ONCE)
        value = _stream_part(x, y, gate, start, sample * gate_stride, columns, ADD)
        if ADD:
            tl.store(summed + start + columns, value.to(summed.dtype.element_ty))
        first, second, third, fourth = _fours(tl.reshape(value, (1, AT_ONCE)), 1, THREADS)
        mean, squares = _with(mean, squares, first, 4 * part + 1)
        mean, squares = _with(mean, squares, second, 4 * part + 2)
        mean, squares = _with(mean, squares, third, 4 * part + 3)
        mean, squares = _with(mean, squares, fourth, 4 * part + 4)
    counts = tl.full((1, THREADS), WIDTH // THREADS, tl.float32)
    mean, squares, _ = tl.reduce((mean, squares, counts), 1, _merged)
    mean, squares = tl.sum(mean, 0), tl.sum(squares, 0)  # of one: a number
    inverse = tl.rsqrt(tl.div_rn(squares, WIDTH * 1.0) + EPS)
    for part in tl.static_range(WIDTH // AT_ONCE):
        columns = part * AT_ONCE + tl.arange(0, AT_ONCE)
        value = _stream_part(x, y, gate, start, sample * gate_stride, columns, ADD)
        factor = tl.load(scale + sample * mod_stride + columns).to(tl.float32)
        offset = tl.load(shift + sample * mod_stride + columns).to(tl.float32)
        result = _modulated(_rounded(inverse * (value - mean), x), factor, offset, x)
        tl.store(out + start + columns, result.to(out.dtype.element_ty))


@triton.jit
def _norm_modulate_row_kernel(
    x, y, gate, shift, scale, summed, out, scales, tokens, gate_stride, mod_stride,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr, ADD: tl.constexpr, QUANTIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    sample = row // tokens
    start = row.to(tl.int64) * WIDTH
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    value = tl.load(x + start + columns, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        update = tl.load(y + start + columns, mask=mask, other=0.0).to(tl.float32)
        amount = tl.load(gate + sample * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
        value = _rounded(value + _rounded(amount * update, x), x)
        tl.store(summed + start + columns, value.to(summed.dtype.element_ty), mask=mask)
    mean = tl.sum(value, 0) / WIDTH
    centred = tl.where(mask, value - mean, 0.0)
    variance = tl.sum(centred * centred, 0) / WIDTH
    normed = _rounded(centred * (1.0 / tl.sqrt(variance + EPS)), x)
    factor = tl.load(scale + sample * mod_stride + columns, mask=mask, other=0.0).to(tl.float32)
    offset = tl.load(shift + sample * mod_stride + columns, mask=mask, other=0.0).to(tl.float32)
    result = _modulated(normed, factor, offset, x)
    _store(result, out, scales, row, columns, mask, WIDTH, QUANTIZE)


@triton.jit
def _gated_add_kernel(x, y, gate, out, tokens, gate_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    start = row.to(tl.int64) * WIDTH
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    value = tl.load(x + start + columns, mask=mask).to(tl.float32)
    update = tl.load(y + start + columns, mask=mask).to(tl.float32)
    amount = tl.load(gate + (row // tokens) * gate_stride + columns, mask=mask).to(tl.float32)
    result = value + _rounded(amount * update, x)
    tl.store(out + start + columns, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _qkv_kernel(
    projected, weight_q, weight_k, cos, sin, q, k, v, tokens, row_stride, offset, heads,
    batch_stride, token_stride, group_stride, head_stride, multipliers,
    SIZE: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, EPS: tl.constexpr, QUANTIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    which = tl.program_id(2)
    sample, token = row // tokens, row % tokens + offset
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    channel = tl.arange(0, SIZE)[None, :]
    mask = (head < heads) & (channel < SIZE)
    source = projected + row.to(tl.int64) * row_stride + (which * heads + head) * SIZE + channel
    target = sample.to(tl.int64) * batch_stride + token.to(tl.int64) * token_stride + channel
    if GROUP > 0:
        target += (head // GROUP).to(tl.int64) * group_stride + (head % GROUP) * head_stride
    else:
        target += head * head_stride
    value = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    multiplier = tl.load(multipliers + which) if QUANTIZE else 1.0
    if which == 2:
        tl.store(v + target, _cast(value, multiplier, v, QUANTIZE), mask=mask)
    else:
        # Every head reads the same weights and angles, each of its threads the four that it needs.
        same = channel + head * 0
        weight = tl.load(weight_q + same)
        if which == 1:
            weight = tl.load(weight_k + same)
        first, second, third, fourth = _fours(value, HEADS, SIZE // 4)
        squares = tl.fma(fourth, fourth, tl.fma(third, third, tl.fma(second, second, first * first)))
        inverse = tl.rsqrt(tl.sum(squares, 1)[:, None] * (1.0 / SIZE) + EPS)
        by_1, by_2, by_3, by_4 = _fours(weight.to(tl.float32), HEADS, SIZE // 4)
        cos_1, cos_2, cos_3, cos_4 = _fours(tl.load(cos + token * SIZE + same), HEADS, SIZE // 4)
        sin_1, sin_2, sin_3, sin_4 = _fours(tl.load(sin + token * SIZE + same), HEADS, SIZE // 4)
        first = _rounded(by_1 * (inverse * first), projected)
        second = _rounded(by_2 * (inverse * second), projected)
        third = _rounded(by_3 * (inverse * third), projected)
        fourth = _rounded(by_4 * (inverse * fourth), projected)
        odd = tl.join(first * cos_1 - second * sin_1, third * cos_3 - fourth * sin_3)
        even = tl.join(second * cos_2 + first * sin_2, fourth * cos_4 + third * sin_4)
        result = _rounded(tl.reshape(tl.join(odd, even), (HEADS, SIZE)), projected)
        if which == 0:
            tl.store(q + target, _cast(result, multiplier, q, QUANTIZE), mask=mask)
        else:
            tl.store(k + target, _cast(result, multiplier, k, QUANTIZE), mask=mask)


@triton.jit
def _pack_kernel(
    attended, gate_up, out, scales, descale, tokens, batch_stride, token_stride, group_stride, head_stride, row_stride,
    SIZE: tl.constexpr, GROUP: tl.constexpr, HIDDEN: tl.constexpr, CHUNK: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, CHUNKS: tl.constexpr, QUANTIZE: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    chunk = tl.arange(0, CHUNKS)[:, None]
    column = chunk * CHUNK + tl.arange(0, CHUNK)[None, :]
    result = tl.zeros((CHUNKS, CHUNK), tl.float32)
    if SECOND > 0:
        mask = (chunk >= FIRST) & (chunk < FIRST + SECOND)
        source = gate_up + row.to(tl.int64) * row_stride + (column - FIRST * CHUNK)
        gate = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(source + HIDDEN, mask=mask, other=0.0).to(tl.float32)
        result = _rounded(_rounded(gate / (1.0 + tl.exp(-gate)), gate_up) * up, gate_up)
    if FIRST > 0:
        mask = (chunk < FIRST) & (column >= 0)
        start = (row // tokens).to(tl.int64) * batch_stride + (row % tokens).to(tl.int64) * token_stride
        head = column // SIZE
        source = attended + start + column % SIZE
        if GROUP > 0:
            source += (head // GROUP).to(tl.int64) * group_stride + (head % GROUP) * head_stride
        else:
            source += head * head_stride
        part = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        if SCALED:
            part = part * tl.load(descale)
        result = tl.where(chunk < FIRST, part, result)
    width = (FIRST + SECOND) * CHUNK
    _store(result, out, scales, row, column, (chunk < FIRST + SECOND) & (column >= 0), width, QUANTIZE)


# -- what the blocks call --------------------------------------------------------------------------------------------


def norm_modulate(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    eps: float,
    *,
    quantize: bool,
    add: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, Rows]:
    """(``x + gate * y``, LayerNorm of it times ``1 + scale`` plus ``shift``); ``add`` is (gate, y).

    ``x`` and ``y`` are contiguous [batch, tokens, width]; gate, shift and scale [batch or 1, 1, width]. The second
    result has [batch * tokens, width], in float8 with row scales if ``quantize``.
    """
    batch, tokens, width = x.shape
    gate, y = add if add is not None else (shift, x)
    summed = _like(x) if add is not None else x
    out, scales = _rows(x, batch * tokens, width, quantize)
    if not quantize and width % AT_ONCE.value == 0:
        launch(_norm_modulate_kernel, (batch * tokens,))(
            x, y, gate, shift, scale, summed, out, tokens, _stride(gate), _stride(shift),
            WIDTH=width, EPS=eps, ADD=add is not None, num_warps=4, **EXACT,
        )  # fmt: skip
        return summed, out
    launch(_norm_modulate_row_kernel, (batch * tokens,))(
        x, y, gate, shift, scale, summed, out, scales, tokens, _stride(gate), _stride(shift),
        WIDTH=width, BLOCK=triton.next_power_of_2(width), EPS=eps, ADD=add is not None, QUANTIZE=quantize,
        num_warps=warps(width), **EXACT,
    )  # fmt: skip
    return summed, Scaled(out, scales) if quantize else out


def gated_add(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """``x + gate * y``; x and y contiguous [batch, tokens, width], gate [batch or 1, 1, width]."""
    batch, tokens, width = x.shape
    out = _like(x)
    launch(_gated_add_kernel, (batch * tokens,))(
        x, y, gate, out, tokens, _stride(gate),
        WIDTH=width, BLOCK=triton.next_power_of_2(width), num_warps=warps(width), **EXACT,
    )  # fmt: skip
    return out


def split_qkv(
    projected: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor],
    rotary: tuple[torch.Tensor, torch.Tensor],
    into: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    eps: float,
    *,
    tokens: int,
    offset: int,
    multipliers: torch.Tensor | None = None,
) -> None:
    """Write RMS-normed and rotated queries and keys, and the values, of ``projected`` into ``into`` from ``offset`` on.

    ``projected``: [batch * tokens, ≥ 3 * heads * size], queries, keys and values side by side; ``norms``: the RMSNorm
    weights [size] of queries and keys; ``rotary``: float32 cos and sin [all tokens, size], each value twice in a row;
    ``into``: q, k and v as ``head_layout`` takes them, [batch, all tokens, …], with equal strides, the last one 1; in
    float8 each is multiplied by its one of ``multipliers`` (float32 [3]).
    """
    q, k, v = into
    heads, group, strides = head_layout(q)
    size = q.shape[-1]
    at_once = max(1, AT_ONCE.value // size)
    grid = (projected.shape[0], triton.cdiv(heads, at_once), 3)
    launch(_qkv_kernel, grid)(
        projected, *norms, *rotary, q, k, v, tokens, projected.stride(0), offset, heads, *strides,
        projected if multipliers is None else multipliers,
        SIZE=size, HEADS=at_once, GROUP=group, EPS=eps, QUANTIZE=multipliers is not None, num_warps=4, **EXACT,
    )  # fmt: skip


def pack(
    attended: torch.Tensor | None,
    gate_up: torch.Tensor | None,
    *,
    quantize: bool,
    descale: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Rows:
    """[attention's output | SwiGLU of ``gate_up``] as rows [batch * tokens, width], the input of the next matmul.

    ``attended``: as ``head_layout`` takes it, any strides but 1 for the last; ``gate_up``: rows
    [batch * tokens, 2 * hidden], gate first, any row stride. Either may be None. ``descale`` (float32 [1]) turns a
    float8 ``attended`` back; then ``dtype`` says what the rows are to be.
    """
    source = attended if attended is not None else gate_up
    assert source is not None
    hidden = gate_up.shape[1] // 2 if gate_up is not None else 0
    batch, tokens = attended.shape[:2] if attended is not None else (len(source), 1)
    heads, group, strides = head_layout(attended) if attended is not None else (0, 0, (0, 0, 0, 0))
    size = attended.shape[-1] if attended is not None else 1
    first = heads * size
    chunk = _chunk(first, hidden)
    chunks = triton.next_power_of_2((first + hidden) // chunk)
    out, scales = _rows(source, batch * tokens, first + hidden, quantize, dtype)
    launch(_pack_kernel, (batch * tokens,))(
        attended if attended is not None else source, gate_up if gate_up is not None else source, out, scales,
        scales if descale is None else descale, tokens, *strides, gate_up.stride(0) if gate_up is not None else 0,
        SIZE=size, GROUP=group, HIDDEN=hidden, CHUNK=chunk, FIRST=first // chunk, SECOND=hidden // chunk, CHUNKS=chunks,
        QUANTIZE=quantize, SCALED=descale is not None, num_warps=warps(chunk * chunks), **EXACT,
    )  # fmt: skip
    return Scaled(out, scales) if quantize else out


def _like(x: torch.Tensor) -> torch.Tensor:
    """Room for a contiguous tensor. Not ``empty_like``: for the meta device, in a rehearsal, it imports sympy."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _rows(
    like: torch.Tensor, rows: int, width: int, quantize: bool, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for the result, and for its scales (a stand-in when there are none)."""
    dtype = torch.float8_e4m3fn if quantize else dtype or like.dtype
    out = torch.empty((rows, width), dtype=dtype, device=like.device)
    return out, torch.empty((rows, 1), dtype=torch.float32, device=like.device) if quantize else out


def _stride(modulation: torch.Tensor) -> int:
    """Elements from one sample's modulation to the next; 0 where all samples share it."""
    return modulation.stride(0) if modulation.shape[0] > 1 else 0


def _chunk(first: int, hidden: int) -> int:
    """The largest power of two up to 1024 that divides both widths."""
    return min(1024, (first | hidden) & -(first | hidden))


def warps(elements: int) -> int:
    """Warps for a row: 16 elements a thread keep enough loads in flight without spilling registers."""
    rounded_up: int = triton.next_power_of_2(elements)
    return min(16, max(1, rounded_up // 512))
