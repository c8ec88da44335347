"""What lies inside a tensor: a quantized one is a wrapper around ordinary ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn


def plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The ordinary tensors inside ``tensor``: itself, or a quantized one's data and scales."""
    if _is_plain(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    for name in names:
        yield from plain_tensors(getattr(tensor, name))


def rebuilt(tensor: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """``tensor`` with every ordinary tensor inside changed; a parameter stays one, a quantized tensor too."""
    if _is_plain(tensor):
        new = change(tensor)
    else:
        names, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        inside = {name: rebuilt(getattr(tensor, name), change) for name in names}
        new = type(tensor).__tensor_unflatten__(inside, context, tensor.shape, tensor.stride())  # type: ignore[attr-defined]
    return nn.Parameter(new, requires_grad=False) if isinstance(tensor, nn.Parameter) else new


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind ``tensors``, shared ones once."""
    storages = {
        (plain.device, plain.untyped_storage().data_ptr()): plain.untyped_storage().nbytes()
        for tensor in tensors
        for plain in plain_tensors(tensor)
    }
    return sum(storages.values())


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, nn.Parameter) or not hasattr(tensor, "__tensor_flatten__")
