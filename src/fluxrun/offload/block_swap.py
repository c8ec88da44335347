"""Block swap: as many blocks as fit stay on the GPU, the others are copied in while their neighbours compute.

Group offload moves every layer in every step, however much of the GPU is free. Here only what does not fit moves, a
block at a time, and never back: inference changes no weight, so the originals stay in the CPU's memory, page-locked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from fluxrun.offload import block_sizes
from fluxrun.offload.block_sizes import PLACES, SPARE_BYTES, StackSizes, evenly_spread
from fluxrun.offload.components import Guest, Slot, slots
from fluxrun.offload.tensors import plain_tensors, rebuilt, tensor_bytes

ALIGNMENT = 256
"""Bytes; what torch's own allocator aligns to."""


class SwapBlocks:
    """A pipeline whose transformer swaps blocks; its text encoder, all of whose layers do, comes when it is asked for.

    ``room`` is how many bytes of the GPU weights may take beside ``working`` bytes of a step or a decode, which the
    text encoder takes over while it is there. ``count`` blocks are swapped; None: as few as fit.
    """

    def __init__(
        self, pipeline: Any, device: str, counters: Counter[str], *, room: int, working: int, count: int | None
    ) -> None:
        if device.startswith("cuda"):
            torch.cuda.empty_cache()  # what loading has left would be cut up by small tensors, and useless for blocks
        pipeline.vae.to(device)  # the first module of the pipeline: diffusers takes its device for all inputs
        transformer, encoder = pipeline.transformer, pipeline.text_encoder
        blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
        self.transformer = Stack(transformer, blocks, torch.device(device), counters, endless=True)
        self.text_encoder: Stack | None = None
        if isinstance(encoder, nn.Module):
            layers = list(encoder.get_decoder().layers)  # type: ignore[operator]
            self.text_encoder = Stack(encoder, layers, torch.device(device), counters, endless=False)
            working = max(working, self.text_encoder.sizes.on_gpu(len(layers)))
            pipeline.encode_prompt = partial(self._encode, pipeline.encode_prompt)
        beside = SPARE_BYTES + working + tensor_bytes(tensor for _, _, tensor in slots(pipeline.vae))
        self.transformer.enter(self.transformer.sizes.count(count, room - beside))

    def _encode(self, encode_prompt: Any, *args: Any, **kwargs: Any) -> Any:
        """``encode_prompt`` with the text encoder on the GPU, if there is a prompt to encode."""
        if kwargs.get("prompt_embeds") is not None or self.text_encoder is None:
            return encode_prompt(*args, **kwargs)
        try:
            self.text_encoder.enter(len(self.text_encoder.blocks))
            return encode_prompt(*args, **kwargs)
        finally:
            self.text_encoder.leave()


class Stack:
    """A module's blocks on the GPU, some of them by turns.

    After ``enter`` the module can be called: the swapped blocks' weights lie in ``PLACES`` shared places, and hooks on
    the blocks see to it that each finds its own there. Nothing else about the module is changed, so that fused kernels
    (which look at the places) and step caches (which leave blocks out) work as ever. ``endless``: the first blocks
    follow upon the last ones.
    """

    def __init__(
        self,
        module: nn.Module,
        blocks: Sequence[nn.Module],
        device: torch.device,
        counters: Counter[str],
        endless: bool,
    ) -> None:
        self.device, self.counters, self.endless = device, counters, endless
        self.blocks = [Block(slots(block)) for block in blocks]
        tables = {id(table) for block in self.blocks for table, _, _ in block.home}
        self.rest = Guest(slot for slot in slots(module) if id(slot[0]) not in tables)
        self.places: list[Place] = []
        self.away: list[Block] = []
        self._modules = list(blocks)
        self._hooks: list[Any] = []
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @cached_property
    def sizes(self) -> StackSizes:
        """Bytes of what stays and of what may be swapped."""
        return StackSizes(
            rest=tensor_bytes(tensor for _, _, tensor in self.rest.home),
            small=sum(packed_bytes(block.small) for block in self.blocks),
            blocks=tuple(block.bytes for block in self.blocks),
        )

    # -- coming and going -------------------------------------------------------------------------------------------

    def enter(self, count: int) -> None:
        """Bring everything that stays, and make the places for ``count`` swapped blocks, evenly spread."""
        self.rest.visit(self.device)
        chosen = evenly_spread(count, len(self.blocks))
        self.away = [self.blocks[n] for n in chosen]
        largest = max((block.bytes for block in self.away), default=0)
        self.places = [self._new_place(largest) for _ in range(min(PLACES, count))]
        for n, block in enumerate(self.blocks):
            if n not in chosen:
                block.move_in(self._memory(block.bytes))
                block.fetch()
        for turn, block in enumerate(self.away):
            block.move_in(self._place(turn).memory)
            module = self._modules[chosen[turn]]
            self._hooks.append(module.register_forward_pre_hook(partial(self._before, turn)))
            self._hooks.append(module.register_forward_hook(partial(self._after, turn)))
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))  # the places' memory may still be in use
        for turn in range(len(self.places)):
            self._fetch(turn)

    def leave(self) -> None:
        """Give every module its originals back and free the copies."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for block in self.blocks:
            block.go_home()
        self.rest.go_home()
        self.places, self.away = [], []
        if self._stream is not None:
            torch.cuda.empty_cache()  # a decode's buffers do not fit into the holes that layers leave

    def _memory(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def _new_place(self, size: int) -> Place:
        place = Place(self._memory(size))
        if self._stream is not None:
            place.memory.record_stream(self._stream)  # freed, it is not used again before the last copy into it is over
            place.arrived, place.left = torch.cuda.Event(), torch.cuda.Event()
        return place

    # -- taking turns -----------------------------------------------------------------------------------------------

    def _place(self, turn: int) -> Place:
        return self.places[turn % len(self.places)]

    def _before(self, turn: int, *_: Any) -> None:
        """Before a swapped block: wait until its weights are there."""
        place = self._place(turn)
        if place.holds != turn:  # a block was left out, or the module called anew
            self._fetch(turn)
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_event(place.arrived)

    def _after(self, turn: int, *_: Any) -> None:
        """After it: its place is for the next block that comes there."""
        if self._stream is not None:
            self._place(turn).left.record(torch.cuda.current_stream(self.device))
        following = turn + len(self.places)
        if following >= len(self.away) and self.endless:
            following = turn % len(self.places)
        if following < len(self.away) and following != turn:
            self._fetch(following)

    def _fetch(self, turn: int) -> None:
        """Copy a swapped block's weights into its place, as soon as who was there has computed."""
        place, block = self._place(turn), self.away[turn]
        if self._stream is None:
            block.fetch()
        else:
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(place.left)
                block.fetch()
                place.arrived.record(self._stream)
        place.holds = turn
        self.counters["blocks_copied"] += 1
        self.counters["bytes_copied"] += block.bytes


