"""How far all workers are, and who draws what: one table in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from rich.live import Live
from rich.table import Table
from rich.text import Text

from fluxrun.formatting import shorten
from fluxrun.process.console import PLAIN_STEP_SECONDS, console

log = logging.getLogger("fluxrun.workers")

MOST_ROWS = 24
"""Workers in the table; more would not be on the screen."""


@dataclass
class Place:
    """One worker, as the table shows it."""

    where: str = ""
    doing: str = "starting"
    pictures: int = 0
    since: float = 0.0
    """When it began what it does."""


class Board:
    """Counts what is done of ``total`` ``units`` (jobs or pictures), and of pictures in any case."""

    def __init__(self, total: int, units: str) -> None:
        self.total, self.units = total, units
        self.done = self.drawn = 0
        self._places: dict[int, Place] = {}
        self._began: float | None = None
        """When the first task began: starting up is not what the others will take."""
        self._before = 0
        self._said = time.monotonic()
        self._live = Live(get_renderable=self.table, console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Board:
        if console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    # -- what happens -------------------------------------------------------------------------------------------------

    def starts(self, worker: int) -> None:
        """A worker's process starts."""
        self._places[worker] = Place(pictures=self._places[worker].pictures if worker in self._places else 0)

    def waits(self, worker: int, where: str = "") -> None:
        """A worker has nothing to do (yet)."""
        place = self._places[worker]
        place.where, place.doing = where or place.where, "waiting"

    def begins(self, worker: int, what: str) -> None:
        """A worker begins a task."""
        if self._began is None:
            self._began, self._before = time.monotonic(), self.done
        place = self._places[worker]
        place.doing, place.since = what, time.monotonic()

    def pictures(self, worker: int, number: int) -> None:
        """A worker has drawn pictures."""
        self.drawn += number
        self._places[worker].pictures += number

    def tick(self) -> None:
        """Where there is no table: say now and then how far things are."""
        now = time.monotonic()
        if not console.is_terminal and self.drawn and now - self._said >= PLAIN_STEP_SECONDS:
            self._said = now
            log.info("%s", self.line())

    # -- how far it is ------------------------------------------------------------------------------------------------

    def line(self) -> str:
        """``37 of 120 pictures, 3.1 pictures a second, about 27 s left``."""
        took = self._took()
        pace = f", {self.drawn / took:.2g} pictures a second" if took and self.drawn else ""
        left = self.seconds_left()
        return f"{self.done} of {self.total} {self.units}{pace}" + (f", about {left:.0f} s left" if left else "")

    def seconds_left(self) -> float | None:
        """By what was done since the first worker began."""
        took, done = self._took(), self.done - self._before
        return took / done * (self.total - self.done) if took and done else None

    def _took(self) -> float:
        return time.monotonic() - self._began if self._began is not None else 0.0

    def table(self) -> Table:
        """The live table."""
        table = Table("worker", "pictures", "draws", "for", "where", title=self.line(), title_justify="left", box=None)
        now = time.monotonic()
        for number, place in sorted(self._places.items())[:MOST_ROWS]:
            busy = place.doing not in ("starting", "waiting")
            cells = (
                str(number),
                str(place.pictures),
                shorten(place.doing, 60),
                f"{now - place.since:.0f} s" if busy else "",
                place.where,
            )
            table.add_row(*map(Text, cells), style="bold" if busy else "dim")  # a prompt's brackets are no markup
        if (more := len(self._places) - MOST_ROWS) > 0:
            table.add_row("…", "", f"and {more} workers more")
        return table
