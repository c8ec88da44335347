"""Which of the kernels give the bits of torch's own operations on this device: tried, never taken for granted."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from fluxrun.errors import one_line
from fluxrun.kernels.text_encoder import torch_ops
from fluxrun.kernels.text_encoder.torch_ops import Norm

log = logging.getLogger("fluxrun.build")

HEAD_SIZE = 128
"""The only one that the kernels know, and the width that divides all others."""


@dataclass(frozen=True)
class Ops:
    """What a layer calls between its matmuls, as ``torch_ops`` has it."""

    add_rms_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]] = torch_ops.add_rms_norm
    heads: Callable[..., torch_ops.Heads] = torch_ops.heads
    swiglu: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch_ops.swiglu
    by: dict[str, str] = field(default_factory=dict)
    """By whom each is computed, for the record."""


@dataclass(frozen=True)
class Sizes:
    """Of a text encoder's layers, and of the prompts it reads."""

    width: int
    heads: int
    key_heads: int
    head_size: int
    hidden: int
    eps: float
    tokens: int


def proven(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Ops:
    """Our kernel for each operation whose bits it gives with random numbers of these sizes; torch's for the others."""
    if not can_be_ours(dtype, device):
        return Ops(by=dict.fromkeys(("add_rms_norm", "heads", "swiglu"), "torch (not bfloat16 on a GPU)"))
    samples = Samples(sizes, dtype, device)
    found: dict[str, Callable[..., Any]] = {}
    by: dict[str, str] = {}
    for name, kernels in candidates(sizes).items():
        kernel, by[name] = _first_with_the_same_bits(kernels, getattr(torch_ops, name), getattr(samples, name)())
        if kernel is not None:
            found[name] = kernel
    log.info("text encoder: %s", ", ".join(f"{name} by {who}" for name, who in by.items()))
    return Ops(**found, by=by)


def can_be_ours(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels can run there at all."""
    return device.type == "cuda" and dtype == torch.bfloat16


def candidates(sizes: Sizes) -> dict[str, list[tuple[str, Callable[..., Any]]]]:
    """Kernels by the operation that they are for, each with what is said of it."""
    from fluxrun.kernels.text_encoder import triton_ops

    def in_each_order(kernel: Callable[..., Any], width: int) -> list[tuple[str, Callable[..., Any]]]:
        orders = triton_ops.ORDERS if width % HEAD_SIZE == 0 else ()
        return [(f"triton, {order}", partial(kernel, order=order)) for order in orders]

    known = sizes.head_size == HEAD_SIZE and sizes.heads % sizes.key_heads == 0
    return {
        "add_rms_norm": in_each_order(triton_ops.add_rms_norm, sizes.width),
        "heads": in_each_order(triton_ops.heads, sizes.head_size) if known else [],
        "swiglu": [("triton", triton_ops.swiglu)],
    }


def _first_with_the_same_bits(
    kernels: list[tuple[str, Callable[..., Any]]], expected: Callable[..., Any], samples: list[tuple[Any, ...]]
) -> tuple[Callable[..., Any] | None, str]:
    """The kernel that agrees with ``expected`` on all samples, and what is said of the choice."""
    why = "no kernel for these sizes"
    for name, kernel in kernels:
        try:
            if all(_equal(kernel(*sample), expected(*sample)) for sample in samples):
                return kernel, name
            why = "other bits"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler may fail in any way it likes; it is said, and torch computes
            why = one_line(error)
            log.info("a kernel of the text encoder cannot be used: %s", why)
    return None, f"torch ({why})"


def _equal(found: Any, expected: Any) -> bool:
    if isinstance(expected, torch.Tensor):
        return torch.equal(found, expected)
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Samples:
    """Random numbers of the sizes that a layer sees, rows from a thousandth to a thousand, a few values far out."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> None:
        self._sizes, self._dtype, self._device = sizes, dtype, device
        self._generator = torch.Generator(device).manual_seed(0)

    def add_rms_norm(self) -> list[tuple[Any, ...]]:
        """With and without something to add."""
        x, y = self._rows(self._sizes.width), self._rows(self._sizes.width)
        norm = Norm(self._weight(self._sizes.width), self._sizes.eps)
        return [(x, y, norm), (x, None, norm)]

    def heads(self) -> list[tuple[Any, ...]]:
        """Queries, keys and values, two norms, angles."""
        sizes = self._sizes
        projected = tuple(
            self._rows(count * sizes.head_size) for count in (sizes.heads, sizes.key_heads, sizes.key_heads)
        )
        norms = tuple(Norm(self._weight(sizes.head_size), sizes.eps) for _ in range(2))
        angles = self._normal(1, sizes.tokens, sizes.head_size)
        return [(projected, norms, (angles.cos().to(self._dtype), angles.sin().to(self._dtype)))]

    def swiglu(self) -> list[tuple[Any, ...]]:
        """Gates and what they are for."""
        return [(self._rows(self._sizes.hidden) / 100, self._rows(self._sizes.hidden))]

    def _rows(self, width: int) -> torch.Tensor:
        rows = self._normal(1, self._sizes.tokens, width)
        rows[..., :: width // 4 + 1] *= 50
        scale = torch.logspace(-3, 3, self._sizes.tokens, device=self._device)[None, :, None]
        return (rows * scale).to(self._dtype)

    def _weight(self, width: int) -> torch.Tensor:
        return (1 + 0.2 * self._normal(width)).to(self._dtype)

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator, device=self._device)
