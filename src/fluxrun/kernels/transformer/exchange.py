"""Ulysses for the fused blocks: each process's tokens with all heads for all tokens with some heads, and back.

diffusers' own way copies queries, keys and values before and after four exchanges. Here the kernel before attention
writes them where they are sent from, in one exchange, attention reads them where they arrive, and the kernel after it
reads the output where that arrives; in float8 they are half as large.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Exchange:
    """The processes that exchange."""

    group: ProcessGroup
    size: int

    @classmethod
    def of(cls, processor: Any) -> Exchange | None:
        """Those of an attention processor; None where there are no others, or diffusers sees to it (a ring)."""
        config = processor._parallel_config
        context = None if config is None else config.context_parallel_config
        if context is None or context.ring_degree > 1 or context.ulysses_anything:
            return None
        return cls(context._ulysses_mesh.get_group(), context.ulysses_degree)

    def room(
        self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """What is sent, and views of it to write q, k and v into: [batch, tokens, processes, their heads, size] each.

        ``shape``: [batch, tokens, heads, size] of this process's tokens.
        """
        batch, tokens, heads, size = shape
        sent = torch.empty((self.size, tokens, batch, 3, heads // self.size, size), dtype=dtype, device=device)
        return sent, sent.permute(3, 2, 1, 0, 4, 5).unbind(0)

    def by_heads(self, sent: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """q, k and v of all tokens, [batch, all tokens, this process's heads, size] each, as they arrived."""
        received = self._exchanged(sent).flatten(0, 1)  # [all tokens, batch, 3, heads, size]
        tokens, batch, _, heads, size = received.shape
        if batch > 1:
            return received.permute(2, 1, 0, 3, 4).unbind(0)
        # A batch of one may have any stride; this one is what attention kernels know as packed.
        row = 3 * heads * size
        shape, strides = (1, tokens, heads, size), (tokens * row, row, size, 1)
        return tuple(received.as_strided(shape, strides, which * heads * size) for which in range(3))

    def by_tokens(self, attended: torch.Tensor) -> torch.Tensor:
        """Attention's output for this process's tokens, [batch, tokens, processes, their heads, size].

        ``attended``: [batch, all tokens, this process's heads, size].
        """
        sent = attended.transpose(0, 1).contiguous()  # of a batch of one no copy
        received = self._exchanged(sent.unflatten(0, (self.size, -1)))
        return received.permute(2, 1, 0, 3, 4)

    def largest(self, value: torch.Tensor) -> torch.Tensor:
        """The largest of the processes' values."""
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.group)
        return value

    def _exchanged(self, sent: torch.Tensor) -> torch.Tensor:
        """The n-th part of it goes to the n-th process; [processes, …] in and out."""
        as_bytes = sent.dtype == torch.float8_e4m3fn  # not every NCCL knows it
        data = sent.view(torch.uint8) if as_bytes else sent
        received = torch.empty_like(data)
        dist.all_to_all_single(received, data, group=self.group)
        return received.view(sent.dtype) if as_bytes else received


def head_layout(tensor: torch.Tensor) -> tuple[int, int, tuple[int, int, int, int]]:
    """How many heads, how many in each group (0: there are no groups), and strides of batch, token, group and head.

    ``tensor``: [batch, tokens, heads, size], or with the heads in groups [batch, tokens, groups, heads of each, size].
    """
    if tensor.ndim == 4:
        return tensor.shape[2], 0, (tensor.stride(0), tensor.stride(1), 0, tensor.stride(2))
    strides = (tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3))
    return tensor.shape[2] * tensor.shape[3], tensor.shape[3], strides
