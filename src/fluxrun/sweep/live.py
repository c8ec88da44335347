"""A sweep while it runs: one live table in a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

from rich.live import Live
from rich.table import Table
from rich.text import Text

from fluxrun.formatting import seconds
from fluxrun.process.console import Reporter, Steps, console
from fluxrun.report.rows import Row
from fluxrun.report.table import effective

log = logging.getLogger("fluxrun.sweep")

ROWS_AROUND = 8
"""Lines of the live table above and below the running job."""


@dataclass
class Line:
    """One job in the live table."""

    label: str
    status: str = "pending"
    options: str = ""
    pace: str = ""
    took_s: float | None = None


class SweepReporter(Reporter):
    """A run's reporter that also tells the sweep's table how fast the steps go."""

    def __init__(self, view: SweepView) -> None:
        self._view = view

    @contextmanager
    def steps(self, text: str, total: int) -> Iterator[Steps]:
        with super().steps(text, total) as shown:
            self._view.running = shown
            try:
                yield shown
            finally:
                self._view.running = None


class SweepView:
    """Shows jobs, options, status, seconds per step and the time left."""

    def __init__(self, labels: dict[str, str] | None) -> None:
        self._known = labels is not None
        self._lines = {name: Line(text) for name, text in (labels or {}).items()}
        self._current = ""
        self._began: dict[str, float] = {}
        self.at_once = 1
        """How many jobs run at a time."""
        self.running: Steps | None = None
        self.reporter = SweepReporter(self)
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> SweepView:
        if console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def begin(self, name: str, label: str) -> None:
        """A job starts."""
        line = self._lines.setdefault(name, Line(label))
        line.status = "running"
        self._current, self._began[name] = name, time.perf_counter()

    def end(self, name: str, row: Row) -> None:
        """A job is over; also one that an earlier sweep had completed."""
        line = self._lines.setdefault(name, Line(" ".join(row.overrides)))
        kept = line.status != "running"
        line.took_s = None if kept else time.perf_counter() - self._began[name]
        line.status = f"{row.status} before" if kept else row.status
        line.options, line.pace = effective(row), seconds(row.step_s)
        left = self._seconds_left()
        log.info(
            "job %s%s %s: %s%s%s",
            name,
            f" ({self._done()} of {len(self._lines)})" if self._known else "",
            line.status,
            line.label or line.options,
            f", {line.pace} a step" if row.step_s else "",
            f", about {left:.0f} s left" if left else "",
        )

    def _done(self) -> int:
        return sum(line.status not in ("pending", "running") for line in self._lines.values())

    def _seconds_left(self) -> float | None:
        """The mean of the jobs so far, times those that are left."""
        times = [line.took_s for line in self._lines.values() if line.took_s is not None]
        if not times or not self._known:
            return None
        return sum(times) / len(times) * (len(self._lines) - self._done()) / self.at_once

    def _render(self) -> Table:
        left = self._seconds_left()
        total = len(self._lines) if self._known else "?"
        title = f"{self._done()} of {total} jobs" + (f", about {left:.0f} s left" if left else "")
        columns = ("job", "what differs", "ran with", "status", "s/step")
        table = Table(*columns, title=title, title_justify="left", box=None)
        names = list(self._lines)
        middle = names.index(self._current) if self._current in names else 0
        for name in names[max(0, middle - ROWS_AROUND) : middle + ROWS_AROUND + 1]:
            line = self._lines[name]
            style = {"failed": "red", "running": "bold", "completed": "green"}.get(line.status, "dim")
            cells = (name, line.label, line.options, line.status, self._pace(line))
            table.add_row(*map(Text, cells), style=style)  # a prompt's brackets are no markup
        return table

    def _pace(self, line: Line) -> str:
        if line.status == "running" and self.running is not None and self.running.done:
            return f"{self.running.done}/{self.running.total}, {self.running.pace()}"
        return line.pace
