"""When each part of a run began and ended, in seconds since the operating system started this process."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass
class Span:
    """One part; while it lasts, ``end`` is None. Times as ``time.perf_counter`` gives them."""

    name: str
    start: float
    end: float | None = None


MOST_OF_A_NAME = 50
"""Of so many pictures each has its parts; the last one's then reach to the end, so that a record stays small."""

_spans: list[Span] = []
"""What was done since the last record was closed: the run that paid for it has it in its record."""


@cache
def process_start() -> float:
    """The process's start as ``time.perf_counter`` would have given it; on Linux to a hundredth of a second."""
    if sys.platform == "linux":
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # field 22, after the name
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    else:
        import psutil

        age = time.time() - psutil.Process().create_time()
    return time.perf_counter() - age


@contextmanager
def span(name: str) -> Iterator[None]:
    """Within: a part of the run. Parts may overlap, and be on several threads."""
    begun = begin(name)
    try:
        yield
    finally:
        begun.end = time.perf_counter()


def begin(name: str) -> Span:
    """A part that begins now; ``end`` ends it."""
    return add(name, time.perf_counter(), None)


def end(name: str) -> None:
    """The part of this name that began last and is not over."""
    for one in reversed(_spans):
        if one.name == name and one.end is None:
            one.end = time.perf_counter()
            return


def add(name: str, start: float, end: float | None) -> Span:
    """A part with the times that it began and, if it is over, ended."""
    same = [one for one in _spans if one.name == name]
    if len(same) >= MOST_OF_A_NAME:
        same[-1].end = end
        return same[-1]
    _spans.append(Span(name, start, end))
    return _spans[-1]


def recorded() -> list[tuple[str, float, float]]:
    """Every part since ``forget``: name, start and end in seconds since the process began; open ones end now."""
    zero, now = process_start(), time.perf_counter()
    spans = sorted(_spans, key=lambda one: one.start)
    return [(one.name, one.start - zero, (now if one.end is None else one.end) - zero) for one in spans]


def forget() -> None:
    """They are in a record now."""
    _spans.clear()
