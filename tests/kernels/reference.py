"""What the fused kernels compute, in plain torch: diffusers' own operations in diffusers' own order."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb


class Scaled(tuple):
    """(float8 rows, scales), as the kernels return them."""

    data = property(lambda self: self[0])
    scale = property(lambda self: self[1])


def quantized(rows: torch.Tensor) -> Scaled:
    scale = rows.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 448.0
    return Scaled(((rows.float() / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn), scale))


def _rows(out: torch.Tensor, quantize: bool):
    rows = out.reshape(-1, out.shape[-1])
    return quantized(rows) if quantize else rows


def norm_modulate(x, shift, scale, eps, *, quantize, add=None):
    if add is not None:
        x = x + add[0] * add[1]
    out = (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=eps) + shift
    return x, _rows(out, quantize)


def gated_add(x, y, gate):
    return x + gate * y


def split_qkv(projected, norms, rotary, into, eps, *, tokens, offset, multipliers=None):
    assert multipliers is None, "float8 attention has no reference here"
    size, heads = into[0].shape[-1], into[0].shape[2:-1].numel()
    parts = projected[:, : 3 * heads * size].reshape(-1, tokens, 3, heads, size).unbind(2)
    own = tuple(table[offset : offset + tokens] for table in rotary)
    for part, room, norm in zip(parts, into, (*norms, None), strict=True):
        if norm is not None:
            normed = F.rms_norm(part, (size,), norm, eps)
            made = apply_rotary_emb(normed, own, sequence_dim=1)
        else:
            made = part
        room[:, offset : offset + tokens] = made.unflatten(2, room.shape[2:-1])


def pack(attended, gate_up, *, quantize, descale=None, dtype=None):
    assert (descale, dtype) == (None, None), "float8 attention has no reference here"
    parts = []
    if attended is not None:
        parts.append(attended.flatten(2).flatten(0, 1))
    if gate_up is not None:
        half = gate_up.shape[1] // 2
        parts.append(F.silu(gate_up[:, :half]) * gate_up[:, half:])
    return _rows(torch.cat(parts, dim=1), quantize)