@dataclass
class Place:
    """Memory on the GPU for one block at a time."""

    memory: torch.Tensor
    holds: int | None = None
    """Whose weights lie here, or are on their way."""
    arrived: Any = None
    """Event: what it holds is there."""
    left: Any = None
    """Event: who was there last has computed."""


class Block(Guest):
    """One block's weights: the large tensors, which can be swapped, and the small ones, which stay on the GPU.

    Large is what ``Pins`` page-locks (``block_sizes.LARGE_BYTES``).
    """

    def __init__(self, home: Iterable[Slot]) -> None:
        super().__init__(home)
        plain = [inside for _, _, tensor in self.home for inside in plain_tensors(tensor)]
        self.large = _in_order(tensor for tensor in plain if _is_large(tensor))
        self.small = _in_order(tensor for tensor in plain if not _is_large(tensor))
        self.bytes = packed_bytes(self.large)
        self.copies: list[torch.Tensor] = []

    def move_in(self, memory: torch.Tensor) -> None:
        """Give the block's modules tensors on the GPU: large ones in ``memory``, for ``fetch`` to fill."""
        self.copies = packed(self.large, memory)
        small = packed(self.small, torch.empty(packed_bytes(self.small), dtype=torch.uint8, device=memory.device))
        copy_all(self.small, small)
        there = dict(zip(map(id, [*self.large, *self.small]), [*self.copies, *small], strict=True))
        for table, name, tensor in self.home:
            table[name] = rebuilt(tensor, lambda plain: there[id(plain)])

    def fetch(self) -> None:
        """Copy the large tensors in; on a stream of its own, this does not wait for anything."""
        copy_all(self.large, self.copies)

    def go_home(self) -> None:
        """Give the modules the originals back."""
        self.copies = []
        super().go_home()


def _in_order(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """By dtype, else as they come: so query, key and value lie side by side, without their scales in between."""
    return sorted(tensors, key=lambda tensor: str(tensor.dtype))


def packed(tensors: Sequence[torch.Tensor], memory: torch.Tensor) -> list[torch.Tensor]:
    """Tensors of the same shapes and dtypes one after the other in ``memory`` (bytes)."""
    places, offset = [], 0
    for tensor in tensors:
        places.append(memory[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        offset += _aligned(tensor.nbytes)
    return places


def packed_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes that ``packed`` needs."""
    return sum(_aligned(tensor.nbytes) for tensor in tensors)


def copy_all(originals: Sequence[torch.Tensor], copies: Sequence[torch.Tensor]) -> None:
    """Copy in order, without waiting where that is possible."""
    for original, copy in zip(originals, copies, strict=True):
        copy.copy_(original.detach(), non_blocking=True)


def _is_large(tensor: torch.Tensor) -> bool:
    return tensor.nbytes >= block_sizes.LARGE_BYTES


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
