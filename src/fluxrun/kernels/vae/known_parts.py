"""The parts of diffusers' VAE decoder that the fast one takes apart: each is what it is taken for, or ValueError."""

from __future__ import annotations

from typing import TypeVar

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

M = TypeVar("M", bound=nn.Module)


def _expect(found: dict[str, bool], where: str) -> None:
    """ValueError naming what is not as the fast decoder knows it."""
    if wrong := [what for what, as_expected in found.items() if not as_expected]:
        raise ValueError(f"{where} of the decoder has another {', '.join(wrong)} than FLUX.2's")


def of_class(module: nn.Module, cls: type[M], where: str) -> M:
    if type(module) is not cls:
        raise ValueError(f"{where} of the decoder has another class than FLUX.2's")
    return module


def check_silu(activation: nn.Module) -> None:
    _expect({"activation": isinstance(activation, nn.SiLU)}, "a block")


def known_block(module: nn.Module) -> ResnetBlock2D:
    block = of_class(module, ResnetBlock2D, "a residual block")
    check_silu(block.nonlinearity)
    expected = {
        "time embedding": block.time_emb_proj is None,
        "resampling": block.upsample is None and block.downsample is None,
        "output scale": block.output_scale_factor == 1,
        "norm": isinstance(block.norm1, nn.GroupNorm) and isinstance(block.norm2, nn.GroupNorm),
    }
    _expect(expected, "a residual block")
    return block


def known_attention(module: nn.Module) -> tuple[Attention, nn.GroupNorm, nn.Linear]:
    """The attention, its norm and its last projection."""
    attention = of_class(module, Attention, "the attention")
    norm, out = attention.group_norm, attention.to_out[0]
    expected = {
        "number of heads": attention.heads == 1,
        "norm": isinstance(norm, nn.GroupNorm) and attention.spatial_norm is None,
        "query or key norm": attention.norm_q is None and attention.norm_k is None,
        "residual": attention.residual_connection and attention.rescale_output_factor == 1,
        "projection": all(part.bias is not None for part in (attention.to_q, attention.to_k, attention.to_v)),
    }
    _expect(expected, "the attention")
    assert isinstance(norm, nn.GroupNorm)
    return attention, norm, of_class(out, nn.Linear, "the attention's last projection")


def known_convolution(module: nn.Module) -> nn.Conv2d:
    """An upsampler's."""
    upsampler = of_class(module, Upsample2D, "an upsampler")
    conv = getattr(upsampler, "conv", None)
    expected = {
        "class": upsampler.interpolate and not upsampler.use_conv_transpose,
        "norm": upsampler.norm is None,
        "kernel": isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3) and conv.padding == (1, 1),
    }
    _expect(expected, "an upsampler")
    assert isinstance(conv, nn.Conv2d)
    return conv


def plain_convolution(conv: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a convolution."""
    if type(conv) is not nn.Conv2d or conv.bias is None:
        raise ValueError("a convolution of the decoder is not a plain Conv2d with a bias")
    return conv.weight, conv.bias
