"""bitsandbytes' four-bit normal floats, in ordinary tensors."""

from __future__ import annotations

import torch
from torch import nn

BLOCK = 64
"""Weights that share a scale."""


class Nf4Linear(nn.Linear):
    """A linear layer that multiplies by its weights unpacked.

    bitsandbytes' own layer keeps the scales in attributes of a tensor subclass, which are lost wherever weights are
    shared or moved; here both are parameters, so that every memory option and LoRA files work as with any other layer.
    """

    def __init__(self, linear: nn.Linear, place: str, device: str) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        weight = linear.weight.detach().to(device).contiguous()
        packed, scales = torch.ops.bitsandbytes.quantize_4bit(weight, BLOCK, "nf4", torch.uint8)
        self.weight = nn.Parameter(packed.to(place), requires_grad=False)
        self.scales = nn.Parameter(scales.to(place), requires_grad=False)
        self.bias = linear.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As ``nn.Linear``'s, in the input's dtype."""
        shape = (self.out_features, self.in_features)
        weight = torch.ops.bitsandbytes.dequantize_4bit(self.weight, self.scales, BLOCK, "nf4", shape, input.dtype)
        return nn.functional.linear(input, weight, self.bias)
