"""Ctrl+C, SIGTERM, a closed terminal: the first stops at the next step, the second at once; no child stays behind."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

from fluxrun.errors import Interrupted

Handler = Callable[[int, FrameType | None], Any] | int | None

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
if os.name == "posix":
    EXIT_CODES[signal.SIGHUP] = 129


class Interrupts:
    """Handles SIGINT, SIGTERM and SIGHUP (the terminal was closed) while a run is on; nohup's SIGHUP stays ignored.

    While loading and compiling (``immediate``) the first signal raises KeyboardInterrupt right there: a flag would
    wait out a whole compile. Otherwise it sets a flag that the denoising loop looks at after every step.
    """

    def __init__(
        self, on_second: Callable[[], None] = lambda: None, on_first: Callable[[], None] = lambda: None
    ) -> None:
        self.requested: signal.Signals | None = None
        self._immediate = False
        self._on_first = on_first
        self._on_second = on_second
        self._before: dict[signal.Signals, Handler] = {}

    def __enter__(self) -> Interrupts:
        # Only the main thread may set handlers; elsewhere (a notebook's worker) the caller's stay in place.
        if threading.current_thread() is threading.main_thread():
            wanted = [number for number in EXIT_CODES if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._handle) for number in wanted}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            try:
                self._end_at_once()
                end_children()
            finally:  # whatever goes wrong in here: the second signal ends the process
                os._exit(EXIT_CODES[signal.Signals(number)])
        self.requested = signal.Signals(number)
        self._on_first()
        if self._immediate:
            raise KeyboardInterrupt

    def _end_at_once(self) -> None:
        """What is to be done before the process ends: for this run or job, then for the sweep around it."""
        self._on_second()
        around = getattr(self._before.get(signal.SIGINT), "__self__", None)
        if isinstance(around, Interrupts):
            around._end_at_once()

    @contextlib.contextmanager
    def immediate(self) -> Iterator[None]:
        """Within: a signal raises KeyboardInterrupt at once (and one that came before, on entering)."""
        self.check()
        self._immediate = True
        try:
            yield
        finally:
            self._immediate = False

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.requested is not None:
            raise self.error()

    def error(self) -> Interrupted:
        """The error that ends the run, with the exit code of the signal."""
        number = self.requested or signal.SIGINT
        error = Interrupted("interrupted" if number == signal.SIGINT else "terminated")
        error.exit_code = EXIT_CODES[number]
        return error


def end_children() -> None:
    """Kill this process's children (inductor's compile workers, a probe)."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
