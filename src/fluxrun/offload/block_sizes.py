"""What block swap keeps on the GPU and what it moves, by arithmetic alone: for the plan, which loads nothing, too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fluxrun.architectures import TextConfig, TransformerConfig, layers_needed, text_layer
from fluxrun.formatting import GIB

SPARE_BYTES = GIB // 2
"""What block swap leaves free: torch's allocator loses some between blocks of memory of different sizes."""

BUFFERS = 2
"""Buffers on the GPU that swapped blocks share: one is computed with while the next block is copied into the other."""

LARGE_BYTES = 32 * 2**20
"""Tensors from this size on are swapped. Smaller ones may share a memory page with others, and a page can be locked
only once; a copy of what is not page-locked would hold up the CPU, which has kernels to launch."""

MLP_RATIO = 3
"""Width of FLUX.2's feed-forward layers by that of its hidden states; gated, so that the first one is twice as wide."""


@dataclass(frozen=True)
class BlockSizes:
    """Bytes of a module made of blocks."""

    outside: int
    """Of what belongs to no block."""
    small: int
    """In all blocks together, in tensors that are not swapped."""
    blocks: tuple[int, ...]
    """Of each block, in tensors that can be."""

    def on_gpu(self, count: int) -> int:
        """Bytes on the GPU when ``count`` blocks are swapped."""
        swapped = self.swapped(count)
        buffers = min(BUFFERS, count) * max(swapped, default=0)
        return self.outside + self.small + sum(self.blocks) - sum(swapped) + buffers

    def swapped(self, count: int) -> list[int]:
        """Bytes of each swapped block: what a step copies."""
        return [self.blocks[n] for n in evenly_spaced(count, len(self.blocks))]

    def fewest(self, room: int) -> int:
        """How few blocks must be swapped to stay within ``room`` bytes; all of them if that is not enough either."""
        total = len(self.blocks)
        return next((count for count in range(total) if self.on_gpu(count) <= room), total)

    def count(self, asked: int | None, room: int) -> int:
        """How many blocks to swap: as many as ``asked`` for; None: as few as fit ``room``.

        None for a count up to the number of buffers: a block with a buffer of its own can as well stay.
        """
        count = self.fewest(room) if asked is None else min(asked, len(self.blocks))
        return count if count > BUFFERS else 0


def evenly_spaced(count: int, total: int) -> list[int]:
    """``count`` of ``total`` positions, evenly spaced."""
    return [(2 * n + 1) * total // (2 * count) for n in range(count)]


def transformer_sizes(config: TransformerConfig, total: int, itemsize: int, block_itemsize: float) -> BlockSizes:
    """Of a ``Flux2Transformer2DModel`` with ``total`` bytes before its blocks were quantized to ``block_itemsize``."""
    square = (config["num_attention_heads"] * config.get("attention_head_dim", 128)) ** 2
    stream = (1, 1, 1, 1, 2 * MLP_RATIO, MLP_RATIO)  # query, key, value, out, feed-forward in and out
    double, single = stream * 2, (3 + 2 * MLP_RATIO, 1 + MLP_RATIO)
    blocks = [double] * config["num_layers"] + [single] * config["num_single_layers"]
    elements = square * sum(map(sum, blocks))
    return _sizes(total - elements * itemsize, [[int(n * square * block_itemsize) for n in block] for block in blocks])


def text_encoder_sizes(text: TextConfig, total: int, itemsize: float, read: tuple[int, ...] | None) -> BlockSizes:
    """Of an ``Architecture.text`` encoder with ``total`` bytes, cut behind the hidden states ``read`` (None: whole)."""
    layer = [int(count * itemsize) for count in text_layer(text)]
    layers = text["num_hidden_layers"] if read is None else layers_needed(text["num_hidden_layers"], read)
    return _sizes(total - layers * sum(layer), [layer] * layers)


def unknown_sizes(total: int, parts: int) -> BlockSizes:
    """Of a model whose architecture is not known: equal blocks, and as much again as one of them outside, and small."""
    return BlockSizes(total // parts, total // parts, (total // parts,) * (parts - 2))


def _sizes(outside: int, blocks: Sequence[Sequence[int]]) -> BlockSizes:
    large = tuple(sum(size for size in block if size >= LARGE_BYTES) for block in blocks)
    return BlockSizes(max(0, outside), sum(map(sum, blocks)) - sum(large), large)
