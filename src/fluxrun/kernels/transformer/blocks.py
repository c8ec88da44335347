"""FLUX.2's transformer blocks with fused kernels: the same modules and weights, another ``forward``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_flux2 import (
    Flux2Attention,
    Flux2FeedForward,
    Flux2ParallelSelfAttention,
    Flux2SingleTransformerBlock,
    Flux2Transformer2DModel,
    Flux2TransformerBlock,
)
from torch import nn

from fluxrun.kernels.transformer.cublas_lt import Operands
from fluxrun.kernels.transformer.exchange import Exchange
from fluxrun.kernels.transformer.matmul_choice import Multiply, by_torch

if TYPE_CHECKING:
    from fluxrun.kernels.transformer.fp8_attention import Scales
    from fluxrun.kernels.transformer.triton_ops import Rows

M = TypeVar("M", bound=nn.Module)

Attention = Flux2Attention | Flux2ParallelSelfAttention

Pair = tuple[torch.Tensor, torch.Tensor]
"""Pair tables, cosine and sine; or the weights of two RMSNorms, the queries' and the keys'."""


class Ops(Protocol):
    """The kernels between the matmuls, as ``triton_ops`` has them."""

    def norm_modulate(
        self,
        x: torch.Tensor,
        shift: torch.Tensor,
        scale: torch.Tensor,
        eps: float,
        *,
        quantize: bool,
        add: Pair | None = None,
    ) -> tuple[torch.Tensor, Rows]: ...

    def gated_add(self, x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor: ...

    def split_qkv(
        self,
        projected: torch.Tensor,
        norms: Pair,
        rotary: Pair,
        into: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        eps: float,
        *,
        tokens: int,
        offset: int,
        multipliers: torch.Tensor | None = None,
    ) -> None: ...

    def pack(
        self,
        attended: torch.Tensor | None,
        gate_up: torch.Tensor | None,
        *,
        quantize: bool,
        descale: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Rows: ...


class Fp8Attention(Protocol):
    """Attention in float8, as ``fp8_attention`` has it."""

    def scales(
        self, values: Sequence[torch.Tensor], shared: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> Scales: ...

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scales: Scales) -> torch.Tensor: ...


class Project(Protocol):
    """A matmul with the weights of one or more layers."""

    quantized: bool

    def __call__(self, rows: Rows, dtype: torch.dtype) -> torch.Tensor: ...


class Projection:
    """One matmul for one or more Linear layers over the same input, in their dtype or in torchao's row-wise float8.

    Weights are used in place; those of several layers are put side by side once (a copy) unless they already are.
    Raises ValueError for layers it cannot stand in for, and with ``in_place`` for those it would have to copy.
    ``multiply`` computes it.
    """

    def __init__(self, *layers: nn.Module, in_place: bool = False, multiply: Multiply = by_torch) -> None:
        self.multiply = multiply
        linears = [layer for layer in layers if type(layer) is nn.Linear and layer.bias is None]
        if len(linears) < len(layers):
            raise ValueError("only plain torch.nn.Linear layers without bias are supported")
        weights: list[Any] = [linear.weight.data for linear in linears]  # torchao's have a ``qdata`` and a ``scale``
        self.quantized = all(hasattr(weight, "qdata") for weight in weights)
        if self.quantized:
            self.weight = _joined([weight.qdata for weight in weights], in_place)
            # Too small to be swapped with the block's weights, so that it may be a copy.
            scale = torch.cat([weight.scale.float().reshape(-1, 1) for weight in weights])
            self.scale = scale.reshape(1, -1)
            if self.weight.dtype != torch.float8_e4m3fn or self.scale.shape[1] != self.weight.shape[0]:
                raise ValueError("of the quantized formats only float8 e4m3 with one scale per row is supported")
        elif any(type(weight) is not torch.Tensor for weight in weights):
            raise ValueError(f"weights of type {type(weights[0]).__name__} are not supported")
        else:
            self.weight = _joined(weights, in_place)

    def __call__(self, rows: Rows, dtype: torch.dtype) -> torch.Tensor:
        """rows [n, in] (or float8 with scales, if ``quantized``) -> [n, out] in ``dtype``."""
        if isinstance(rows, torch.Tensor):
            return self.multiply(Operands(rows, self.weight, rows.dtype))
        return self.multiply(Operands(rows.data, self.weight, dtype, (rows.scale, self.scale)))


@dataclass(frozen=True)
class How:
    """By what the blocks compute; the arguments of ``fuse``."""

    ops: Ops
    counters: Counter[str]
    fp8_attention: bool
    in_place: bool
    multiply: Callable[[], Multiply]

    def projection(self, *layers: nn.Module) -> Project:
        """One matmul for these layers."""
        return Projection(*layers, in_place=self.in_place, multiply=self.multiply())

    def in_fp8(self, norms: Sequence[Pair]) -> Fp8Attention | None:
        """Attention in float8 after these norms of queries and keys, if it is to be."""
        if not self.fp8_attention:
            return None
        from fluxrun.kernels.transformer.fp8_attention import CudnnFp8Attention

        return CudnnFp8Attention([query for query, _ in norms], [key for _, key in norms])

    def dispatch(
        self, attn: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, exchanged: bool
    ) -> torch.Tensor:
        """Attention by the kernel of the ``attention`` group, which spreads it by itself where nobody else has."""
        processor: Any = attn.processor  # by diffusers' types it may be any of all its models'
        config = None if exchanged else processor._parallel_config
        return dispatch_attention_fn(q, k, v, backend=processor._attention_backend, parallel_config=config)


def _joined(parts: list[torch.Tensor], in_place: bool) -> torch.Tensor:
    """[rows, in] of each -> [all rows, in]."""
    if len(parts) == 1:
        return parts[0]
    if _side_by_side(parts):
        return parts[0].as_strided((sum(len(part) for part in parts), *parts[0].shape[1:]), parts[0].stride())
    if in_place:
        raise ValueError("weights that are multiplied at once do not lie side by side, and their memory is shared")
    return torch.cat(parts)


def _side_by_side(parts: list[torch.Tensor]) -> bool:
    """Whether these are one matrix's rows already."""
    ends = [part.data_ptr() + part.nbytes for part in parts]
    one = len({part.untyped_storage().data_ptr() for part in parts}) == 1
    return one and all(p.is_contiguous() for p in parts) and ends[:-1] == [part.data_ptr() for part in parts[1:]]


