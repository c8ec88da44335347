"""PNG files of colour pictures, faster than Pillow writes them: each row as its difference to the row above.

Of such differences a photograph is mostly small numbers, which Huffman codes alone make as short as zlib's search for
repetitions does. ``isal`` (the extra ``fast-png``) compresses them fastest; without it zlib does, told to search for
runs only.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
TRUE_COLOUR = struct.pack("!BBBBB", 8, 2, 0, 0, 0)
"""In the header: 8 bits, RGB, deflate, the standard filters, no interlacing."""
UP = 2
"""The filter of a row whose bytes are differences to the row above."""


class Checksum(Protocol):
    """zlib's crc32 or isal's."""

    def __call__(self, data: bytes, value: int = ..., /) -> int: ...


class Compress(Protocol):
    """Bytes as a zlib stream."""

    def __call__(self, data: memoryview, /) -> bytes: ...


class Encoder(NamedTuple):
    """What compresses, under the name that it has in the record."""

    name: str
    compress: Compress
    checksum: Checksum


@cache
def encoder() -> Encoder:
    """isal's functions where it can be imported, else zlib's."""
    try:
        from isal import isal_zlib
    except ImportError:  # not there, or not for this processor
        return ZLIB
    return Encoder("isal", lambda data: isal_zlib.compress(data, 1), isal_zlib.crc32)


def _run_lengths(data: memoryview) -> bytes:
    compressor = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
    return compressor.compress(data) + compressor.flush()


ZLIB = Encoder("zlib", _run_lengths, zlib.crc32)


def encode(image: Image, texts: Mapping[str, str]) -> Iterator[bytes]:
    """The file of an RGB picture, part by part, with ``texts`` as international text by their Latin-1 keys."""
    yield SIGNATURE
    yield from _chunk(b"IHDR", struct.pack("!II", *image.size) + TRUE_COLOUR)
    for key, text in texts.items():
        # After the key: not compressed, no language, no translated key.
        yield from _chunk(b"iTXt", key.encode("latin-1") + bytes(5) + text.encode("utf-8"))
    yield from _chunk(b"IDAT", encoder().compress(_differences(image)))
    yield from _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> Iterator[bytes]:
    checksum = encoder().checksum
    yield struct.pack("!I", len(data)) + kind
    yield data
    yield struct.pack("!I", checksum(data, checksum(kind)))


def _differences(image: Image) -> memoryview:
    """Each row's filter, and its bytes less those of the row above."""
    import numpy as np

    pixels = np.asarray(image).reshape(image.height, -1)
    rows = np.empty((image.height, 1 + pixels.shape[1]), np.uint8)
    rows[:, 0] = UP
    rows[0, 1:] = pixels[0]
    np.subtract(pixels[1:], pixels[:-1], out=rows[1:, 1:])
    return rows.data.cast("B")
