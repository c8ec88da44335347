"""A sweep: many runs from one command, with weights loaded once, each failing alone, and one table at the end.

A job is composed when it comes, and Hydra calls ``SweepTask`` for it, which in this process is ``Sweep.job``; around
that, everything is here, because Hydra's own end-of-multirun callback is not called once a job has failed.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from hydra._internal.hydra import Hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from fluxrun.atomic import Reserve
from fluxrun.config.composition import CONFIG_NAME, explain_composition, hydra_errors, shown, to_data
from fluxrun.config.schema import RunConfig, SweepConfig, sweep_config
from fluxrun.errors import ConfigError, FluxrunError, Interrupted, exit_code_of, is_said, one_line
from fluxrun.paths import expanded
from fluxrun.pipeline.session_pool import SessionPool
from fluxrun.process.console import console
from fluxrun.process.ending import end_children
from fluxrun.process.signals import Interrupts
from fluxrun.record.folder import RESERVE, data_hash, write_failure
from fluxrun.report.result import SweepProgress, finish
from fluxrun.report.rows import GridJob, Result, Row, read_row
from fluxrun.runner import run
from fluxrun.streams import lasting
from fluxrun.sweep.baseline import describes, missing
from fluxrun.sweep.child import run_in_child
from fluxrun.sweep.elsewhere import close_records, end_workers_with_us, has_workers, stop_jobs
from fluxrun.sweep.elsewhere import job as job_elsewhere
from fluxrun.sweep.folder import arrange, baseline_folder, locked
from fluxrun.sweep.grid import (
    adapters_beside,
    axes_of_grid,
    compose_grid,
    is_grid,
    ordered,
    pending_row,
    prompts_beside,
)
from fluxrun.sweep.launch import launch_grid
from fluxrun.sweep.live import SweepView
from fluxrun.sweep.objective import objective
from fluxrun.types import JsonObject

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
                with interrupts, interrupts.immediate(), self.view:
                    self._launch(hydra, task)
            except (KeyboardInterrupt, Interrupted) as error:
                ended = interrupts.error() if interrupts.requested else self.interrupted or error
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
                    launch_grid(hydra, self.overrides, task, self._remaining(self.grid), self._not_composed)
        except ConfigError as error:
            if not isinstance(error.__cause__, OSError):
                raise
            if self.grid is None:  # only Hydra's sweeper knows what comes next
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

    def _abandon(self) -> None:
        """The process ends at once: what is done so far, and what of the job that was running is on disk."""
        self.reserve.give_up()
        end_children()
        self._record_interruption()

    def _record_interruption(self) -> None:
        """sweep.json as far as the sweep came: all that takes long, comparing pictures above all, is for later."""
        if self.workers:
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
            loads=self.pool.loads,
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
            self._draw_baselines(job)
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

    def _draw_baselines(self, job: GridJob) -> None:
        """With ``sweep.baseline=neutral`` (or a fidelity bound) the neutral pictures come first, once each."""
        for config_hash, data in missing(self.config, self.grid, job, self.dirs).items():
            if config_hash not in self.completed and config_hash not in self.no_baseline:
                self._draw_baseline(config_hash, data)

    def _draw_baseline(self, config_hash: str, data: JsonObject) -> None:
        """A baseline that fails is a row of its own, and no job's failure: the others just have no comparison."""
        folder, job = baseline_folder(self.folder), GridJob(-1, (), data, config_hash)
        self.view.begin(folder.name, f"neutral options, seed={data.get('seed')}")
        try:
            draw(data, self.dirs, folder, self)
        except Interrupted:
            raise
        except Exception as error:  # as in _draw, but it concerns no job
            self.no_baseline.add(config_hash)
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

    config = RunConfig.from_dict(data, dirs)
    jobs = [job.data for job in sweep.grid or ()]
    sweep.pool.upcoming = prompts_beside(data, jobs)
    sweep.pool.upcoming_adapters = partial(adapters_beside, data, jobs)
    run(config, folder, command=sweep.command, pool=sweep.pool, reporter=sweep.view.reporter)
    if sweep.pool.interrupted is not None:
        raise sweep.pool.interrupted


# --- planning -------------------------------------------------------------------------------------------------------


def plan_sweep(
    hydra: Hydra, node: DictConfig, overrides: Sequence[str], dirs: tuple[Path, ...], command: Sequence[str]
) -> Sweep:
    """Everything that can be refused before the first job; raises ConfigError. Imports no torch."""
    config = sweep_config(node)
    folder = expanded(str(config.resume or node.hydra.sweep.dir))
    if config.resume is not None and not os.path.isdir(folder):
        raise ConfigError(f"sweep.resume={config.resume}: no such folder")
    if "/" in str(OmegaConf.to_container(node.hydra.sweep, resolve=False).get("subdir")):  # type: ignore[union-attr]
        raise ConfigError("hydra.sweep.subdir: a sweep's jobs lie directly in its folder, without a / in between")
    pinned = [f"hydra.sweep.dir={QuotedString(str(folder), Quote.single).with_quotes()}"]
    if node.hydra.mode != RunMode.MULTIRUN:
        pinned.append("hydra.mode=MULTIRUN")
    rest = [o for o in overrides if not o.startswith("hydra.sweep.dir=")]
    workers = has_workers(node)
    if not is_grid(node):
        return Sweep(config, folder, dirs, [*rest, *pinned], [*command], None, workers=workers)
    params = OmegaConf.to_container(node.hydra.sweeper.params) if node.hydra.sweeper.params else None
    assert params is None or isinstance(params, dict)
    # Given in full on the command line, so that the order is ours and not the sweep file's.
    ours = ordered(rest, {str(key): value for key, value in (params or {}).items()})
    axes = axes_of_grid(hydra, ours, dirs)
    grid = compose_grid(hydra, axes, dirs)
    _check_baseline(config, grid)
    # The first line; logging is Hydra's to set up, later.
    console.print(f"{len(grid):,} jobs, into {folder}", markup=False, highlight=False, soft_wrap=True)
    order = [axis.key for axis in axes if axis.override.is_sweep_override()]
    return Sweep(config, folder, dirs, [*ours, "hydra.sweeper.params=null", *pinned], [*command], grid, order, workers)


def _check_baseline(config: SweepConfig, grid: Sequence[GridJob]) -> None:
    if config.baseline in ("auto", "neutral") or os.path.isfile(Path(config.baseline) / "run.json"):
        return
    if not any(describes(config.baseline, job.data) for job in grid):
        raise ConfigError(
            f"sweep.baseline={config.baseline!r} is neither auto, neutral, the folder of a run, nor the options of a "
            "job of this sweep ('attention=sdpa compile=none')"
        )


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
