"""Standard output and error that never end a run: once nobody takes their lines, these are dropped."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, Literal, cast

from rich.console import Console

LOST = (OSError, ValueError)
"""What writing raises when a pipe is closed, a disk is full, a terminal is gone, or the file was closed."""


class Lasting:
    """A text stream that takes every line, also after the one behind it no longer does."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or from the first failure on do nothing."""
        try:
            self._stream.write(text)
        except LOST:
            drop(self._stream)
        return len(text)

    def flush(self) -> None:
        """Flush, or from the first failure on do nothing."""
        try:
            self._stream.flush()
        except LOST:
            drop(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def drop(stream: IO[str]) -> None:
    """Let go nowhere what is written from now on, what waits in the stream's buffer included.

    Without this the interpreter would try once more at its end, and make exit code 120 of it.
    """
    with suppress(*LOST), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


@contextmanager
def lasting(name: Literal["stdout", "stderr"]) -> Iterator[None]:
    """Within: everybody's lines on this stream are taken, other libraries' too."""
    stream = getattr(sys, name)
    if stream is None:  # closed before the interpreter began
        yield
        return
    setattr(sys, name, Lasting(stream))
    try:
        yield
    finally:
        setattr(sys, name, stream)


class LastingConsole(Console):
    """rich's console on standard error; rich's own ends the process when a pipe is closed."""

    def __init__(self) -> None:
        super().__init__(stderr=True)

    @property
    def file(self) -> IO[str]:
        """Standard error as it is at the moment, also while a live display stands in its place."""
        return cast("IO[str]", Lasting(super().file))

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        Console.file.fset(self, new_file)  # type: ignore[attr-defined]
