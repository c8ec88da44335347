"""Sweeps asked for over HTTP: ordinary runs, one after the other in the queue, and at the end a report over them."""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal

from fluxrun.errors import ConfigError, FluxrunError, one_line
from fluxrun.report.result import missing_libraries, rebuild, write_files
from fluxrun.serving.history import ID
from fluxrun.serving.messages import SweepJob, SweepStatus
from fluxrun.serving.rules import Accepted
from fluxrun.serving.runs import QueueFull, Run, Runs

log = logging.getLogger("fluxrun.serve")

PATIENCE_S = 0.5
"""Between two looks whether the queue has a place again: a sweep lets others in between its jobs."""


@dataclass
class Sweep:
    """The combinations of what varies, and how far they are."""

    id: str
    folder: Path
    labels: list[str]
    accepted: list[Accepted]
    runs: list[Run] = field(default_factory=list)
    state: Literal["drawing", "reporting", "completed", "interrupted"] = "drawing"
    problem: str | None = None
    """Why there is no report."""

    def status(self) -> SweepStatus:
        """As it stands."""
        begun = dict(enumerate(self.runs))
        return SweepStatus(
            id=self.id,
            state=self.state,
            problem=self.problem,
            report=(self.folder / "report.html").is_file(),
            jobs=[_job(label, begun.get(number)) for number, label in enumerate(self.labels)],
        )


def _job(label: str, run: Run | None) -> SweepJob:
    if run is None:
        return SweepJob(label=label, state="pending")
    took = run.ended_at - run.started_at if run.ended_at and run.started_at else None
    picture = next((str(event["path"]) for event in run.events if event["event"] == "picture"), None)
    return SweepJob(label=label, state=run.state, run=run.id, error=run.error, seconds=took, image=picture)


class Sweeps:
    """All sweeps of this server."""

    def __init__(self, folder: Path, runs: Runs, most: int) -> None:
        self._folder, self._runs, self._most = folder, runs, most
        self.known: dict[str, Sweep] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def add(self, overrides: Sequence[str], axes: Mapping[str, Sequence[str]]) -> Sweep:
        """Check every combination, then begin. Raises ConfigError or TrustError for the first that may not be drawn."""
        values = [[f"{key}={value}" for value in dict.fromkeys(given)] for key, given in axes.items() if given]
        combinations = list(itertools.islice(itertools.product(*values), self._most + 1))
        if len(combinations) > self._most:
            raise ConfigError(f"a sweep of more than {self._most} jobs: this server's limit (--limit images=…)")
        accepted = [await self._checked([*overrides, *varied]) for varied in combinations]
        name = f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(4)}"
        labels = [" ".join(varied) or "as asked" for varied in combinations]
        sweep = self.known[name] = Sweep(name, self._folder / name, labels, accepted)
        task = asyncio.create_task(self._draw(sweep))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return sweep

    async def _checked(self, overrides: Sequence[str]) -> Accepted:
        return await asyncio.to_thread(self._runs.rules.check, overrides)

    def stop(self, sweep: Sweep) -> None:
        """Stop the job that is being drawn; no further one begins."""
        if sweep.state == "drawing":
            sweep.state = "interrupted"
            for run in sweep.runs:
                self._runs.cancel(run)

    async def _draw(self, sweep: Sweep) -> None:
        for accepted in sweep.accepted:
            run = await self._put(sweep, accepted)
            if run is None:
                break
            sweep.runs.append(run)
            await run.wait()
        stopped = sweep.state == "interrupted" or self._runs.stopping
        sweep.state = "interrupted" if stopped else "reporting"
        if not stopped:
            sweep.problem = await asyncio.to_thread(_report, sweep)
            sweep.state = "completed"

    async def _put(self, sweep: Sweep, accepted: Accepted) -> Run | None:
        """The next job in the queue, once there is a place; None when no further one is to begin."""
        while sweep.state == "drawing" and not self._runs.stopping:
            try:
                return self._runs.put(accepted)
            except QueueFull:
                await asyncio.sleep(PATIENCE_S)
        return None

    def report(self, name: str) -> Path | None:
        """A sweep's page, also of an earlier server's; None where there is none."""
        path = self._folder / name / "report.html"
        return path if ID.fullmatch(name) and path.is_file() else None


def _report(sweep: Sweep) -> str | None:
    """Write the table and the page over a sweep's runs; returns why there is none."""
    folders = [run.folder for run in sweep.runs if (run.folder / "run.json").is_file()]
    if not folders:
        return "no job has left a record"
    if reason := missing_libraries():
        return f"{reason} (pip install 'fluxrun[report]')"
    try:
        sweep.folder.mkdir(parents=True, exist_ok=True)
        write_files(sweep.folder, rebuild(folders, sweep.folder), sweep.folder)
    except (FluxrunError, OSError, ValueError) as error:
        log.error("no report of sweep %s: %s", sweep.id, one_line(error), exc_info=error)
        return one_line(error)
    return None
