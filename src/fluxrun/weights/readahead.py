"""Weight files on their way into the page cache while libraries are imported. Light: it begins before torch."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from fluxrun.process import spans

THREADS = 4
"""Enough to keep an NVMe disk or a network file system busy."""

CHUNK = 8 * 2**20

WORTH_BYTES = 256 * 2**20
"""What is smaller is read in no time anyway."""

MOST_OF_FREE = 0.8
"""Share of the available memory that files may take: beyond it they would push each other out again."""


class ReadAhead:
    """Files that are being read; ``stop`` ends it after the chunks that are under way."""

    def __init__(self, files: Sequence[tuple[Path, int]]) -> None:
        self._chunks = ((file, offset) for file, size in files for offset in range(0, size, CHUNK))
        self._turn = threading.Lock()
        self._stopped = False
        self.bytes = 0
        """Read from the disk so far."""
        self._all = threading.Thread(target=self._read, name="fluxrun-readahead", daemon=True)
        self._all.start()

    def stop(self) -> None:
        """No further chunk."""
        self._stopped = True

    def wait(self) -> None:
        """Until all is read, or it was stopped."""
        self._all.join()

    def _read(self) -> None:
        with spans.span("read"):
            workers = [threading.Thread(target=self._work, daemon=True) for _ in range(THREADS)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()

    def _work(self) -> None:
        buffer = bytearray(CHUNK)
        while not self._stopped:
            with self._turn:
                chunk = next(self._chunks, None)
            if chunk is None:
                return
            with suppress(OSError):  # who loads the file says what is wrong with it
                read = _read_chunk(*chunk, buffer)
                with self._turn:
                    self.bytes += read


def read_ahead(files: Iterable[Path]) -> ReadAhead | None:
    """Read files in the background, in this order.

    Pages that are in memory are not read again. None, and nothing is done, where they are small, or would not fit into
    the available memory.
    """
    sizes = [(file, file.stat().st_size) for file in files]
    total = sum(size for _, size in sizes)
    if not hasattr(os, "RWF_NOWAIT") or not WORTH_BYTES < total < MOST_OF_FREE * psutil.virtual_memory().available:
        return None
    return ReadAhead(sizes)


def _read_chunk(file: Path, offset: int, buffer: bytearray) -> int:
    """Have a chunk of a file in memory; returns the bytes read for it."""
    handle = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return 0 if _in_memory(handle, offset) else os.preadv(handle, [buffer], offset)
    finally:
        os.close(handle)


def _in_memory(handle: int, offset: int) -> bool:
    """Whether a chunk's first byte can be had without waiting for the disk; the others came with it as a rule."""
    try:
        return os.preadv(handle, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False
    except OSError as error:  # a file system that cannot tell
        if error.errno != errno.EOPNOTSUPP:
            raise
        return False
