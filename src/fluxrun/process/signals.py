"""Ctrl+C, SIGTERM, a closed terminal: the first stops at the next step, the second at once; no child stays behind."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType, TracebackType
from typing import Any, ClassVar

from fluxrun.errors import Interrupted
from fluxrun.process.ending import end_children, say_last

AGAIN = "; Ctrl+C again ends at once"
"""What a line about stopping says at its end to whoever sits at the terminal."""

Handler = Callable[[int, FrameType | None], Any] | int | None

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
if os.name == "posix":
    EXIT_CODES[signal.SIGHUP] = 129

AGAIN_S = 0.01
"""How soon a KeyboardInterrupt that went nowhere is raised again."""

MOST_S = 5.0
"""Whatever is done before the process ends at once, this is its end."""


class Interrupts:
    """Handles SIGINT, SIGTERM and SIGHUP (the terminal was closed) while a run is on; nohup's SIGHUP stays ignored.

    While importing, loading, encoding and compiling (``immediate``) the first signal raises KeyboardInterrupt right
    there: a flag would wait out a whole compile. Otherwise it sets a flag that the denoising loop looks at after every
    step, and ``on_first`` is called. ``on_second`` is what is done before the process ends at once.
    """

    raised: ClassVar[bool] = False
    """Whether a signal has raised in this process: it is on its way to its end."""
    unwound: ClassVar[bool] = False
    """Whether that has come as far as the code which closes records and shows tables."""
    _at_the_end: ClassVar[threading.Lock] = threading.Lock()

    def __init__(
        self, on_second: Callable[[], None] = lambda: None, on_first: Callable[[], None] = lambda: None
    ) -> None:
        self.requested: signal.Signals | None = None
        self.is_immediate = False
        """Whether a signal raises at the moment."""
        self._on_first = on_first
        self._on_second = on_second
        self._before: dict[signal.Signals, Handler] = {}
        self._hook_before = sys.unraisablehook
        self._again = False
        """Whether the next signal is the first one once more."""

    def __enter__(self) -> Interrupts:
        # Only the main thread may set handlers; elsewhere (a notebook's worker) the caller's stay in place.
        if threading.current_thread() is threading.main_thread():
            wanted = [number for number in EXIT_CODES if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._handle) for number in wanted}
            self._hook_before, sys.unraisablehook = sys.unraisablehook, self._went_nowhere
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        Interrupts.unwound = Interrupts.raised
        if threading.current_thread() is threading.main_thread():
            sys.unraisablehook = self._hook_before
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @staticmethod
    def innermost() -> Interrupts | None:
        """Those that would handle a signal now."""
        handlers = (getattr(signal.getsignal(number), "__self__", None) for number in EXIT_CODES)
        return next((handler for handler in handlers if isinstance(handler, Interrupts)), None)

    @staticmethod
    def end(number: signal.Signals, last_line: str = "") -> None:
        """End the process through those that would handle a signal now; where there are none it is at its very end."""
        if innermost := Interrupts.innermost():
            innermost.end_process(number, last_line)

    def _went_nowhere(self, found: sys.UnraisableHookArgs) -> None:
        """Python drops what a destructor raises, and prints a traceback: a KeyboardInterrupt is raised once more."""
        if found.exc_type is not KeyboardInterrupt or self.requested is None:
            self._hook_before(found)
            return
        self._again = True
        main, number = threading.main_thread().ident, self.requested
        send = partial(signal.pthread_kill, main) if os.name == "posix" and main else signal.raise_signal
        threading.Timer(AGAIN_S, send, [number]).start()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._again:
            self._again = False
            if self.is_immediate:
                raise KeyboardInterrupt
            return
        if self.requested is not None:
            self.end_process(signal.Signals(number))
            return
        self.requested = signal.Signals(number)
        if self.is_immediate:
            Interrupts.raised = True
            self._on_first()
            raise KeyboardInterrupt
        self._on_first()

    def end_process(self, number: signal.Signals, last_line: str = "") -> None:
        """End the process from wherever it is: records are closed, children killed. From a handler or any thread.

        Returns only when that is being done already, by another thread or by what this handler has interrupted.
        """
        if not Interrupts._at_the_end.acquire(blocking=False):
            return
        self.requested = self.requested or number
        last = threading.Timer(MOST_S, os._exit, [EXIT_CODES[number]])
        last.daemon = True
        try:
            last.start()
            self._end_at_once()
            end_children()
            if last_line:
                say_last(last_line)
        finally:  # whatever goes wrong in here: the process ends
            os._exit(EXIT_CODES[number])

    def _end_at_once(self) -> None:
        """What is to be done before the process ends: for this run or job, then for the sweep around it."""
        self._on_second()
        around = next((getattr(handler, "__self__", None) for handler in self._before.values()), None)
        if isinstance(around, Interrupts):
            around.requested = around.requested or self.requested
            around._end_at_once()

    @contextlib.contextmanager
    def immediate(self) -> Iterator[None]:
        """Within: a signal raises KeyboardInterrupt at once (and one that came before, on entering).

        What a library makes of that (Hydra: a failed composition) is KeyboardInterrupt again on leaving.
        """
        self.check()
        before, self.is_immediate = self.is_immediate, True
        try:
            yield
        except Exception as error:
            if self.requested is None or isinstance(error, Interrupted):
                raise
            raise KeyboardInterrupt from error
        finally:
            self.is_immediate = before

    @staticmethod
    @contextlib.contextmanager
    def held_back() -> Iterator[None]:
        """Within: signals wait, in this thread and in the processes it starts, for ``let_through`` there."""
        if os.name != "posix":
            yield
            return
        before = signal.pthread_sigmask(signal.SIG_BLOCK, EXIT_CODES)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    @staticmethod
    def let_through() -> None:
        """Take the signals that have waited since before this process began."""
        if os.name == "posix":
            signal.pthread_sigmask(signal.SIG_UNBLOCK, EXIT_CODES)

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
