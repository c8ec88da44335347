"""How a process of fluxrun's own ends once it is interrupted: no child stays, nothing that was said is lost."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import io
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import psutil

CLEANERS = ("resource_tracker", "fluxrun.workers.keeper")
"""Python's and loky's, and ours beside Ray: they remove what other processes have left, and then end by themselves."""

PR_SET_CHILD_SUBREAPER = 36

LOOK_S = 0.5
"""How often a process looks whether its parent is still there."""

SHOW_CURSOR = b"\r\x1b[K\x1b[?25h"
"""A live display hides it."""


def adopt_orphans() -> None:
    """On Linux: who loses its parent becomes this process's child, so that ``end_children`` finds it.

    A KeyboardInterrupt while Python waits for g++ kills g++ there, and not the cc1plus that works for it.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_children() -> None:
    """Kill this process's children and theirs (inductor's compile workers, a C++ compiler, a probe).

    They are stopped first: one that forks while it is looked for would leave a child that nobody finds any more.
    """
    stopped: set[psutil.Process] = set()
    while new := [child for child in _children() if child not in stopped]:
        for child in new:
            _signal(child, signal.SIGSTOP if os.name == "posix" else signal.SIGTERM)
        stopped.update(new)
    for child in stopped:
        _signal(child, signal.SIGKILL if os.name == "posix" else signal.SIGTERM)


def _children() -> list[psutil.Process]:
    if os.name == "posix" and not _has_children():
        return []
    import psutil

    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if child.status() != psutil.STATUS_ZOMBIE and not _is_cleaner(child.cmdline()):
                found.append(child)
    return found


def _is_cleaner(words: Sequence[str]) -> bool:
    return any(name in word for word in words for name in CLEANERS)


def _has_children() -> bool:
    """Asked of the system: psutil alone takes longer to import than a short command may take to end."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    import psutil

    with contextlib.suppress(psutil.Error):  # it has ended by itself
        process.send_signal(number)


def reap() -> None:
    """Take note of children that have ended, adopted ones among them: until then the system keeps their numbers."""
    if os.name == "posix":
        with contextlib.suppress(ChildProcessError):  # there are none
            while os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG):
                pass


def leave(code: int) -> NoReturn:
    """End an interrupted process now, with everything flushed and every child ended.

    The interpreter's own way takes a second or two with torch in it, and waits for compile workers.
    """
    try:
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # closed, or nobody there
                if stream is not None:
                    stream.flush()
        end_children()
    finally:
        os._exit(code)


def leave_in_order(code: int) -> NoReturn:
    """End a process of our own that is done: all that Python does at its end, but for taking everything apart.

    With torch and a model in memory that takes one to four seconds, and nobody has anything of it.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are no daemons, pools' among them
    atexit._run_exitfuncs()
    _flush_files()
    leave(code)


def _flush_files() -> None:
    """What open files have not written yet, which Python does as it takes them apart."""
    gc.unfreeze()
    for one in gc.get_objects():
        if type(one) in (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom):
            with contextlib.suppress(OSError, ValueError):  # closed, or nobody there
                one.flush()


def say_last(text: str) -> None:
    """A last line on standard error, past the console: who holds its lock may never let go of it again."""
    with contextlib.suppress(OSError, ValueError):
        if select.select([], [2], [], 0)[1]:
            os.write(2, (SHOW_CURSOR if os.isatty(2) else b"") + text.encode() + b"\n")


def end_with_parent(end: Callable[[], None], parent: int | None = None) -> None:
    """Call ``end`` once this process's parent is gone, however it went; its time is up, nobody waits for the job.

    ``parent`` is its number, where it may be gone already.
    """
    parent = parent or os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_S)
        end()

    threading.Thread(target=watch, name="fluxrun-parent", daemon=True).start()
