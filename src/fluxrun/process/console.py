"""What the user sees while a run is on: a live display in a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import logging.config
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from fluxrun.errors import ConfigError, one_line
from fluxrun.formatting import as_message, printable
from fluxrun.terminal import make_console

log = logging.getLogger("fluxrun")

console = make_console(stderr=True)
"""The one console: log lines and the live display share it, so that neither tears the other."""

PLAIN_STEP_SECONDS = 5.0
"""Without a terminal a step line is printed at most this often (seconds)."""


def is_shown(record: logging.LogRecord) -> bool:
    """Whether a log line is for the screen: fluxrun's own and Hydra's are, other libraries' are not."""
    return record.name.startswith("fluxrun") or record.name.split(".")[0] in ("hydra", "HYDRA")


class ConsoleHandler(logging.Handler):
    """Log lines on the console, without tracebacks (those are in the log file) and without other libraries' chatter."""

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__()

    def emit(self, record: logging.LogRecord) -> None:
        if not is_shown(record):
            return
        style = "red" if record.levelno >= logging.ERROR else "yellow" if record.levelno >= logging.WARNING else None
        prefix = (
            "error: " if record.levelno >= logging.ERROR else "warning: " if record.levelno >= logging.WARNING else ""
        )
        console.print(prefix + record.getMessage(), style=style, markup=False, highlight=False, soft_wrap=True)


class LogFile(logging.FileHandler):
    """A run's log file. What it cannot take (the disk is full, the folder is gone) is said once and left out."""

    def __init__(self, filename: str | Path) -> None:
        super().__init__(filename, encoding="utf-8", errors="backslashreplace", delay=True)
        self._said = False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError as error:  # it could not even be opened
            self._say(error)

    def handleError(self, record: logging.LogRecord) -> None:
        """Called by ``emit`` for what goes wrong while it writes; logging's own prints a traceback each time."""
        self._say(sys.exc_info()[1])

    def _say(self, error: BaseException | None) -> None:
        if not self._said and error is not None:
            self._said = True
            text = f"warning: {self.baseFilename} cannot be written: {one_line(error)}"
            console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)


class LogFormatter(logging.Formatter):
    """Lines of the log file: control characters escaped, further lines of a message set in from its first."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record), keep="\n\t").replace("\n", "\n  ")


def one_line_warning(message: Warning | str, *_: object, **__: object) -> str:
    """A library's warning as one printable line, without the line of its source code."""
    return f"warning: {as_message(str(message))}\n"


class Reporter:
    """Stage and step reports of one run."""

    @contextmanager
    def stage(self, text: str) -> Iterator[None]:
        """Show ``text`` with a running timer until the block ends; then log how long it took."""
        started = time.perf_counter()
        with self.timer(text):
            yield
        log.info("%s: %.1f s", text, time.perf_counter() - started)

    @contextmanager
    def timer(self, text: str) -> Iterator[None]:
        """Show ``text`` with a running timer, in a terminal."""
        if not console.is_terminal:
            yield
            return
        with Progress(
            SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True
        ) as live:
            live.add_task(text, total=None)
            yield

    @contextmanager
    def steps(self, text: str, total: int) -> Iterator[Steps]:
        """Show the denoising of one image (or batch) of ``total`` steps."""
        shown = _LiveSteps(text, total) if console.is_terminal else _PlainSteps(text, total)
        with shown:
            yield shown

    def saved(self, path: Path, seed: int) -> None:
        """A picture is on the disk, and in the record."""


class Steps:
    """Step reports of one image; the first step may be compiling."""

    def __init__(self, text: str, total: int) -> None:
        self.text, self.total, self.done = text, total, 0
        self.started = self._first_done = time.perf_counter()

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def compiling(self) -> None:
        """Say that the next step compiles first."""

    def advance(self) -> None:
        """One step is done."""
        self.done += 1
        if self.done == 1:
            self._first_done = time.perf_counter()

    def seconds_per_step(self) -> float:
        """Mean seconds per step; the first one, which may compile, counts only while it is alone."""
        now = time.perf_counter()
        return (now - self._first_done) / (self.done - 1) if self.done > 1 else now - self.started

    def pace(self) -> str:
        """Seconds per step and seconds still to go."""
        each = self.seconds_per_step()
        return f"{each:.2f} s/step · eta {each * (self.total - self.done):.0f} s"


COMPILING = "Compiling (first run only…)"


class _LiveSteps(Steps):
    def __enter__(self) -> Steps:
        columns = (  # narrow on purpose: the timer must be readable in 80 characters, also while compiling
            SpinnerColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TextColumn("{task.fields[pace]}"),
        )
        self._live = Progress(*columns, console=console, transient=True)
        self._live.start()
        self._task = self._live.add_task(self.text, total=self.total, pace="")
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def compiling(self) -> None:
        self._live.update(self._task, description=f"{self.text} · {COMPILING}")

    def advance(self) -> None:
        super().advance()
        self._live.update(self._task, description=self.text, completed=self.done, pace=self.pace())


class _PlainSteps(Steps):
    def __enter__(self) -> Steps:
        self._last = self.started
        return self

    def compiling(self) -> None:
        log.info("%s · %s", self.text, COMPILING)

    def advance(self) -> None:
        super().advance()
        now = time.perf_counter()
        if now - self._last >= PLAIN_STEP_SECONDS and self.done < self.total:
            self._last = now
            log.info("%s · step %d/%d · %s", self.text, self.done, self.total, self.pace())


def log_to(folder: Path, name: str = "fluxrun.log") -> None:
    """The same console and log file that Hydra sets up for an ordinary run; another ``name``: for a helper of one."""
    if name == "fluxrun.log" and os.path.exists(folder / "run.json"):
        raise ConfigError(f"{folder} already holds a run: choose another hydra.run.dir, or remove it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = LogFile(folder / name)
    except OSError as error:
        raise ConfigError(f"cannot write to the output folder {folder}: {error.strerror}") from error
    file.setFormatter(LogFormatter("[%(asctime)s][%(name)s][%(levelname)s] %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[ConsoleHandler(), file], force=True)
