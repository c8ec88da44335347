"""Watches over a process that is fluxrun's own: once it is to end it does so soon, whatever its main thread is at."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from fluxrun.process.ending import adopt_orphans
from fluxrun.process.signals import EXIT_CODES, Interrupts

GRACE_S = 0.5
"""What the main thread has for getting out of what it was at: a library may swallow KeyboardInterrupt, or not look."""

CLOSING_S = 1.5
"""What it has on top of that once it closes records and shows tables."""


@contextmanager
def watched() -> Iterator[None]:
    """Within: a signal that is to raise KeyboardInterrupt ends the process also where Python's own handlers come late.

    They run between two steps of Python code only: not while a library is being loaded, or computes. The number of a
    signal is written to a pipe right when it comes, and a thread reads it there.
    """
    if os.name != "posix":
        yield
        return
    adopt_orphans()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_forget_the_pipe)
    threading.Thread(target=_watch, args=(reading,), name="fluxrun-signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)


def _forget_the_pipe() -> None:
    """A signal to a forked child is none to this process."""
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)


def _watch(reading: int) -> None:
    came = 0
    while data := os.read(reading, 64):
        numbers = [signal.Signals(byte) for byte in data if byte in EXIT_CODES]
        came += len(numbers)
        if numbers and (came > 1 or _is_to_end()):
            _end_soon(numbers[-1])
    os.close(reading)


def _is_to_end() -> bool:
    """Whether a signal raises at the moment, or has done so; elsewhere, the run ends itself at the next step."""
    innermost = Interrupts.innermost()
    return Interrupts.raised or (innermost is not None and innermost.is_immediate)


def _end_soon(number: signal.Signals) -> None:
    time.sleep(GRACE_S)
    if Interrupts.unwound:
        time.sleep(CLOSING_S)
    Interrupts.end(number, "error: interrupted" if number == signal.SIGINT else "error: terminated")
