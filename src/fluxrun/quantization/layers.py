"""Counts quantized layers and what they take, by looking at them: the same for every library."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from fluxrun.offload.tensors import is_plain, tensor_bytes

ORDINARY = (torch.float32, torch.bfloat16, torch.float16)


def own_shape(layer: nn.Module) -> tuple[int, int] | None:
    """The shape that a layer's weight has, or had before a library packed it; None for other layers."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    return None


def is_quantized(layer: nn.Module) -> bool:
    """Whether a layer's weight is anything else than numbers of an ordinary format in their own shape."""
    shape, weight = own_shape(layer), getattr(layer, "weight", None)
    if shape is None or not isinstance(weight, torch.Tensor):
        return False
    return not is_plain(weight) or weight.dtype not in ORDINARY or tuple(weight.shape) != shape


def parameter_count(module: nn.Module) -> int:
    """Parameters of a module as its architecture has them: packed ones unpacked, scales not counted, tied ones once."""
    found: dict[int, int] = {}
    for layer in module.modules():
        quantized = is_quantized(layer)
        for name, parameter in layer.named_parameters(recurse=False):
            if quantized and name not in ("weight", "bias"):
                continue
            shape = own_shape(layer) if quantized and name == "weight" else None
            found[id(parameter)] = math.prod(shape) if shape else parameter.numel()
    return sum(found.values())


def counted(module: nn.Module) -> dict[str, Any]:
    """Layers converted of linear layers, and bytes of all weights before and after."""
    linears = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    quantized = [layer for layer in linears if is_quantized(layer)]
    return {
        "converted": len(quantized),
        "of": len(linears),
        "bytes_before": parameter_count(module) * _itemsize(module),
        "bytes": tensor_bytes([*module.parameters(), *module.buffers()]),
    }


def _itemsize(module: nn.Module) -> int:
    """Bytes of a number in the layers that are as they were."""
    ordinary = (layer for layer in module.modules() if not is_quantized(layer))
    numbers = (p for layer in ordinary for p in layer.parameters(recurse=False) if p.dtype in ORDINARY)
    return next((p.element_size() for p in numbers), 2)
