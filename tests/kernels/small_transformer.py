"""A FLUX.2 transformer of two double and three single blocks, and what it is called with."""

from __future__ import annotations

import torch
from diffusers import Flux2Transformer2DModel
from torch import nn


def transformer(dtype: torch.dtype, heads: int = 3) -> Flux2Transformer2DModel:
    torch.manual_seed(0)
    model = Flux2Transformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=heads,
        joint_attention_dim=24, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def inputs(dtype: torch.dtype, batch: int = 2, text: int = 7) -> dict:
    zero = torch.zeros(1, dtype=torch.long)
    return {
        "hidden_states": torch.randn(batch, 16, 16, dtype=dtype),
        "encoder_hidden_states": torch.randn(batch, text, 24, dtype=dtype),
        "timestep": torch.linspace(0.3, 0.7, batch, dtype=dtype),
        "img_ids": torch.cartesian_prod(zero, torch.arange(4), torch.arange(4), zero),
        "txt_ids": torch.cartesian_prod(zero, zero, zero, torch.arange(text)),
        "return_dict": False,
    }
