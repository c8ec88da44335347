"""``python -m fluxrun.serving.worker FD PARENT``: the child process that draws, run after run, over one session pool.

It reads runs as JSON lines from its standard input and writes what happens as JSON lines to the pipe FD. SIGINT stops
the run that is being drawn, SIGTERM the process; it ends with its parent.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from fluxrun.config.schema import RunConfig
from fluxrun.errors import FluxrunError, chain, exit_code_of, one_line
from fluxrun.hardware.detection import detect
from fluxrun.pipeline.session_pool import SessionPool
from fluxrun.planning.prepare import prepare
from fluxrun.process import spans
from fluxrun.process.console import Reporter, Steps, is_shown, log_to
from fluxrun.process.device import free_memory, is_lost
from fluxrun.process.ending import adopt_orphans, end_with_parent, leave, leave_in_order, reap
from fluxrun.process.signals import EXIT_CODES, Interrupts
from fluxrun.record.folder import write_failure
from fluxrun.startup.lean import ANY_OF_THEM, start_lean
from fluxrun.startup.owner import own_process

if TYPE_CHECKING:
    from fluxrun.hardware.machine import Machine

EX_TEMPFAIL = 75
"""Exit code of a worker whose device is lost: another process has to take over."""


class Events:
    """The pipe to the server, a JSON object a line; from any thread, and from a signal's handler."""

    def __init__(self, descriptor: int) -> None:
        os.set_inheritable(descriptor, False)
        self._descriptor = descriptor
        self._lines: deque[bytes] = deque()
        self._writing = threading.Lock()

    def send(self, event: str, **content: Any) -> None:
        """Tell the server; one that is gone ends this process another way (``end_with_parent``).

        Whoever finds somebody writing leaves the line to them: a handler must not wait for what it has interrupted.
        """
        self._lines.append(json.dumps({"event": event, **content}).encode() + b"\n")
        while self._lines and self._writing.acquire(blocking=False):
            try:
                while self._lines:
                    self._write(self._lines.popleft())
            finally:
                self._writing.release()

    def _write(self, line: bytes) -> None:
        with contextlib.suppress(OSError):
            while line:
                line = line[os.write(self._descriptor, line) :]


class EventLines(logging.Handler):
    """The lines that a run of one's own would show on the screen."""

    def __init__(self, events: Events) -> None:
        super().__init__()
        self._events = events

    def emit(self, record: logging.LogRecord) -> None:
        if is_shown(record) and record.levelno >= logging.INFO:
            self._events.send("line", level=record.levelname.lower(), text=record.getMessage())


class EventReporter(Reporter):
    """Stages, steps and pictures as events."""

    def __init__(self, events: Events) -> None:
        self._events = events

    @contextmanager
    def timer(self, text: str) -> Iterator[None]:
        self._events.send("stage", text=text)
        yield
        self._events.send("stage", text="")

    @contextmanager
    def steps(self, text: str, total: int) -> Iterator[Steps]:
        self._events.send("steps", text=text, total=total)
        yield EventSteps(self._events, text, total)
        self._events.send("steps", text="", total=0)

    def saved(self, path: Path, seed: int) -> None:
        self._events.send("picture", path=f"{path.parent.name}/{path.name}", seed=seed)


class EventSteps(Steps):
    """Each step of a picture."""

    def __init__(self, events: Events, text: str, total: int) -> None:
        super().__init__(text, total)
        self._events = events

    def compiling(self) -> None:
        self._events.send("compiling")

    def advance(self) -> None:
        super().advance()
        each = self.seconds_per_step()
        left = each * (self.total - self.done)
        self._events.send("step", done=self.done, total=self.total, step_s=round(each, 4), left_s=round(left, 2))


