"""Block swap: as many blocks as fit stay on the GPU, the others are copied in while their neighbours compute.

Group offload moves every layer in every step, however much of the GPU is free. Here only what does not fit moves, a
block at a time, and never back: inference changes no weight, so the originals stay in the CPU's memory, page-locked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import ParamSpec, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from fluxrun.offload import block_sizes
from fluxrun.offload.block_sizes import BUFFERS, SPARE_BYTES, BlockSizes, evenly_spaced
from fluxrun.offload.components import OffloadedWeights, Slot, keep_vae_on, slots
from fluxrun.offload.tensors import plain_tensors, rebuilt, tensor_bytes
from fluxrun.types import Pipeline

P = ParamSpec("P")
R = TypeVar("R")

Tensors = tuple[torch.Tensor, ...]

ALIGNMENT = 256
"""Bytes; what torch's own allocator aligns to."""


class PipelineBlockSwap:
    """A pipeline whose transformer swaps blocks. Its text encoder, which swaps all of its layers, is on the GPU only
    while it encodes.

    ``room`` is how many bytes of the GPU weights may take beside ``working`` bytes of a step or a decode, which the
    text encoder uses while it is there. ``count`` blocks are swapped; None: as few as fit.
    """

    def __init__(
        self, pipeline: Pipeline, device: str, counters: Counter[str], *, room: int, working: int, count: int | None
    ) -> None:
        if device.startswith("cuda"):
            torch.cuda.empty_cache()  # what loading has left would be cut up by small tensors, and useless for blocks
        keep_vae_on(pipeline, device, counters)
        transformer, encoder = pipeline.transformer, pipeline.text_encoder
        blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
        self.transformer = BlockSwap(transformer, blocks, torch.device(device), counters, cyclic=True)
        self.text_encoder: BlockSwap | None = None
        if isinstance(encoder, nn.Module):
            layers = list(encoder.get_decoder().layers)
            self.text_encoder = BlockSwap(encoder, layers, torch.device(device), counters, cyclic=False)
            working = max(working, self.text_encoder.sizes.on_gpu(len(layers)))
            pipeline.encode_prompt = partial(self._encode, pipeline.encode_prompt)
        beside = SPARE_BYTES + working + tensor_bytes(slot.tensor for slot in slots(pipeline.vae))
        self.transformer.onload(self.transformer.sizes.count(count, room - beside))

    def _encode(self, encode_prompt: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """``encode_prompt`` with the text encoder on the GPU, if there is a prompt to encode."""
        if kwargs.get("prompt_embeds") is not None or self.text_encoder is None:
            return encode_prompt(*args, **kwargs)
        try:
            self.text_encoder.onload(len(self.text_encoder.blocks))
            return encode_prompt(*args, **kwargs)
        finally:
            self.text_encoder.offload()


class BlockSwap:
    """A module on the GPU, some of whose blocks ("swapped") share a few buffers there.

    After ``onload`` the module can be called. Swapped block number n uses buffer n % ``BUFFERS``: a hook before the
    block waits until its weights are in the buffer, a hook after it starts the copy of the block that needs the buffer
    next. Nothing else about the module is changed: fused kernels, which keep the addresses of weights, and step caches,
    which leave blocks out, work as without block swap.

    ``cyclic``: the module is called again and again, so that the last blocks are followed by the first ones.
    """

    def __init__(
        self,
        module: nn.Module,
        blocks: Sequence[nn.Module],
        device: torch.device,
        counters: Counter[str],
        cyclic: bool,
    ) -> None:
        self.device, self.counters, self.cyclic = device, counters, cyclic
        self.blocks = [BlockWeights(slots(block)) for block in blocks]
        inside = {id(slot.owner) for block in self.blocks for slot in block.originals}
        self.outside = OffloadedWeights(slot for slot in slots(module) if id(slot.owner) not in inside)
        """The weights that belong to no block."""
        self.buffers: list[SwapBuffer] = []
        self.swapped: list[BlockWeights] = []
        self._modules = list(blocks)
        self._hooks: list[RemovableHandle] = []
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @cached_property
    def sizes(self) -> BlockSizes:
        """Bytes of what stays and of what may be swapped."""
        return BlockSizes(
            outside=tensor_bytes(slot.tensor for slot in self.outside.originals),
            small=sum(packed_bytes(block.small) for block in self.blocks),
            blocks=tuple(block.bytes for block in self.blocks),
        )

    # -- onload and offload -----------------------------------------------------------------------------------------

    def onload(self, count: int) -> None:
        """Copy everything but ``count`` evenly spaced blocks to the GPU; make their buffers, and fill these."""
        self.outside.onload(self.device)
        chosen = evenly_spaced(count, len(self.blocks))
        self.swapped = [self.blocks[n] for n in chosen]
        largest = max((block.bytes for block in self.swapped), default=0)
        self.buffers = [self._new_buffer(largest) for _ in range(min(BUFFERS, count))]
        for n, block in enumerate(self.blocks):
            if n not in chosen:
                block.use(allocate(block.bytes, self.device))
                block.copy_in()
        for number, block in enumerate(self.swapped):
            block.use(self._buffer(number).memory)
            module = self._modules[chosen[number]]
            self._hooks.append(module.register_forward_pre_hook(partial(self._before, number)))
            self._hooks.append(module.register_forward_hook(partial(self._after, number)))
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))  # may still use the buffers' memory
        for number in range(len(self.buffers)):
            self.prefetch(number)

    def offload(self) -> None:
        """Give every module its originals back and free the copies."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for block in self.blocks:
            block.offload()
        self.outside.offload()
        self.buffers, self.swapped = [], []
        if self._stream is not None:
            torch.cuda.empty_cache()  # a decode's buffers do not fit into the holes that layers leave

    def _new_buffer(self, size: int) -> SwapBuffer:
        buffer = SwapBuffer(allocate(size, self.device))
        if self._stream is not None:
            # Freed memory must not be used again before the last copy into it is over.
            buffer.memory.record_stream(self._stream)
            buffer.filled, buffer.free = torch.cuda.Event(), torch.cuda.Event()
        return buffer

    # -- while the module computes ----------------------------------------------------------------------------------

    def _buffer(self, number: int) -> SwapBuffer:
        """The buffer of a swapped block."""
        return self.buffers[number % len(self.buffers)]

    def _before(self, number: int, module: nn.Module, inputs: Tensors) -> None:
        """Hook before a swapped block: wait until its weights are in the buffer."""
        buffer = self._buffer(number)
        if buffer.block != number:  # not prefetched: a block was left out, or the module called anew
            self.prefetch(number)
        if buffer.filled is not None:
            torch.cuda.current_stream(self.device).wait_event(buffer.filled)

    def _after(self, number: int, module: nn.Module, inputs: Tensors, outputs: torch.Tensor | Tensors) -> None:
        """Hook after a swapped block: its buffer is free for the block that needs it next."""
        buffer = self._buffer(number)
        if buffer.free is not None:
            buffer.free.record(torch.cuda.current_stream(self.device))
        following = number + len(self.buffers)
        if following >= len(self.swapped) and self.cyclic:
            following = number % len(self.buffers)
        if following < len(self.swapped) and following != number:
            self.prefetch(following)

    def prefetch(self, number: int) -> None:
        """Copy a swapped block's weights into its buffer, as soon as the block that uses it now has computed."""
        buffer, block = self._buffer(number), self.swapped[number]
        if self._stream is None or buffer.free is None or buffer.filled is None:
            block.copy_in()
        else:
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(buffer.free)
                block.copy_in()
                buffer.filled.record(self._stream)
        buffer.block = number
        self.counters["blocks_copied"] += 1
        self.counters["bytes_copied"] += block.bytes


