"""The device's ceilings at FLUX.2's shapes: matmuls in bf16 and fp8, attention, memory bandwidth."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

MATMULS = {
    "square": (8192, 8192, 8192),
    "dev single block in": (4608, 6144, 55296),
    "dev single block out": (4608, 24576, 6144),
    "klein-4B single block in": (4608, 3072, 27648),
    "klein-4B single block out": (4608, 12288, 3072),
}
"""Rows, inner and outer dimension; 4608 is 4096 image and 512 text tokens."""
ATTENTION = {"dev": 48, "klein-4B": 24}
"""Heads; 4608 tokens, head size 128."""
TOKENS, HEAD = 4608, 128
COPIED_BYTES = 2**30
REPEATS = 12


def measure() -> list[dict[str, Any]]:
    """One row per kernel: what, unit, median rate and all samples. On a CPU everything is small and means nothing."""
    cuda = torch.cuda.is_available()
    shrink = 1 if cuda else 32
    rows = []
    for name, shape in MATMULS.items():
        rows += _matmuls(name, *(n // shrink for n in shape), cuda=cuda)
    for name, heads in ATTENTION.items():
        rows += _attention(name, heads, TOKENS // shrink, cuda)
    return [*rows, _copy(COPIED_BYTES // shrink**2, cuda)]


def _matmuls(name: str, rows: int, inner: int, outer: int, *, cuda: bool) -> list[dict[str, Any]]:
    device = "cuda" if cuda else "cpu"
    x = torch.randn(rows, inner, device=device, dtype=torch.bfloat16)
    w = torch.randn(outer, inner, device=device, dtype=torch.bfloat16)
    teraflop = 2 * rows * inner * outer / 1e12
    measured = [_row(f"bf16 matmul, {name}", "TFLOP/s", teraflop, lambda: x @ w.T, cuda)]
    if cuda and torch.cuda.get_device_capability() >= (8, 9):
        x8, w8 = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn).T
        sx, sw = torch.ones(rows, 1, device=device), torch.ones(1, outer, device=device)

        def scaled() -> torch.Tensor:
            return torch._scaled_mm(x8, w8, sx, sw, out_dtype=torch.bfloat16, use_fast_accum=True)

        measured.append(_row(f"fp8 rowwise matmul, {name}", "TFLOP/s", teraflop, scaled, cuda))
    return measured


def _attention(name: str, heads: int, tokens: int, cuda: bool) -> list[dict[str, Any]]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    device = "cuda" if cuda else "cpu"
    q, k, v = (torch.randn(1, heads, tokens, HEAD, device=device, dtype=torch.bfloat16) for _ in range(3))
    teraflop = 4 * tokens**2 * heads * HEAD / 1e12
    kernels = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION} if cuda else {}
    rows = []
    for kernel, backend in kernels.items():
        with sdpa_kernel(backend):
            rows.append(
                _row(
                    f"{kernel} attention, {name}",
                    "TFLOP/s",
                    teraflop,
                    lambda: scaled_dot_product_attention(q, k, v),
                    cuda,
                )
            )
    return rows


def _copy(size: int, cuda: bool) -> dict[str, Any]:
    """Bytes read and written per second while one buffer is copied to another on the device."""
    device = "cuda" if cuda else "cpu"
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _row("device copy, read and written", "GB/s", 2 * size / 1e9, lambda: target.copy_(source), cuda)


def _row(what: str, unit: str, work: float, call: Callable[[], Any], cuda: bool) -> dict[str, Any]:
    """``work`` (of ``unit`` times a second) over the seconds of each call."""
    for _ in range(3):
        call()
    seconds = [_seconds(call, cuda) for _ in range(REPEATS)]
    return {"what": what, "unit": unit, "samples": [work / s for s in seconds]}


def _seconds(call: Callable[[], Any], cuda: bool) -> float:
    if not cuda:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3
