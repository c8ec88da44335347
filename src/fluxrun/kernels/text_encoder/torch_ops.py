"""What lies between a Qwen3 layer's matmuls, in the operations and the order of transformers: for any device."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F


class Heads(NamedTuple):
    """Queries, keys and values, [batch, heads, tokens, size] each."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


class Norm(NamedTuple):
    """An RMSNorm's numbers."""

    weight: torch.Tensor
    eps: float


def rms_norm(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """RMSNorm over the last dimension, in float32 up to the weight."""
    rows = x.to(torch.float32)
    variance = rows.pow(2).mean(-1, keepdim=True)
    rows = rows * torch.rsqrt(variance + norm.eps)
    return norm.weight * rows.to(x.dtype)


def add_rms_norm(x: torch.Tensor, y: torch.Tensor | None, norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
    """(``x + y``, RMSNorm of it); without ``y`` of ``x`` itself."""
    summed = x if y is None else x + y
    return summed, rms_norm(summed, norm)


def heads(
    projected: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    norms: tuple[Norm, Norm],
    rotary: tuple[torch.Tensor, torch.Tensor],
) -> Heads:
    """Queries and keys normed and rotated; keys and values repeated until there are as many as queries.

    ``projected``: [batch, tokens, heads * size] of queries, keys and values; ``norms`` of queries and keys;
    ``rotary``: cos and sin, [batch or 1, tokens, size].
    """
    size = rotary[0].shape[-1]
    query, key, value = (part.view(*part.shape[:2], -1, size) for part in projected)
    cos, sin = (part.unsqueeze(1) for part in rotary)
    query, key = (rms_norm(part, norm).transpose(1, 2) for part, norm in zip((query, key), norms, strict=True))
    query, key = ((part * cos) + (_half_turned(part) * sin) for part in (query, key))
    repeats = query.shape[1] // key.shape[1]
    return Heads(query, _repeated(key, repeats), _repeated(value.transpose(1, 2), repeats))


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``."""
    return F.silu(gate) * up


def _half_turned(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _repeated(x: torch.Tensor, times: int) -> torch.Tensor:
    batch, count, tokens, size = x.shape
    return x[:, :, None].expand(batch, count, times, tokens, size).reshape(batch, count * times, tokens, size)
