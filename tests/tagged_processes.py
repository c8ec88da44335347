"""A fluxrun command in a process of its own, whose own processes can be told from everybody else's."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import psutil
from helpers import Child, start_fluxrun
from robustness.signals_campaign import TAG, tagged

PATIENCE_S = 300

T = TypeVar("T")


class Tagged:
    """What it writes is in ``screen.txt`` of the folder it runs in."""

    def __init__(
        self, folder: Path, *arguments: str, environment: Mapping[str, str] | None = None, fresh: bool = False
    ) -> None:
        """``fresh``: a Python of its own, and no fork of one that has imported torch."""
        self.folder, self._tag = folder, uuid.uuid4().hex
        env = {TAG: self._tag, **(environment or {})}
        with (folder / "screen.txt").open("w") as stream:
            self.process: Child = start_fluxrun(
                *arguments, cwd=folder, stdout=stream, stderr=stream, env=env, fresh=fresh
            )

    def screen(self) -> str:
        return (self.folder / "screen.txt").read_text()

    def others(self) -> list[psutil.Process]:
        """All processes that came of it, but for the command's own."""
        return [other for other in tagged(self._tag) if other.pid != self.process.pid]

    def until(self, what: Callable[[], T]) -> T:
        """What it returns as soon as that is something; the command must not end before."""
        deadline = time.monotonic() + PATIENCE_S
        while not (found := what()):
            assert self.process.poll() is None, self.screen()
            assert time.monotonic() < deadline, self.screen()
            time.sleep(0.01)
        return found

    def close(self) -> None:
        """End all of it."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(PATIENCE_S)
        for other in self.others():
            with contextlib.suppress(psutil.Error):
                other.kill()


def gone(processes: list[psutil.Process]) -> bool:
    """Whether they end; a process that was killed takes a moment."""
    return not psutil.wait_procs(processes, timeout=20)[1]
