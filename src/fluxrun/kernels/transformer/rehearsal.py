"""One forward of a fused transformer without weights: it launches the kernels that a real one launches.

Between the kernels nothing is computed; the shapes and strides that reach them are those of the run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
from torch import nn

from fluxrun.kernels.transformer import triton_ops
from fluxrun.kernels.transformer.blocks import Attention, Fp8Attention, How, Ops, Pair, Project, fuse_by
from fluxrun.kernels.transformer.fp8_attention import Scales
from fluxrun.kernels.transformer.fp8_scales import fp8_scales
from fluxrun.kernels.transformer.matmul_choice import Multiply, by_torch
from fluxrun.kernels.transformer.triton_ops import Rows

META = torch.device("meta")


class Shape(NamedTuple):
    """What one call of the transformer is given."""

    batch: int
    image_tokens: int
    text_tokens: int


@dataclass(frozen=True)
class Rehearsed(How):
    """Fused blocks that launch their kernels and compute nothing else."""

    quantized: Collection[nn.Module] = ()
    """The layers that will be in float8."""
    ops: Ops = triton_ops
    counters: Counter[str] = field(default_factory=Counter)
    fp8_attention: bool = False
    in_place: bool = False
    multiply: Callable[[], Multiply] = lambda: by_torch

    def projection(self, *layers: nn.Module) -> Project:
        return _NoMatmul(layers, quantized=all(layer in self.quantized for layer in layers))

    def in_fp8(self, norms: Sequence[Pair]) -> Fp8Attention | None:
        return _NoAttention() if self.fp8_attention else None

    def dispatch(self, attn: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return _as(q)


class _NoMatmul:
    def __init__(self, layers: Sequence[nn.Module], *, quantized: bool) -> None:
        self.quantized = quantized
        self._width = sum(layer.out_features for layer in layers if isinstance(layer, nn.Linear))

    def __call__(self, rows: Rows, dtype: torch.dtype) -> torch.Tensor:
        data = rows if isinstance(rows, torch.Tensor) else rows.data
        return torch.empty((len(data), self._width), dtype=dtype, device=META)


class _NoAttention:
    def scales(
        self, values: Sequence[torch.Tensor], shared: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> Scales:
        return Scales(*fp8_scales(values, torch.empty(2, dtype=torch.float32, device=META)))

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scales: Scales) -> torch.Tensor:
        return _as(q)


def _as(q: torch.Tensor) -> torch.Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def rehearse(transformer: Flux2Transformer2DModel, how: Rehearsed, shape: Shape, dtype: torch.dtype) -> None:
    """Call the blocks of a transformer of the meta device, fused, as the transformer calls them.

    Nothing but tensors is made on the way: to compute with them, torch would import sympy for the meta device.
    """
    fuse_by(transformer, how)
    config, (batch, image_tokens, text_tokens) = transformer.config, shape
    size, tokens = config["attention_head_dim"], image_tokens + text_tokens
    width = config["num_attention_heads"] * size

    def empty(*sizes: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(sizes, dtype=of, device=META)

    rotary = (empty(tokens, size, of=torch.float32), empty(tokens, size, of=torch.float32))
    text, image = empty(batch, text_tokens, width), empty(batch, image_tokens, width)
    modulation = empty(batch, 6 * width)
    for block in transformer.transformer_blocks:
        text, image = block(image, text, temb_mod_img=modulation, temb_mod_txt=modulation, image_rotary_emb=rotary)
    both, modulation = torch.cat([text, image], dim=1), empty(batch, 3 * width)
    for block in transformer.single_transformer_blocks:
        both = block(both, None, temb_mod=modulation, image_rotary_emb=rotary)
