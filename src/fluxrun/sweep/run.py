"""A sweep: many runs from one command, with weights loaded once, each failing alone, and one table at the end.

A job is composed when it comes, and Hydra calls ``SweepTask`` for it, which in this process is ``Sweep.job``; around
that, everything is here, because Hydra's own end-of-multirun callback is not called once a job has failed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hydra._internal.hydra import Hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from fluxrun.atomic import Reserve
from fluxrun.config.composition import CONFIG_NAME, explain_composition, hydra_errors, shown, to_data
from fluxrun.config.schema import RunConfig, SweepConfig, WorkersConfig
from fluxrun.errors import ConfigError, FluxrunError, Interrupted, exit_code_of, is_said, one_line
from fluxrun.pipeline.session_pool import SessionPool
from fluxrun.process.ending import end_children
from fluxrun.process.signals import Interrupts
from fluxrun.record.folder import RESERVE, data_hash, write_failure
from fluxrun.report.result import SweepProgress, finish
from fluxrun.report.rows import GridJob, Result, Row, read_row
from fluxrun.streams import lasting
from fluxrun.sweep.baseline import as_jobs, baseline_label, missing, wanted
from fluxrun.sweep.child import run_in_child
from fluxrun.sweep.drawing import draw_beside
from fluxrun.sweep.elsewhere import close_records, end_workers_with_us, stop_jobs
from fluxrun.sweep.elsewhere import job as job_elsewhere
from fluxrun.sweep.folder import arrange, baseline_folder, locked, set_aside
from fluxrun.sweep.grid import pending_row
from fluxrun.sweep.launch import launch_grid
from fluxrun.sweep.live import SweepView
from fluxrun.sweep.objective import objective
from fluxrun.sweep.on_workers import Assignment, GridWork, assigned
from fluxrun.types import JsonObject
from fluxrun.workers.actor import Begun, Ended, Event
from fluxrun.workers.board import Board
from fluxrun.workers.cluster import connected
from fluxrun.workers.pool import MOST_RETURNS, Pool, WorkerLost

log = logging.getLogger("fluxrun.sweep")

LEAST_RESERVE_BYTES = 32 * 1024
"""Kept in hand for the last sweep.json and sweep.csv; more where sweep.json is larger."""


@dataclass
class Sweep:
    """A planned sweep: what is known before the first job."""

    config: SweepConfig
    folder: Path
    dirs: tuple[Path, ...]
    overrides: list[str]
    """What Hydra gets, in the order in which it varies."""
    command: list[str]
    """What was typed."""
    grid: list[GridJob] | None
    """All jobs, or None when a sweeper chooses them as it goes."""
    order: list[str] = field(default_factory=list)
    workers: bool = False
    """Whether the jobs run in joblib's processes, which are children of this one."""
    crew: WorkersConfig | None = None
    """The Ray actors that are to draw the jobs."""
    pool: SessionPool = field(default_factory=SessionPool)
    rows: dict[str, Row] = field(default_factory=dict)
    completed: dict[str, Path] = field(default_factory=dict)
    """Folders of completed runs by config hash, baselines' among them."""
    earlier: list[Row] = field(default_factory=list)
    """The rows of what was completed before this sweep began."""
    unrecorded: dict[str, Row] = field(default_factory=dict)
    """Jobs that failed on a disk that did not take their record, by folder."""
    no_baseline: set[str] = field(default_factory=set)
    """Baselines that failed, by config hash: they are not tried again for every job."""
    started: float = field(default_factory=time.perf_counter)
    started_at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    next_save: float = 0.0
    """When sweep.json may be written again."""
    interrupted: KeyboardInterrupt | Interrupted | None = None
    """What ended a job, and the sweep with it."""

    def __post_init__(self) -> None:
        self.reserve = Reserve(self.folder / RESERVE)
        self.pending = {str(job.number): pending_row(job) for job in self.grid or ()}
        self.loads: list[str] = []
        """Why workers have loaded weights."""

    # -- the whole ----------------------------------------------------------------------------------------------

    def run(self, hydra: Hydra) -> int:
        """Run every job through Hydra, whatever ends it leave a true table; returns the exit code."""
        task = SweepTask(self.dirs, self.command, self)
        ended: BaseException | None = None
        with lasting("stdout"), locked(self.folder):
            self.completed = arrange(self.folder, [job.config_hash for job in self.grid or ()])
            self.view = SweepView(self._labels())
            self._take_over()
            try:
                # Between two jobs a signal ends the sweep at once; a job handles its own.
                interrupts = Interrupts(on_second=self._abandon, on_first=self._tell_workers)
                with interrupts, interrupts.immediate(), self.view if self.crew is None else nullcontext():
                    self._launch(hydra, task)
            except (KeyboardInterrupt, Interrupted) as error:
                ended = interrupts.error() if interrupts.requested else self.interrupted or error
            except Exception:
                self._close_lost()
                raise
            finally:
                self.pool.close()
                result = self._finish(ended)
        return _exit_code(result, ended)

    def _launch(self, hydra: Hydra, task: SweepTask) -> None:
        """Every job, in the folder that Hydra makes for it; where it cannot, in one of our own, so that each is tried.

        Hydra writes a job's config before it calls the job: a full disk would end all of them there.
        """
        if self.workers:
            end_workers_with_us()
        try:
            with hydra_errors(self.overrides, self.dirs):
                if self.grid is None:
                    hydra.multirun(CONFIG_NAME, task, list(self.overrides))
                else:
                    spread = None if self.crew is None else self._spread
                    launch_grid(hydra, self.overrides, task, self._remaining(self.grid), self._not_composed, spread)
        except ConfigError as error:
            if not isinstance(error.__cause__, OSError):
                raise
            if self.grid is None or self.crew is not None:  # what comes next is Hydra's sweeper's, or the workers'
                raise FluxrunError(str(error)) from error
            log.error("%s; the jobs that are left are tried without Hydra's files", error)
            for job in self.grid:
                if str(job.number) not in self.rows:
                    self._take(job, self.folder / str(job.number))

    def _remaining(self, grid: Sequence[GridJob]) -> Iterator[GridJob]:
        """The jobs that no completed run stands for; those that one does are said on the way."""
        for job in grid:
            if job.config_hash in self.completed and not self.workers:
                self._note(job, self.completed[job.config_hash])
            else:
                yield job

    def _not_composed(self, job: GridJob, error: Exception) -> None:
        """A job whose options do not go together: that fails it alone."""
        folder = self.folder / str(job.number)
        self.view.begin(str(job.number), " ".join(job.overrides))
        self._record_failure(job, folder, ConfigError(explain_composition(error, job.for_hydra, self.dirs)))
        self._note(job, folder)

    def _spread(self, jobs: Iterator[GridJob]) -> None:
        """The jobs on Ray's actors; each is told of as it begins and ends."""
        assert self.crew is not None
        assert self.grid is not None
        work = GridWork(self.dirs, self.overrides, self.command, [job.data for job in self.grid])
        board, baselines = Board(len(self.grid), "jobs"), wanted(self.config, self.grid, self.dirs)
        tasks = assigned(filter(self._is_wanted, baselines), jobs, self.folder)
        with connected(self.crew) as cluster, board, Pool(cluster, work, board) as pool:
            self.view.at_once = cluster.workers
            for task, event in pool.run(tasks):
                self._hear(task.what, task.lost, event)
                board.done = len(self.rows.keys() & self.pending.keys())

    def _hear(self, what: Assignment, lost: int, event: Event | WorkerLost) -> None:
        if isinstance(event, Begun):
            self.view.begin(what.folder.name, "" if not what.is_baseline else what.label)
        elif isinstance(event, Ended):
            self.loads += event.loads
            if event.error:
                self._record_failure(what.job, what.folder, FluxrunError(event.error))
            self._note(what.job, what.folder)
        elif isinstance(event, WorkerLost):
            if lost <= MOST_RETURNS:
                set_aside(what.folder)
            else:
                write_failure(what.folder, what.job.data, event, overrule=True)
                self._note(what.job, what.folder)

    def _close_lost(self) -> None:
        """What draws the jobs has failed, and is gone: those that it was at are lost, each is said in a line."""
        if self.workers or self.crew is not None:
            for name in close_records(self.folder, WorkerLost("worker lost")):
                log.error("job %s: worker lost", name)

    def _abandon(self) -> None:
        """The process ends at once: what is done so far, and what of the job that was running is on disk."""
        self.reserve.give_up()
        end_children()
        self._record_interruption()

    def _record_interruption(self) -> None:
        """sweep.json as far as the sweep came: all that takes long, comparing pictures above all, is for later."""
        if self.workers or self.crew is not None:
            close_records(self.folder)
        begun = [job for job in self.grid or () if self._is_begun(job)]
        self.rows |= {str(job.number): self._row(self.folder / str(job.number)) for job in begun}
        self._progress("interrupted").write(self.folder, list(self.rows.values()))

    def _tell_workers(self) -> None:
        if self.workers:
            stop_jobs(self.folder)

    def _is_begun(self, job: GridJob) -> bool:
        return str(job.number) not in self.rows and (self.folder / str(job.number) / "run.json").exists()

    def _finish(self, ended: BaseException | None) -> Result:
        self.reserve.give_up()
        if ended:
            with suppress(OSError):  # finish says what the disk does not take
                self._record_interruption()
        progress = self._progress("interrupted" if ended else "completed")
        progress.pending += self.unrecorded.values()
        return finish(self.folder, progress, self.config.baseline)

    def _take_over(self) -> None:
        """What an earlier sweep in this folder completed, and all that is to come: in sweep.json before any job."""
        known = {config_hash: read_row(path, self.folder) for config_hash, path in self.completed.items()}
        self.earlier = list(known.values())
        self.rows = {str(job.number): known[job.config_hash] for job in self.grid or () if job.config_hash in known}
        self._save_progress()

    def _save_progress(self) -> None:
        """sweep.json as it stands, but no more often than may cost a twentieth of the time: a long one takes a second.

        What it lacks then is in the jobs' folders. What a full disk does not take now, it may take later.
        """
        began = time.perf_counter()
        if began < self.next_save:
            return
        path = self.folder / "sweep.json"
        try:
            self._progress("running").write(self.folder, list(self.rows.values()))
        except OSError as error:
            log.warning("cannot write %s: %s", path, one_line(error))
            return
        ended = time.perf_counter()
        self.next_save = ended + 20 * (ended - began)
        with suppress(OSError):  # what is held already stays
            self.reserve.hold(max(LEAST_RESERVE_BYTES, path.stat().st_size))

    def _progress(self, status: str) -> SweepProgress:
        pending = [row for name, row in self.pending.items() if name not in self.rows]
        return SweepProgress(
            status=status,
            command=self.command,
            started_at=self.started_at,
            wall_s=time.perf_counter() - self.started,
            order=self.order,
            pending=pending,
            loads=self.pool.loads + self.loads,
        )

    def _labels(self) -> dict[str, str] | None:
        if self.grid is None:
            return None
        common = set.intersection(*(set(job.overrides) for job in self.grid)) if len(self.grid) > 1 else set()
        return {str(job.number): " ".join(o for o in job.overrides if o not in common) for job in self.grid}

    # -- one job ------------------------------------------------------------------------------------------------

    def job(self, node: DictConfig) -> float:
        """One job, called by Hydra in the folder it made. Never raises but for an interrupt; returns the objective."""
        hydra: Any = HydraConfig.get()
        job = GridJob(
            int(hydra.job.num),
            tuple(shown([str(o) for o in hydra.overrides.task])),
            data := to_data(node, hydra.runtime.choices),
            data_hash(data),
        )
        row = self._take(job, Path(hydra.runtime.output_dir))
        return objective(row, [*self.earlier, *self.rows.values()], self.folder, self.config)

    def _take(self, job: GridJob, folder: Path) -> Row:
        """Draw a job, unless there is a completed one like it; returns its row."""
        earlier = self.completed.get(job.config_hash)
        if earlier is None:
            self._draw(job, folder)
        return self._note(job, earlier or folder)

    def _draw(self, job: GridJob, folder: Path) -> None:
        """Draw a job's pictures; a failure of any kind is in its record, an interrupt ends the sweep."""
        try:
            for baseline in self._baselines_of(job):
                self._draw_baseline(baseline)
            self.view.begin(str(job.number), " ".join(job.overrides))
            draw(job.data, self.dirs, folder, self)
        except (KeyboardInterrupt, Interrupted) as error:
            if (folder / "run.json").exists():  # not while its baseline was drawn
                self._note(job, folder)
            self.interrupted = error
            raise KeyboardInterrupt from error  # Hydra would swallow an ordinary exception and go on with the next job
        except (Exception, SystemExit) as error:  # whatever it is, it is this job's alone; the next one runs
            self._record_failure(job, folder, error)

    def _record_failure(self, job: GridJob, folder: Path, error: BaseException) -> None:
        """A job's failure in its record, or, where the disk does not take one, in the table alone."""
        try:
            if write_failure(folder, job.data, error) and not is_said(error):
                log.error("%s", one_line(error), exc_info=error)
        except OSError as problem:
            log.error("%s (and no record of it: %s)", one_line(error), one_line(problem), exc_info=error)
            reason = f"{type(error).__name__}: {one_line(error)}"
            row = pending_row(job).model_copy(update={"status": "failed", "reason": reason, "config": job.data})
            self.unrecorded[folder.name] = row.model_copy(update={"job": folder.name, "folder": folder.name})

    def _baselines_of(self, job: GridJob) -> list[GridJob]:
        """With ``sweep.baseline=neutral`` (or a fidelity bound) the neutral pictures come first, once each."""
        return [b for b in as_jobs(missing(self.config, self.grid, job, self.dirs)) if self._is_wanted(b)]

    def _is_wanted(self, baseline: GridJob) -> bool:
        return baseline.config_hash not in self.completed and baseline.config_hash not in self.no_baseline

    def _draw_baseline(self, job: GridJob) -> None:
        """A baseline that fails is a row of its own, and no job's failure: the others just have no comparison."""
        folder = baseline_folder(self.folder)
        self.view.begin(folder.name, baseline_label(job))
        try:
            draw(job.data, self.dirs, folder, self)
        except Interrupted:
            raise
        except Exception as error:  # as in _draw, but it concerns no job
            self.no_baseline.add(job.config_hash)
            self._record_failure(job, folder, error)
        finally:
            if (folder / "run.json").exists():
                self._note(job, folder)

    def _note(self, job: GridJob, folder: Path) -> Row:
        """Take over a job's record: into the live table, and into sweep.json, so that a kill loses one job at most."""
        row = self._row(folder)
        if row.status == "completed":
            self.completed[job.config_hash] = folder
        name = folder.name if job.number < 0 else str(job.number)
        self.rows[name] = row
        self.view.end(name, row)
        self._save_progress()
        return row

    def _row(self, folder: Path) -> Row:
        """A job's row from its record, or from what kept it from having one."""
        return self.unrecorded[folder.name] if folder.name in self.unrecorded else read_row(folder, self.folder)