class Worker:
    """Draws what the server sends, until its standard input ends, SIGTERM comes or the device is lost."""

    def __init__(self, events: Events, machine: Machine) -> None:
        self.events, self.machine = events, machine
        self.exit_code: int | None = None
        """What the process ends with, once it is to end."""

    def run(self) -> int:
        """The loop; returns the exit code."""
        with SessionPool() as pool:
            for line in sys.stdin:
                self._draw(json.loads(line), pool)
                if self.exit_code is not None:
                    return self.exit_code
        return 0

    def _draw(self, job: dict[str, Any], pool: SessionPool) -> None:
        folder, loads = Path(job["folder"]), len(pool.loads)
        error = self._attempt(job, folder, pool)
        pool.interrupted = None
        lost = error is not None and is_lost(self.machine.on(job["data"]["device"]).device)
        if lost:
            self.exit_code = EX_TEMPFAIL
        elif error is not None and exit_code_of(error) == EXIT_CODES[signal.SIGTERM]:
            self.exit_code = exit_code_of(error)
        self.events.send(
            "ended",
            exit_code=0 if error is None else exit_code_of(error),
            error=None if error is None else one_line(error),
            error_type=None if error is None else type(error).__name__,
            weights_loaded=len(pool.loads) - loads,
            recorded=folder.exists(),
            leaving=self.exit_code is not None,
        )
        _close_log()
        free_memory()
        reap()

    def _attempt(self, job: dict[str, Any], folder: Path, pool: SessionPool) -> BaseException | None:
        """Draw one run; returns what ended it. What a plan refuses leaves no folder, as on the command line."""
        from fluxrun.runner import run

        try:
            with (
                Interrupts() as interrupts,
                interrupts.immediate(),
            ):  # also for what comes between this and the run's own
                self.events.send("begun")
                config = RunConfig.from_dict(job["data"], tuple(map(Path, job["dirs"])))
                prepare(config, self.machine)
                log_to(folder)
                logging.getLogger().addHandler(EventLines(self.events))
                reporter = EventReporter(self.events)
                run(config, folder, command=job["command"], machine=self.machine, pool=pool, reporter=reporter)
        except KeyboardInterrupt:
            return interrupts.error()
        except Exception as error:  # as of any run: it is this one's alone, and in its record
            if folder.exists() and write_failure(folder, job["data"], error):
                logging.getLogger("fluxrun").error("%s", error, exc_info=error)
            for one in chain(error):
                one.__traceback__ = None  # its frames hold what the run was working on
            return error
        return None


def _close_log() -> None:
    root = logging.getLogger()
    for handler in root.handlers[:]:
        root.removeHandler(handler)
        handler.close()


def _import_what_draws() -> None:
    """Before the first request, so that it need not wait for these; the collector need not look at them each time."""
    from fluxrun.process.switches import import_diffusers

    import_diffusers()
    import fluxrun.drawing.generation
    import fluxrun.pipeline.prompt_encoder
    import fluxrun.runner
    import fluxrun.weights.loading  # noqa: F401

    gc.collect()
    gc.freeze()


def _end() -> None:
    """The server is gone: a run that is being drawn closes its record first."""
    if Interrupts.innermost():
        Interrupts.end(signal.SIGTERM)
    else:
        os._exit(EXIT_CODES[signal.SIGTERM])


def _take_signals() -> None:
    """Between two runs SIGINT is for one that has just ended, and SIGTERM ends the process."""

    def terminate(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(EXIT_CODES[signal.SIGTERM])

    signal.signal(signal.SIGINT, lambda number, frame: None)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, terminate)


def main(descriptor: int, parent: int) -> int:
    """Draw until there is nothing more to come; returns the exit code."""
    _take_signals()
    adopt_orphans()
    end_with_parent(_end, parent)
    start_lean(ANY_OF_THEM)
    machine = detect()  # before weights of ours take memory: an "auto" must not depend on what was drawn before
    try:
        _import_what_draws()
        spans.forget()
        return Worker(Events(descriptor), machine).run()
    except SystemExit as ended:
        return int(str(ended.code))
    except FluxrunError as error:
        return error.exit_code


if __name__ == "__main__":
    own_process()
    code = main(int(sys.argv[1]), int(sys.argv[2]))
    if code:
        leave(code)
    leave_in_order(code)
