"""Runs: waiting in a bounded queue, drawn one at a time, followed by whoever asks, stopped by whoever may."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from fluxrun.errors import FluxrunError, Interrupted, one_line
from fluxrun.record.folder import remove_unfinished, write_failure
from fluxrun.serving.child import Child, WorkerDied
from fluxrun.serving.rules import Accepted, Rules

log = logging.getLogger("fluxrun.serve")

State = Literal["queued", "drawing", "completed", "failed", "interrupted", "refused", "cancelled"]

ENDED: tuple[State, ...] = ("completed", "failed", "interrupted", "refused", "cancelled")

MOST_REMEMBERED = 500
"""Runs whose events are kept once they have ended; the rest is in their folders."""

MOST_LINES = 1000
"""Events of a run that are kept, its steps not counted."""


class QueueFull(FluxrunError):
    """There are as many requests waiting as the server keeps."""


@dataclass
class Run:
    """One request on its way: what was asked, where it is, and what happened."""

    id: str
    accepted: Accepted
    folder: Path
    state: State = "queued"
    error: str | None = None
    error_type: str | None = None
    exit_code: int | None = None
    weights_loaded: int = 0
    queued_at: float = field(default_factory=time.time)
    started_at: float | None = None
    ended_at: float | None = None
    begun: bool = False
    """Whether the worker has begun with it: from then on it takes an interrupt."""
    stops: int = 0
    """How often somebody has asked for its end."""
    events: list[dict[str, Any]] = field(default_factory=list)
    progress: dict[str, Any] | None = None
    """The last step; those before it are nobody's business any more."""
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen."""
        return self.state in ENDED

    def note(self, event: dict[str, Any]) -> None:
        """Something has happened: whoever follows the run is told."""
        if event["event"] == "step":
            self.progress = event
        elif len(self.events) < MOST_LINES or event["event"] in ("state", "picture"):
            self.events.append(event)
        self._changed.set()
        self._changed = asyncio.Event()

    def enter(self, state: State) -> None:
        """Go on to another state."""
        self.state = state
        if state == "drawing":
            self.started_at = time.time()
        elif self.ended:
            self.ended_at = time.time()
            self.progress = None
        self.note({"event": "state", "state": state, "exit_code": self.exit_code, "error": self.error})

    async def follow(self, after: int = 0) -> AsyncIterator[tuple[int, dict[str, Any]]]:
        """Events from number ``after`` on, each with the number to go on from; ends when the run has ended."""
        shown: dict[str, Any] | None = None
        while True:
            changed = self._changed
            while after < len(self.events):
                after += 1
                yield after, self.events[after - 1]
            if self.progress is not None and self.progress is not shown:
                shown = self.progress
                yield after, shown
            if self.ended and after >= len(self.events):
                return
            await changed.wait()

    async def wait(self) -> None:
        """Until it has ended."""
        while not self.ended:
            await self._changed.wait()


class Runs:
    """All runs of one process, and the task that has them drawn one by one."""

    def __init__(
        self, folder: Path, rules: Rules, queue: int, idle_s: float | None, child: Child | None = None
    ) -> None:
        self.folder, self.rules, self._idle_s = folder, rules, idle_s
        self.child = child or Child()
        self.known: OrderedDict[str, Run] = OrderedDict()
        self.current: Run | None = None
        self.stopping = False
        self._queue: asyncio.Queue[Run] = asyncio.Queue(maxsize=queue)
        self._seconds = 5.0
        """What a run took lately: how long a client is told to wait."""

    # -- in ---------------------------------------------------------------------------------------------------------

    async def add(self, overrides: Sequence[str]) -> Run:
        """Check a request and put it into the queue. Raises ConfigError, TrustError or QueueFull."""
        self._refuse_when_full()
        return self.put(await asyncio.to_thread(self.rules.check, overrides))

    def put(self, accepted: Accepted) -> Run:
        """Put what was checked into the queue. Raises QueueFull."""
        self._refuse_when_full()
        name = f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(4)}"
        run = Run(name, accepted, self.folder / "runs" / name)
        self._queue.put_nowait(run)
        self.known[run.id] = run
        self._forget_old()
        run.note({"event": "state", "state": "queued", "waiting": self._queue.qsize() - 1})
        return run

    def _refuse_when_full(self) -> None:
        if self._queue.full() or self.stopping:
            raise QueueFull(
                "the server is stopping" if self.stopping else f"{self._queue.qsize()} requests are waiting"
            )

    @property
    def waiting(self) -> int:
        """Requests in the queue that nobody has taken back."""
        return sum(run.state == "queued" for run in self.known.values())

    def retry_after_s(self) -> int:
        """When a place in the queue may be free."""
        return max(1, round(self._seconds))

    def _forget_old(self) -> None:
        for old in list(self.known.values()):
            if len(self.known) <= MOST_REMEMBERED:
                return
            if old.ended:
                del self.known[old.id]

    # -- stopping -----------------------------------------------------------------------------------------------------

    def cancel(self, run: Run) -> None:
        """Take a waiting run out, stop one that is being drawn at its next step; asked again, at once."""
        if run.state == "queued":
            run.exit_code, run.error = 130, "cancelled before it began"
            run.enter("cancelled")
        elif run.state == "drawing":
            run.stops += 1
            if run.stops > 1:
                self.child.kill()
            elif run.begun:
                self.child.interrupt()

    async def stop(self) -> None:
        """Finish the step that is being made and its record; whatever waits is cancelled, no child is left."""
        self.stopping = True
        for run in list(self.known.values()):
            if run.state == "queued":
                self.cancel(run)
        await self.child.stop()
        if self.current is not None:
            await self.current.wait()

    def stop_at_once(self) -> None:
        """The same without waiting for the step."""
        self.child.kill()

    # -- drawing ------------------------------------------------------------------------------------------------------

    async def work(self) -> None:
        """Draw what comes, for as long as the server lives."""
        await self.child.start()
        while True:
            run = await self._next()
            if run.state != "queued":
                continue
            self.current = run
            run.enter("drawing")
            try:
                await self._draw(run)
            except WorkerDied as error:
                await self._note_death(run, error)
            except Exception as error:  # a mistake of the server's own ends this run, not the queue
                log.error("%s", one_line(error), exc_info=error)
                self._end(run, {"exit_code": 1, "error": one_line(error), "error_type": type(error).__name__})
            finally:
                self.current = None

    async def _next(self) -> Run:
        """The next run; with none for long, the worker's memory is given back until one comes."""
        try:
            return await asyncio.wait_for(self._queue.get(), self._idle_s)
        except TimeoutError:
            await self.child.stop()
            return await self._queue.get()

    async def _draw(self, run: Run) -> None:
        job = {
            "folder": str(run.folder),
            "data": run.accepted.data,
            "dirs": [str(folder) for folder in self.rules.dirs],
            "command": ["fluxrun", *run.accepted.overrides],
        }
        async for event in self.child.draw(job):
            if event["event"] == "ended":
                self._end(run, event)
            elif event["event"] == "begun":
                run.begun = True
                if run.stops:
                    self.child.interrupt()
            else:
                if "text" in event:
                    event["text"] = event["text"].replace(str(run.folder), f"runs/{run.id}")
                run.note(event)

    def _end(self, run: Run, ended: dict[str, Any]) -> None:
        run.exit_code = code = int(ended["exit_code"])
        error = ended["error"]
        run.error = error and str(error).replace(str(run.folder), f"runs/{run.id}")
        run.error_type = ended["error_type"]
        run.weights_loaded = ended.get("weights_loaded", 0)
        refused = code == 2 and not ended.get("recorded")
        run.enter("completed" if not code else "refused" if refused else "interrupted" if code > 128 else "failed")
        assert run.started_at is not None
        assert run.ended_at is not None
        self._seconds = run.ended_at - run.started_at

    async def _note_death(self, run: Run, error: WorkerDied) -> None:
        """The worker's end in the middle of a run: in its record, and told to whoever waits for it."""
        ended: FluxrunError = Interrupted("interrupted") if run.stops > 1 or self.stopping else error
        with contextlib.suppress(OSError):  # a full disk
            await asyncio.to_thread(write_failure, run.folder, run.accepted.data, ended)
            await asyncio.to_thread(remove_unfinished, run.folder)
        what = {"error": one_line(ended), "error_type": type(ended).__name__, "recorded": True}
        self._end(run, {"exit_code": ended.exit_code, **what})
        if not self.stopping:
            await self.child.start()
