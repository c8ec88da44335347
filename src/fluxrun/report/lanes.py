"""A run's parts as lanes: one row of bars, and another below it for what went on at the same time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fluxrun.record.schema import SpanRecord

COLOURS = {
    "interpreter": "start", "compose": "start", "plan": "start", "import": "import", "read": "load", "load": "load",
    "apply": "apply", "kernels": "apply", "noise": "encode", "encode": "encode", "first call": "first",
    "steps": "steps", "decode": "decode", "save": "save", "close": "save",
}  # fmt: skip
"""The class of each part in the page's style sheet."""

HAIRLINE = 0.15
"""Percent: a bar is at least so wide, so that it can be seen."""


@dataclass(frozen=True)
class Bar:
    """One part; ``left`` and ``width`` are percent of the job's whole time."""

    name: str
    colour: str
    left: float
    width: float
    seconds: float


def lanes(spans: Sequence[SpanRecord]) -> list[list[Bar]]:
    """Bars by lane, from the first part's start to the last one's end; none for a record without parts."""
    if not spans:
        return []
    zero, end = min(span.start_s for span in spans), max(span.end_s for span in spans)
    whole = max(end - zero, 1e-9)
    found: list[list[Bar]] = []
    busy: list[float] = []
    """When each lane is free again."""
    for span in sorted(spans, key=lambda span: (span.start_s, -span.end_s)):
        lane = next((n for n, until in enumerate(busy) if until <= span.start_s), len(busy))
        if lane == len(busy):
            busy.append(0.0)
            found.append([])
        busy[lane] = span.end_s
        seconds = span.end_s - span.start_s
        left, width = 100 * (span.start_s - zero) / whole, max(HAIRLINE, 100 * seconds / whole)
        found[lane].append(Bar(span.name, COLOURS.get(span.name, "other"), left, width, seconds))
    return found
