"""Files written in one step: a reader, or a kill, sees the old text or the new one."""

from __future__ import annotations

import errno
import os
import tempfile
from contextlib import suppress
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Replace ``path`` in one step: a reader, or a kill, sees the old text or the new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


class Reserve:
    """Room on a disk, kept in hand as a file, and given up for what must still be written when the disk is full."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._bytes = 0

    def hold(self, size: int) -> None:
        """Keep at least so many bytes. Raises OSError on a disk that has no room left; what was held before stays."""
        if size <= self._bytes:
            return
        missing = 2 * size - self._bytes  # twice, so that it does not grow with every picture
        with self._path.open("ab", buffering=0) as file:
            try:
                # Zeros would take no room on a disk that compresses.
                written = file.write(os.urandom(missing))
            except OSError:
                file.truncate(self._bytes)
                raise
            self._bytes += written
        if self._bytes < size:  # the last of the room: a write stops short before it fails
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))

    def give_up(self) -> None:
        """Remove the file, also one that a process which is gone has left."""
        self._bytes = 0
        with suppress(OSError):
            self._path.unlink(missing_ok=True)