def draw(data: JsonObject, dirs: tuple[Path, ...], folder: Path, sweep: Sweep) -> None:
    """Validate and run one job's config, in this process or in one of its own."""
    if sweep.config.isolation == "process":
        run_in_child(data, dirs, folder, sweep.command)
        return

    jobs, config = [job.data for job in sweep.grid or ()], RunConfig.from_dict(data, dirs)
    draw_beside(jobs, config, folder, command=sweep.command, pool=sweep.pool, reporter=sweep.view.reporter)


# --- what Hydra calls -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SweepTask:
    """Hydra's task function. A launcher may pickle it and send it to another process: the sweep stays at home."""

    dirs: tuple[Path, ...]
    command: list[str]
    sweep: Sweep | None = None

    def __call__(self, node: DictConfig) -> float | None:
        """One job, in the sweep of this process or, where there is none, by itself; returns a sweep's objective."""
        if self.sweep is not None:
            return self.sweep.job(node)
        job_elsewhere(node, self.dirs, self.command)
        return None

    def __reduce__(self) -> tuple[type[SweepTask], tuple[tuple[Path, ...], list[str]]]:
        return SweepTask, (self.dirs, self.command)


def _exit_code(result: Result, ended: BaseException | None) -> int:
    if ended is not None:
        return exit_code_of(ended)
    return 0 if all(row.status == "completed" for row in result.jobs) else 1
