"""Files written in one step: a reader, or a kill, sees the old text or the new one."""

from __future__ import annotations

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
        """Keep at least so many bytes; on a disk that is full already, what there was before."""
        if size <= self._bytes:
            return
        try:
            self._path.write_bytes(os.urandom(2 * size))  # zeros would take no room on a disk that compresses
            self._bytes = 2 * size
        except OSError:
            self.give_up()

    def give_up(self) -> None:
        """Remove the file, also one that a process which is gone has left."""
        self._bytes = 0
        with suppress(OSError):
            self._path.unlink(missing_ok=True)