@dataclass
class SwapBuffer:
    """Memory on the GPU for one swapped block at a time. The events are None without a GPU."""

    memory: torch.Tensor
    block: int | None = None
    """Number of the swapped block whose weights are in it, or are being copied."""
    filled: torch.cuda.Event | None = None
    """Recorded behind the copy of that block's weights."""
    free: torch.cuda.Event | None = None
    """Recorded behind the last computation that read it."""


class BlockWeights(OffloadedWeights):
    """One block's weights: the large tensors, which can be swapped, and the small ones, which stay on the GPU.

    Large is what ``Pins`` page-locks (``block_sizes.LARGE_BYTES``).
    """

    def __init__(self, originals: Iterable[Slot]) -> None:
        super().__init__(originals)
        plain = [inside for slot in self.originals for inside in plain_tensors(slot.tensor)]
        self.large = _in_order(tensor for tensor in plain if _is_large(tensor))
        self.small = _in_order(tensor for tensor in plain if not _is_large(tensor))
        self.bytes = packed_bytes(self.large)
        self.copies: list[torch.Tensor] = []

    def use(self, memory: torch.Tensor) -> None:
        """Let the block's modules use tensors on the GPU: the large ones lie in ``memory``, which ``copy_in`` fills."""
        self.copies = packed(self.large, memory)
        small = packed(self.small, allocate(packed_bytes(self.small), memory.device))
        copy_all(self.small, small)
        copies = dict(zip(map(id, [*self.large, *self.small]), [*self.copies, *small], strict=True))
        for slot in self.originals:
            slot.assign(rebuilt(slot.tensor, lambda plain: copies[id(plain)]))

    def copy_in(self) -> None:
        """Copy the large tensors into the memory given to ``use``; the CPU does not wait for the copies."""
        copy_all(self.large, self.copies)

    def offload(self) -> None:
        """Give the modules the originals back."""
        self.copies = []
        super().offload()


def _in_order(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """By dtype, else as they come: so query, key and value lie side by side, without their scales in between."""
    return sorted(tensors, key=lambda tensor: str(tensor.dtype))


def packed(tensors: Sequence[torch.Tensor], memory: torch.Tensor) -> list[torch.Tensor]:
    """Tensors of the same shapes and dtypes one after the other in ``memory`` (bytes)."""
    laid_out, offset = [], 0
    for tensor in tensors:
        laid_out.append(memory[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        offset += _aligned(tensor.nbytes)
    return laid_out


def packed_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes that ``packed`` needs."""
    return sum(_aligned(tensor.nbytes) for tensor in tensors)


def copy_all(originals: Sequence[torch.Tensor], copies: Sequence[torch.Tensor]) -> None:
    """Copy in order, without waiting where that is possible."""
    for original, copy in zip(originals, copies, strict=True):
        copy.copy_(original.detach(), non_blocking=True)


def allocate(size: int, device: torch.device) -> torch.Tensor:
    """Bytes of memory on a device."""
    return torch.empty(size, dtype=torch.uint8, device=device)


def _is_large(tensor: torch.Tensor) -> bool:
    return tensor.nbytes >= block_sizes.LARGE_BYTES


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
