"""The actor: one process with one session pool, which draws what it is given and tells of it picture by picture."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from fluxrun.pipeline.session_pool import SessionPool
from fluxrun.process.console import Reporter, console, is_shown
from fluxrun.startup.lean import ANY_OF_THEM, start_lean
from fluxrun.startup.owner import own_process
from fluxrun.trust import TRUST_VARIABLE

THREADS = "OMP_NUM_THREADS"
"""Ray sets it to 1 where it is not set; a sum over other threads is another sum, and another picture."""

WAITING = "OMP_WAIT_POLICY"
"""How threads wait for each other; by spinning, those of several workers on few cores take each other's time."""

TOGETHER_S = 1.0
"""Events that come within this time are sent as one message: each costs the driver one to three milliseconds."""


@dataclass(frozen=True)
class Begun:
    """A worker was given the task."""


@dataclass(frozen=True)
class Saved:
    """A picture is on the disk."""

    picture: Any = None
    """What is to be recorded of it, where the driver writes the record."""


@dataclass(frozen=True)
class Said:
    """A line that a run of one's own would show on the screen."""

    level: int
    text: str


@dataclass(frozen=True)
class Ended:
    """The task is over; what the driver has to know of it that is not in its folder."""

    error: str = ""
    loads: tuple[str, ...] = ()
    """Why weights were loaded for it."""
    result: Any = None


Event = Begun | Saved | Said | Ended
Tell = Callable[[Event], None]


class Work(Protocol):
    """What workers do with their tasks. Each worker gets a copy, before torch is imported there."""

    @property
    def own_options(self) -> bool:
        """Whether all runs are made of fluxrun's own options."""
        ...

    def __call__(self, task: Any, tell: Tell, pool: SessionPool) -> Any:
        """Do a task; whatever goes wrong with a run is in its record."""
        ...


@dataclass(frozen=True)
class Surroundings:
    """What a run sees of the command's process, on whatever machine it is drawn."""

    folder: str
    variables: dict[str, str | None]
    """Of the environment; None for what is not set."""

    @classmethod
    def here(cls) -> Surroundings:
        """Those of this process."""
        variables = {name: os.environ.get(name) for name in (THREADS, TRUST_VARIABLE)}
        return cls(os.getcwd(), {**variables, WAITING: os.environ.get(WAITING, "PASSIVE")})

    def set(self) -> None:
        """Make them this process's. Ray sets the number of threads before each call."""
        for name, value in self.variables.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        if Path(self.folder).is_dir():
            os.chdir(self.folder)


class Worker:
    """Draws on a thread of its own, always the same one: the actor's main thread hands on what it tells."""

    def __init__(self, surroundings: Surroundings, work: Work) -> None:
        self._surroundings, self._work = surroundings, work
        surroundings.set()
        console.quiet = True
        own_process()
        start_lean(ANY_OF_THEM if work.own_options else None)
        self._pool = SessionPool()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fluxrun-draws")

    def ready(self) -> str:
        """Import what draws; returns where this is."""
        self._surroundings.set()
        self._thread.submit(_import_what_draws).result()
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        return f"{socket.gethostname()} process {os.getpid()}" + (f" GPU {gpu}" if gpu else "")

    def draw(self, task: Any) -> Iterator[list[Event]]:
        """Do a task; what happens on the way, the last event is its end."""
        self._surroundings.set()
        events: SimpleQueue[Event] = SimpleQueue()
        self._thread.submit(self._draw, task, events.put)
        while True:
            told = _together(events)
            yield told
            if isinstance(told[-1], Ended):
                return

    def _draw(self, task: Any, tell: Tell) -> None:
        lines, loads = ToldLines(tell), len(self._pool.loads)
        logging.getLogger("fluxrun").addHandler(lines)
        error, result = "", None
        try:
            result = self._work(task, tell, self._pool)
        except Exception as raised:  # the task's alone, the next one may go well; it is no run's failure, but ours
            logging.getLogger("fluxrun").exception("a task failed")
            error = f"{type(raised).__name__}: {raised}"
        finally:
            logging.getLogger("fluxrun").removeHandler(lines)
            tell(Ended(error, tuple(self._pool.loads[loads:]), result))


class ToldLines(logging.Handler):
    """Warnings and errors, which the driver shows."""

    def __init__(self, tell: Tell) -> None:
        super().__init__(logging.WARNING)
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        if is_shown(record):
            self._tell(Said(record.levelno, record.getMessage()))


class ToldPictures(Reporter):
    """A run's reporter that tells of each picture."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell

    def saved(self, path: Path, seed: int) -> None:
        self._tell(Saved())


def _together(events: SimpleQueue[Event]) -> list[Event]:
    """The next event, with those that follow it soon."""
    told = [events.get()]
    last = time.monotonic() + TOGETHER_S
    with suppress(Empty):
        while not isinstance(told[-1], Ended):
            told.append(events.get(timeout=max(0.0, last - time.monotonic())))
    return told


def _import_what_draws() -> None:
    from fluxrun.process.switches import import_diffusers

    import_diffusers()
    import fluxrun.drawing.generation  # noqa: F401
