"""Qwen3's decoder layers with fewer kernels: the same modules and weights, another ``forward``, the same bits."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RMSNorm

from fluxrun.kernels.text_encoder.proof import Ops, Sizes, proven
from fluxrun.kernels.text_encoder.torch_ops import Norm


class FusedLayer:
    """The forward of a ``Qwen3DecoderLayer`` that reads a prompt with a mask: what else it is asked, it hands on."""

    def __init__(self, layer: Qwen3DecoderLayer, ops: Ops) -> None:
        self.ops, self.original = ops, layer.forward
        self.attention, self.mlp = layer.self_attn, layer.mlp
        self.norms = (layer.input_layernorm, layer.post_attention_layernorm)

    def __call__(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Any = None,
        **others: Any,
    ) -> torch.Tensor:
        """As the original; [batch, tokens, width] in and out."""
        if attention_mask is None or position_embeddings is None or past_key_values is not None:
            return self.original(
                hidden_states, attention_mask=attention_mask, position_embeddings=position_embeddings,
                past_key_values=past_key_values, **others,
            )  # fmt: skip
        hidden_states = hidden_states.contiguous()
        _, x = self.ops.add_rms_norm(hidden_states, None, _norm(self.norms[0]))
        attended = self._attend(x, attention_mask, position_embeddings)
        hidden_states, x = self.ops.add_rms_norm(hidden_states, attended, _norm(self.norms[1]))
        x = self.ops.swiglu(self.mlp.gate_proj(x), self.mlp.up_proj(x))
        return hidden_states + cast(torch.Tensor, self.mlp.down_proj(x))

    def _attend(self, x: torch.Tensor, mask: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        attention = self.attention
        projected = (attention.q_proj(x), attention.k_proj(x), attention.v_proj(x))
        heads = self.ops.heads(projected, (_norm(attention.q_norm), _norm(attention.k_norm)), rotary)
        attended = F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=attention.scaling)
        return cast(torch.Tensor, attention.o_proj(attended.transpose(1, 2).reshape(*x.shape[:2], -1)))


def fuse(encoder: PreTrainedModel | None, tokens: int) -> dict[str, Any]:
    """Give every layer of a Qwen3 text encoder its fused forward; returns how many, and who computes what.

    ``tokens``: of the prompts that it will read. Nothing is changed where a layer's bits would be others.
    """
    if encoder is None or encoder.config.model_type != "qwen3":
        return {"text_encoder_layers": 0, "text_encoder": "not Qwen3" if encoder else "not in this pipeline"}
    layers = [layer for layer in encoder.get_decoder().layers if isinstance(layer, Qwen3DecoderLayer)]
    weight = next(encoder.parameters())
    ops = proven(_sizes(encoder, tokens), weight.dtype, weight.device)
    fused = [FusedLayer(layer, ops) for layer in layers]
    if not _same_bits(layers[0], fused[0], tokens):
        return {"text_encoder_layers": 0, "text_encoder": "a layer as a whole has other bits than transformers'"}
    for layer, forward in zip(layers, fused, strict=True):
        layer.forward = forward  # type: ignore[method-assign, assignment]  # called as diffusers and transformers call it
    return {"text_encoder_layers": len(layers), "text_encoder": ops.by}


@torch.no_grad()
def _same_bits(layer: Qwen3DecoderLayer, fused: FusedLayer, tokens: int) -> bool:
    """Whether both compute the same of random hidden states, most of them padding, as a prompt's are."""
    weight = layer.input_layernorm.weight
    generator = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(1, tokens, len(weight), generator=generator, device=weight.device).to(weight.dtype)
    angles = torch.randn(1, tokens, layer.self_attn.head_dim, generator=generator, device=weight.device)
    positions = torch.arange(tokens, device=weight.device)
    mask = (positions <= positions[:, None]) & (positions < max(1, tokens // 8))
    rotary = (angles.cos().to(weight.dtype), angles.sin().to(weight.dtype))
    as_it_is = fused.original(x, attention_mask=mask[None, None], position_embeddings=rotary)
    return torch.equal(fused(x, attention_mask=mask[None, None], position_embeddings=rotary), as_it_is)


def _sizes(encoder: PreTrainedModel, tokens: int) -> Sizes:
    config = encoder.config
    return Sizes(
        config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim,
        config.intermediate_size, config.rms_norm_eps, tokens,
    )  # fmt: skip


def _norm(module: nn.Module) -> Norm:
    assert isinstance(module, Qwen3RMSNorm)
    return Norm(module.weight, module.variance_epsilon)
