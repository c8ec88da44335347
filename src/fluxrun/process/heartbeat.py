"""Signs of life: each process of a group writes them, and the one that has started the group reads them.

A thread writes them, so that a process which compiles for minutes has them, and one that is stopped has not.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fluxrun.atomic import write_atomically
from fluxrun.reading import parse_json, read_text

BEAT_S = 1.0
"""How often a process writes one."""

SILENT_S = 45.0
"""Without one for so long, and without any work, a process is taken for stopped."""

STARTING_S = 300.0
"""The same before the first one: on a busy machine torch takes long to load."""


@dataclass(frozen=True)
class Beat:
    """What a process says of itself."""

    pid: int
    number: int
    ended: bool = False
    """Whether it has ended by itself, in order,"""
    error: str = ""
    """with what failure,"""
    at: float = 0.0
    """and when (seconds since 1970)."""


class Heartbeat:
    """Writes a process's signs of life; ``orphaned`` is called once its ``parent`` is gone."""

    def __init__(self, folder: Path, rank: int, parent: int, orphaned: Callable[[], None]) -> None:
        self._file, self._parent, self._orphaned = beat_file(folder, rank), parent, orphaned
        self._over = threading.Event()
        self._writing = threading.Lock()
        self._number = 0
        self._thread = threading.Thread(target=self._beat, name="fluxrun-heartbeat", daemon=True)

    def start(self) -> None:
        """Begin with the first one."""
        self._write()
        self._thread.start()

    def end(self, error: str = "") -> None:
        """The last one: the process ends in order."""
        self._over.set()
        self._write(ended=True, error=error)

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            self._write()
            if not is_alive(self._parent):
                self._orphaned()
                return

    def _write(self, *, ended: bool = False, error: str = "") -> None:
        with self._writing:
            if self._over.is_set() and not ended:
                return
            self._number += 1
            beat = Beat(os.getpid(), self._number, ended, error, time.time())
            with suppress(OSError):  # a full disk; or who has started the group is gone, and its folder with it
                write_atomically(self._file, json.dumps(vars(beat)))


def beat_file(folder: Path, rank: int) -> Path:
    """Where a process's last sign of life is."""
    return folder / f"rank{rank}.json"


def is_alive(pid: int) -> bool:
    """Whether there is such a process, a zombie not counted."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return _stat(pid)[:1] != ["Z"]


def cpu_ticks(pid: int) -> int:
    """What a process has computed so far: one that loads a library may hold up its own threads, and works. Linux."""
    stat = _stat(pid)
    return int(stat[11]) + int(stat[12]) if len(stat) > 12 else 0


def _stat(pid: int) -> list[str]:
    """What Linux says of a process, from its state on; nothing elsewhere, or once it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


@dataclass
class _Seen:
    life: tuple[int, int]
    """The number of the last sign of life, and what was computed by then,"""
    at: float
    """and when it was seen."""


class Watch:
    """Reads the signs of life of a group's processes."""

    def __init__(self, folder: Path, size: int, *, silent_s: float = SILENT_S) -> None:
        self._folder, self._size, self._silent_s = folder, size, silent_s
        now = time.monotonic()
        self._seen = {rank: _Seen((0, 0), now) for rank in range(size)}

    def beats(self) -> dict[int, Beat]:
        """The last one of each process that has written any."""
        return {rank: beat for rank in range(self._size) if (beat := self._read(rank)) is not None}

    def gone(self) -> list[int]:
        """Processes that are not there any more and did not end by themselves."""
        return [rank for rank, beat in self.beats().items() if not beat.ended and not is_alive(beat.pid)]

    def silent(self) -> list[int]:
        """Processes that give no sign of life; by this process's clock, which may itself have been stopped."""
        now, beats = time.monotonic(), self.beats()
        for rank, beat in beats.items():
            life = (beat.number, cpu_ticks(beat.pid))
            if life != self._seen[rank].life or beat.ended:
                self._seen[rank] = _Seen(life, now)
        limits = {rank: self._silent_s if rank in beats else STARTING_S for rank in self._seen}
        return [rank for rank, seen in self._seen.items() if now - seen.at > limits[rank]]

    def failed(self) -> tuple[int, str] | None:
        """The process that failed first, and with what."""
        failed = [(beat.at, rank, beat.error) for rank, beat in self.beats().items() if beat.error]
        return min(failed)[1:] if failed else None

    def _read(self, rank: int) -> Beat | None:
        try:
            found = parse_json(read_text(beat_file(self._folder, rank)))
            return Beat(**found)
        except (OSError, TypeError):
            return None
