"""A process that measures one setting: it imports, builds, warms up and takes its turns when it is told to.

A process per setting keeps process-wide switches apart (attention backend, inductor's config, dynamo's caches), and
waiting for its turn keeps the GPU for one at a time: settings are timed side by side, A B C, C B A, on the same device.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from bench.results import Row
from bench.settings import Setting
from fluxrun.errors import one_line

IMPORT_S = 120.0
"""The longest a worker may import."""


@dataclass(frozen=True)
class Job:
    """What a worker is to measure."""

    setting: Setting
    task: Task
    overrides: tuple[str, ...]
    """The model and the size, as fluxrun overrides."""
    work: Path
    """A folder for what it leaves: plain diffusers its output, for the others' errors; a run its record."""
    log: Path


Task = Callable[[Job], Iterator[Row]]
"""Yields what belongs to the row once the pipeline is built, after the first calls, and then after every turn: there
with ``samples``, lists of numbers by a key that ends in their unit."""


class Worker:
    """A setting's process, seen from outside, and its row."""

    def __init__(self, job: Job, row: Row) -> None:
        self.setting, self.row = job.setting, row
        self.alive = True
        """Whether it can be asked: nothing has failed so far."""
        self._process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _start, (job,))
        self._pid = self._process.submit(os.getpid)
        # All workers import at the same time, before anything is timed.
        self._asked: Future[Row] | None = self._process.submit(_answer, "import")

    def begin(self, name: str) -> None:
        """Once it has imported, let it go on without waiting, so that several build at the same time."""
        self.wait(IMPORT_S)
        try:
            self._asked = self._process.submit(_answer, name) if self.alive else None
        except BrokenProcessPool as error:  # it died while it had nothing to do
            self.give_up(one_line(error))

    def wait(self, seconds: float) -> None:
        """Add the answer to the row; an error, or no answer in time, ends the process."""
        asked, self._asked = self._asked, None
        if asked is None or not self.alive:
            return
        try:
            self._keep(asked.result(max(seconds, 0.1)))
        except TimeoutError:
            self.give_up(f"no answer within {max(seconds, 0):.0f} s")
        except Exception as error:  # whatever a setting's library throws is its result
            self.give_up(one_line(error))

    def _keep(self, answer: Row) -> None:
        """Samples are added; else what the row knows stays, as the first calls of a later pass are no first calls."""
        latest: Row = {key: answer[key] for key in ("options", "turns") if key in answer}
        if "samples" in answer:
            self.row["status"] = "measured"
        for key, values in answer.pop("samples", {}).items():
            self.row["samples"].setdefault(key, []).append(values)
        self.row |= {**answer, **self.row, **latest}

    def give_up(self, why: str, status: str = "failed") -> None:
        """End it at once (it may hang, and its memory is another's) and note why; what it has measured stays."""
        if self.alive:
            self.row["error"] = why
            self.row["status"] = "measured" if self.row["status"] == "measured" else status
            self.end()

    def end(self) -> None:
        """Kill it: there is nothing to say goodbye for, and the next one waits for its memory; twice is fine."""
        self.alive = False
        with suppress(ProcessLookupError, BrokenProcessPool, TimeoutError):
            os.kill(self._pid.result(IMPORT_S), signal.SIGKILL)
        self._process.shutdown(wait=True, cancel_futures=True)


_task: list[Iterator[Row]] = []
"""The one task of a worker's process."""


def _start(job: Job) -> None:
    """Everything this process prints, autotuning chatter too, goes to a file."""
    handle = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(name)s: %(message)s")
    _task.append(job.task(job))


def _answer(name: str) -> Row:
    """The task's next answer, and its seconds by ``name``; an error's traceback is in the log."""
    started = time.perf_counter()
    try:
        answer = {} if name == "import" and import_module("bench.subject") else next(_task[0])
    except Exception as error:  # it is the setting's result
        traceback.print_exc()
        raise RuntimeError(f"{type(error).__name__}: {one_line(error)}"[:300]) from None
    return {**answer, f"{name}_s": time.perf_counter() - started}
