"""A sweep: many runs from one command, with weights loaded once, each failing alone, and one table at the end.

Hydra expands the grid and calls ``Sweep.job`` for every job, in this process; around that, everything is here, because
Hydra's own end-of-multirun callback is not called once a job has failed.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hydra._internal.hydra import Hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig, OmegaConf

from fluxrun.config.composition import shown, to_data
from fluxrun.config.schema import RunConfig, SweepConfig, sweep_config
from fluxrun.errors import ConfigError, FluxrunError, Interrupted, exit_code_of, one_line
from fluxrun.paths import expanded
from fluxrun.pipeline.session_pool import SessionPool
from fluxrun.process.signals import Interrupts
from fluxrun.record.folder import data_hash, write_failure
from fluxrun.report.result import SweepProgress, finish
from fluxrun.report.rows import GridJob, Result, Row, read_row
from fluxrun.runner import run
from fluxrun.sweep.baseline import describes, missing
from fluxrun.sweep.child import run_in_child
from fluxrun.sweep.folder import arrange, baseline_folder, locked
from fluxrun.sweep.grid import compose_grid, describe_order, is_grid, ordered, pending_row, prompts_beside
from fluxrun.sweep.live import SweepView
from fluxrun.sweep.objective import objective

log = logging.getLogger("fluxrun.sweep")

Task = Callable[[DictConfig], Any]


@dataclass
class Sweep:
    """A planned sweep: what is known before the first job."""

    config: SweepConfig
    folder: Path
    dirs: tuple[Path, ...]
    overrides: list[str]
    """What Hydra gets, in the order in which it varies."""
    grid: list[GridJob] | None
    """All jobs, or None when a sweeper chooses them as it goes."""
    order: list[str] = field(default_factory=list)
    pool: SessionPool = field(default_factory=SessionPool)
    rows: dict[str, Row] = field(default_factory=dict)
    completed: dict[str, Path] = field(default_factory=dict)
    """Folders of completed runs by config hash, baselines' among them."""
    earlier: list[Row] = field(default_factory=list)
    """The rows of what was completed before this sweep began."""
    no_baseline: set[str] = field(default_factory=set)
    """Baselines that failed, by config hash: they are not tried again for every job."""
    started: float = field(default_factory=time.perf_counter)
    command: list[str] = field(default_factory=list)

    # -- the whole ----------------------------------------------------------------------------------------------

    def run(self, launch: Callable[[list[str], Task], None]) -> int:
        """Run every job through Hydra (``launch``), whatever ends it leave a true table; returns the exit code."""
        global _current  # noqa: PLW0603 - Hydra hands the task function no other way to its sweep
        self.command = ["fluxrun", *sys.argv[1:]]
        ended: BaseException | None = None
        with locked(self.folder):
            self.completed = arrange(self.folder, [job.config_hash for job in self.grid or ()])
            self.view = SweepView(self._labels())
            self._take_over()
            _current = self
            try:
                # Between two jobs a signal ends the sweep at once; a job handles its own.
                with Interrupts() as interrupts, interrupts.immediate(), self.view:
                    launch(self.overrides, _task(self.dirs))
            except (KeyboardInterrupt, Interrupted, _Ended) as error:
                ended = interrupts.error() if interrupts.requested else error
            finally:
                _current = None
                self.pool.close()
                result = self._finish(ended)
        return _exit_code(result, ended)

    def _finish(self, ended: BaseException | None) -> Result:
        progress = self._progress("interrupted" if ended else "completed")
        return finish(self.folder, progress, self.config.baseline)

    def _take_over(self) -> None:
        """What an earlier sweep in this folder completed, and all that is to come: in sweep.json before any job."""
        known = {config_hash: read_row(path, self.folder) for config_hash, path in self.completed.items()}
        self.earlier = list(known.values())
        self.rows = {str(job.number): known[job.config_hash] for job in self.grid or () if job.config_hash in known}
        self._progress("running").write(self.folder, list(self.rows.values()))

    def _progress(self, status: str) -> SweepProgress:
        pending = [pending_row(job) for job in self.grid or () if str(job.number) not in self.rows]
        return SweepProgress(
            status=status,
            command=self.command,
            started_at=_STARTED_AT,
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
        folder = self.completed.get(job.config_hash)
        if folder is None:
            folder = Path(hydra.runtime.output_dir)
            self._draw(job, folder)
        row = self._note(job, folder)
        return objective(row, [*self.earlier, *self.rows.values()], self.folder, self.config)

    def _draw(self, job: GridJob, folder: Path) -> None:
        """Draw a job's pictures; a failure of any kind is in its record, an interrupt ends the sweep."""
        try:
            self._draw_baselines(job)
            self.view.begin(str(job.number), " ".join(job.overrides))
            draw(job.data, self.dirs, folder, self)
        except (KeyboardInterrupt, Interrupted) as error:
            if (folder / "run.json").exists():  # not while its baseline was drawn
                self._note(job, folder)
            raise _Ended(exit_code_of(error)) from error
        except (Exception, SystemExit) as error:  # whatever it is, it is this job's alone; the next one runs
            if write_failure(folder, job.data, error):
                log.error("%s", one_line(error), exc_info=error)

    def _draw_baselines(self, job: GridJob) -> None:
        """With ``sweep.baseline=neutral`` (or a fidelity bound) the neutral pictures come first, once each."""
        for config_hash, data in missing(self.config, self.grid, job, self.dirs).items():
            if config_hash not in self.completed and config_hash not in self.no_baseline:
                self._draw_baseline(config_hash, data)

    def _draw_baseline(self, config_hash: str, data: dict[str, Any]) -> None:
        """A baseline that fails is a row of its own, and no job's failure: the others just have no comparison."""
        folder = baseline_folder(self.folder)
        self.view.begin(folder.name, f"neutral options, seed={data.get('seed')}")
        try:
            draw(data, self.dirs, folder, self)
        except Interrupted:
            raise
        except Exception as error:  # as in _draw, but it concerns no job
            self.no_baseline.add(config_hash)
            if write_failure(folder, data, error):
                log.error("%s", one_line(error), exc_info=error)
        finally:
            if (folder / "run.json").exists():
                self._note(GridJob(-1, (), data, config_hash), folder)

    def _note(self, job: GridJob, folder: Path) -> Row:
        """Take over a job's record: into the live table, and into sweep.json, so that a kill loses one job at most."""
        row = read_row(folder, self.folder)
        if row.status == "completed":
            self.completed[job.config_hash] = folder
        name = folder.name if job.number < 0 else str(job.number)
        self.rows[name] = row
        self.view.end(name, row)
        self._progress("running").write(self.folder, list(self.rows.values()))
        return row


def draw(data: dict[str, Any], dirs: tuple[Path, ...], folder: Path, sweep: Sweep) -> None:
    """Validate and run one job's config, in this process or in one of its own."""
    if sweep.config.isolation == "process":
        run_in_child(data, dirs, folder, sweep.command)
        return

    config = RunConfig.from_dict(data, dirs)
    sweep.pool.upcoming = prompts_beside(data, [job.data for job in sweep.grid or ()])
    run(config, folder, command=sweep.command, pool=sweep.pool, reporter=sweep.view.reporter)
    if sweep.pool.interrupted is not None:
        raise sweep.pool.interrupted


# --- planning -------------------------------------------------------------------------------------------------------


def plan_sweep(hydra: Hydra, node: DictConfig, overrides: Sequence[str], dirs: tuple[Path, ...]) -> Sweep:
    """Everything that can be refused before the first job; raises ConfigError. Imports no torch."""
    config = sweep_config(node)
    folder = expanded(str(config.resume or node.hydra.sweep.dir))
    if config.resume is not None and not os.path.isdir(folder):
        raise ConfigError(f"sweep.resume={config.resume}: no such folder")
    if "/" in str(OmegaConf.to_container(node.hydra.sweep, resolve=False).get("subdir")):  # type: ignore[union-attr]
        raise ConfigError("hydra.sweep.subdir: a sweep's jobs lie directly in its folder, without a / in between")
    pinned = f"hydra.sweep.dir={QuotedString(str(folder), Quote.single).with_quotes()}"
    rest = [o for o in overrides if not o.startswith("hydra.sweep.dir=")]
    if not is_grid(node):
        return Sweep(config, folder, dirs, [*rest, pinned], None)
    params = OmegaConf.to_container(node.hydra.sweeper.params) if node.hydra.sweeper.params else None
    assert params is None or isinstance(params, dict)
    # Given in full on the command line, so that the order is ours and not the sweep file's.
    ours = ordered(rest, {str(key): value for key, value in (params or {}).items()})
    grid = compose_grid(hydra, ours, dirs)
    _check_baseline(config, grid)
    order = describe_order(hydra, ours, dirs)
    return Sweep(config, folder, dirs, [*ours, "hydra.sweeper.params=null", pinned], grid, order)


def _check_baseline(config: SweepConfig, grid: Sequence[GridJob]) -> None:
    if config.baseline in ("auto", "neutral") or os.path.isfile(Path(config.baseline) / "run.json"):
        return
    if not any(describes(config.baseline, job.data) for job in grid):
        raise ConfigError(
            f"sweep.baseline={config.baseline!r} is neither auto, neutral, the folder of a run, nor the options of a "
            "job of this sweep ('attention=sdpa compile=none')"
        )


# --- what Hydra calls -----------------------------------------------------------------------------------------------


class _Ended(BaseException):
    """An interrupt on its way through Hydra, which would swallow an ordinary exception and go on with the next job."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("interrupted")
        self.exit_code = exit_code


_current: Sweep | None = None

_STARTED_AT = datetime.now(UTC).isoformat(timespec="seconds")


def _task(dirs: tuple[Path, ...]) -> Task:
    """Hydra's task function. It may be pickled and sent to another process: so it holds nothing but ``dirs``."""

    def task(node: DictConfig) -> float | None:
        from fluxrun.sweep.run import run_job

        return run_job(node, dirs)

    return task


def run_job(node: DictConfig, dirs: tuple[Path, ...]) -> float | None:
    """One job, in the sweep of this process or, where there is none, by itself; returns a sweep's objective."""
    if _current is not None:
        return _current.job(node)
    _job_elsewhere(node, dirs)
    return None


def _job_elsewhere(node: DictConfig, dirs: tuple[Path, ...]) -> None:
    """A job in a launcher's own process (joblib, submitit): its record is all it leaves."""
    hydra: Any = HydraConfig.get()
    folder, data = Path(hydra.runtime.output_dir), to_data(node, hydra.runtime.choices)
    try:
        run(RunConfig.from_dict(data, dirs), folder, command=["fluxrun", *sys.argv[1:]])
    except Exception as error:  # as in _draw: the job's own failure
        if write_failure(folder, data, error):
            log.error("%s", one_line(error), exc_info=error)


def _exit_code(result: Result, ended: BaseException | None) -> int:
    if ended is not None:
        return ended.exit_code if isinstance(ended, (FluxrunError, _Ended)) else 130
    return 0 if all(row.status == "completed" for row in result.jobs) else 1