class FusedSingleBlock:
    """The forward of a ``Flux2SingleTransformerBlock``: three fused kernels, attention and two matmuls."""

    def __init__(self, block: Flux2SingleTransformerBlock, how: How) -> None:
        self.ops, self.counters = how.ops, how.counters
        self.attn = block.attn  # not the block itself: a reference cycle would keep the derived weights alive
        self.eps = block.norm.eps
        self.project_in = how.projection(block.attn.to_qkv_mlp_proj)
        self.project_out = how.projection(block.attn.to_out)
        self.attend = Attend(block.attn, [_norms(block.attn)], how)

    def __call__(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        temb_mod: torch.Tensor,
        image_rotary_emb: Pair | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        split_hidden_states: bool = False,
        text_seq_len: int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """As the original; [batch, tokens, width] in and out."""
        _check(joint_attention_kwargs, image_rotary_emb, temb_mod)
        self.counters["fused_block_calls"] += 1
        assert image_rotary_emb is not None
        if encoder_hidden_states is not None:
            text_seq_len = encoder_hidden_states.shape[1]
            hidden_states = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        x = hidden_states.contiguous()
        shift, scale, gate = _chunks(temb_mod, 3)
        _, rows = self.ops.norm_modulate(x, shift, scale, self.eps, quantize=self.project_in.quantized)
        projected = self.project_in(rows, x.dtype)
        attended = self.attend([projected], image_rotary_emb, x.shape[0], x.dtype)
        gate_up = projected[:, 3 * self.attn.inner_dim :]
        y = self.project_out(attended.packed(self.ops, gate_up, quantize=self.project_out.quantized), x.dtype)
        x = self.ops.gated_add(x, y.view_as(x), gate)
        return (x[:, :text_seq_len], x[:, text_seq_len:]) if split_hidden_states else x


class FusedDoubleBlock:
    """The forward of a ``Flux2TransformerBlock``, each stream's three projections in one matmul."""

    def __init__(self, block: Flux2TransformerBlock, how: How) -> None:
        self.ops, self.counters, attn = how.ops, how.counters, block.attn
        self.eps = block.norm1.eps
        self.image = _Stream((attn.to_q, attn.to_k, attn.to_v), attn.to_out[0], block.ff, _norms(attn), how)
        added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        added_norms = (attn.norm_added_q.weight, attn.norm_added_k.weight)
        self.text = _Stream(added, attn.to_add_out, block.ff_context, added_norms, how)
        self.attend = Attend(attn, [self.text.norms, self.image.norms], how)

    def __call__(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb_mod_img: torch.Tensor,
        temb_mod_txt: torch.Tensor,
        image_rotary_emb: Pair | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As the original: (text stream, image stream), [batch, tokens, width]."""
        _check(joint_attention_kwargs, image_rotary_emb, temb_mod_img)
        self.counters["fused_block_calls"] += 1
        assert image_rotary_emb is not None
        streams = (
            (self.text, encoder_hidden_states.contiguous(), _chunks(temb_mod_txt, 6)),
            (self.image, hidden_states.contiguous(), _chunks(temb_mod_img, 6)),
        )
        projected = []
        for stream, x, (shift, scale, *_) in streams:
            _, rows = self.ops.norm_modulate(x, shift, scale, self.eps, quantize=stream.qkv.quantized)
            projected.append(stream.qkv(rows, x.dtype))
        attended = self.attend(projected, image_rotary_emb, hidden_states.shape[0], hidden_states.dtype)
        parts = attended.split([x.shape[1] for _, x, _ in streams])
        text, image = (
            self._after_attention(stream, x, part, modulation)
            for (stream, x, modulation), part in zip(streams, parts, strict=True)
        )
        return text, image

    def _after_attention(
        self,
        stream: _Stream,
        x: torch.Tensor,
        attended: Attended,
        modulation: tuple[torch.Tensor, ...],
    ) -> torch.Tensor:
        _, _, gate, shift, scale, gate_mlp = modulation
        y = stream.out(attended.packed(self.ops, None, quantize=stream.out.quantized), x.dtype).view_as(x)
        x, rows = self.ops.norm_modulate(x, shift, scale, self.eps, quantize=stream.linear_in.quantized, add=(gate, y))
        gate_up = stream.linear_in(rows, x.dtype)
        y = stream.linear_out(self.ops.pack(None, gate_up, quantize=stream.linear_out.quantized), x.dtype)
        return self.ops.gated_add(x, y.view_as(x), gate_mlp)


class _Stream:
    """The weights of one of a double block's two streams."""

    def __init__(self, qkv: Sequence[nn.Module], out: nn.Module, ff: Flux2FeedForward, norms: Pair, how: How) -> None:
        self.qkv, self.out, self.norms = how.projection(*qkv), how.projection(out), norms
        self.linear_in, self.linear_out = how.projection(ff.linear_in), how.projection(ff.linear_out)


class Attended(NamedTuple):
    """Attention's output."""

    data: torch.Tensor
    """[batch, tokens, heads, size], or with the heads in groups [batch, tokens, groups, heads of each, size]"""
    descale: torch.Tensor | None = None
    """Of float8 data: what turns it back into ordinary numbers"""
    dtype: torch.dtype | None = None
    """and the dtype of these."""

    def packed(self, ops: Ops, gate_up: torch.Tensor | None, *, quantize: bool) -> Rows:
        """The rows of the next matmul: this beside the SwiGLU of ``gate_up``."""
        return ops.pack(self.data, gate_up, quantize=quantize, descale=self.descale, dtype=self.dtype)

    def split(self, tokens: list[int]) -> list[Attended]:
        """Each stream's tokens."""
        return [self._replace(data=data) for data in self.data.split(tokens, dim=1)]


class Attend:
    """From a block's projections to attention's output: by the ``attention`` group's kernel, or in float8."""

    def __init__(self, attn: Attention, norms: Sequence[Pair], how: How) -> None:
        self.attn, self.norms, self.how, self.ops = attn, norms, how, how.ops
        assert attn.norm_q.eps is not None
        self.eps = attn.norm_q.eps
        self.fp8 = how.in_fp8(norms)

    def __call__(self, projected: Sequence[torch.Tensor], rotary: Pair, batch: int, dtype: torch.dtype) -> Attended:
        """Attention over all streams, from each one's projected rows."""
        tokens = [len(rows) // batch for rows in projected]
        shape = (batch, sum(tokens), self.attn.heads, self.attn.head_dim)
        kind, device = torch.float8_e4m3fn if self.fp8 else dtype, projected[0].device
        exchange = Exchange.of(self.attn.processor)
        if exchange:
            sent, (q, k, v) = exchange.room(shape, kind, device)
        else:
            q, k, v = (torch.empty(shape, dtype=kind, device=device) for _ in range(3))
        width = self.attn.inner_dim
        values = [rows[:, 2 * width : 3 * width] for rows in projected]
        scales = self.fp8.scales(values, exchange.largest if exchange else None) if self.fp8 else None
        offset = 0
        for rows, norms, count in zip(projected, self.norms, tokens, strict=True):
            self.ops.split_qkv(
                rows, norms, rotary, (q, k, v), self.eps, tokens=count, offset=offset,
                multipliers=scales.multipliers if scales else None,
            )  # fmt: skip
            offset += count
        if exchange:
            q, k, v = exchange.by_heads(sent)
        if self.fp8 and scales:
            attended = Attended(self.fp8(q, k, v, scales), scales.descales[2:], dtype)
        else:
            attended = Attended(self.how.dispatch(self.attn, q, k, v, exchanged=exchange is not None))
        return attended._replace(data=exchange.by_tokens(attended.data)) if exchange else attended


def fuse(
    transformer: Flux2Transformer2DModel,
    ops: Ops,
    counters: Counter[str],
    *,
    fp8_attention: bool = False,
    in_place: bool = False,
    multiply: Callable[[], Multiply] = lambda: by_torch,
) -> dict[str, int]:
    """Give every block of a ``Flux2Transformer2DModel`` its fused forward; returns how many of each kind.

    ``ops`` has the kernels (``triton_ops``); ``counters["fused_block_calls"]`` is counted up with every call.
    ``in_place``: a block's weights must not be copied, as block swap copies others into the same memory later.
    ``multiply`` makes the matmul of one layer.

    Raises ValueError, with nothing changed, when a block's layers are not what the kernels expect.
    """
    return fuse_by(transformer, How(ops, counters, fp8_attention, in_place, multiply))


def fuse_by(transformer: Flux2Transformer2DModel, how: How) -> dict[str, int]:
    """``fuse``, by what ``how`` says."""
    double_blocks = _all_of(transformer.transformer_blocks, Flux2TransformerBlock)
    single_blocks = _all_of(transformer.single_transformer_blocks, Flux2SingleTransformerBlock)
    double = [FusedDoubleBlock(block, how) for block in double_blocks]
    single = [FusedSingleBlock(block, how) for block in single_blocks]
    forwards: list[FusedDoubleBlock | FusedSingleBlock] = [*double, *single]
    for block, forward in zip([*double_blocks, *single_blocks], forwards, strict=True):
        block.forward = forward
    return {"double_blocks": len(double), "single_blocks": len(single)}


def _all_of(modules: nn.ModuleList, kind: type[M]) -> list[M]:
    blocks = [module for module in modules if isinstance(module, kind)]
    if len(blocks) < len(modules):
        raise ValueError(f"not every block is a {kind.__name__}")
    return blocks


def _norms(attn: Flux2Attention | Flux2ParallelSelfAttention) -> Pair:
    return attn.norm_q.weight, attn.norm_k.weight


def _chunks(modulation: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    """Each [batch, 1, width]."""
    return (modulation.unsqueeze(1) if modulation.ndim == 2 else modulation).chunk(count, dim=-1)


def _check(kwargs: dict[str, Any] | None, rotary: Pair | None, modulation: torch.Tensor) -> None:
    """NotImplementedError for what the kernels do not cover: then the option falls back."""
    if kwargs:
        raise NotImplementedError(f"kernels=fused does not take joint_attention_kwargs ({', '.join(kwargs)})")
    if rotary is None or (modulation.ndim == 3 and modulation.shape[1] != 1):
        raise NotImplementedError("kernels=fused needs rotary tables, and one modulation for all tokens")
