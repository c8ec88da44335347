"""What lies inside a tensor: a quantized one is a wrapper around ordinary ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn


def plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The ordinary tensors inside ``tensor``: itself, a quantized one's data and scales, a shared-out one's share."""
    if is_plain(tensor):
        yield tensor
        return
    for name in _flattened(tensor)[0]:
        if isinstance(inside := getattr(tensor, name), torch.Tensor):  # a DTensor's device mesh is none
            yield from plain_tensors(inside)


def rebuilt(tensor: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """``tensor`` with every ordinary tensor inside changed; a parameter stays one, a quantized tensor too."""
    if is_plain(tensor):
        new = change(tensor)
    else:
        names, context = _flattened(tensor)
        inside = {name: rebuilt(getattr(tensor, name), change) for name in names}
        wrapper: Any = type(tensor)
        new = wrapper.__tensor_unflatten__(inside, context, tensor.shape, tensor.stride())
    return nn.Parameter(new, requires_grad=False) if isinstance(tensor, nn.Parameter) else new


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind ``tensors``, shared ones once."""
    storages = {
        (plain.device, plain.untyped_storage().data_ptr()): plain.untyped_storage().nbytes()
        for tensor in tensors
        for plain in plain_tensors(tensor)
    }
    return sum(storages.values())


def _flattened(tensor: torch.Tensor) -> tuple[list[str], Any]:
    """The attributes that hold a quantized tensor's own tensors, and what else it takes to make it again."""
    wrapper: Any = tensor  # torch's protocol for such subclasses; its type of a tensor does not have it
    names, context = wrapper.__tensor_flatten__()
    return names, context


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds its own numbers, in whatever format."""
    return type(tensor) in (torch.Tensor, nn.Parameter) or not hasattr(tensor, "__tensor_flatten__")
