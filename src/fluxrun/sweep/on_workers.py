"""A grid's jobs on Ray's actors (``workers=N``): each is composed and drawn there, in the folder that Hydra makes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log, run_job
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, open_dict

from fluxrun.config.composition import CONFIG_NAME, explain_composition, hydra_for, to_data
from fluxrun.errors import ConfigError
from fluxrun.pipeline.session_pool import SessionPool
from fluxrun.record.folder import write_failure
from fluxrun.report.rows import GridJob
from fluxrun.sweep.baseline import baseline_label
from fluxrun.sweep.drawing import draw_beside
from fluxrun.sweep.elsewhere import draw
from fluxrun.sweep.folder import baseline_folder
from fluxrun.types import JsonObject
from fluxrun.workers.actor import Tell, ToldPictures
from fluxrun.workers.pool import Task


@dataclass(frozen=True)
class Assignment:
    """A job, or a baseline, and its folder."""

    job: GridJob
    folder: Path

    @property
    def is_baseline(self) -> bool:
        """Whether it is no job of the grid."""
        return self.job.number < 0

    @property
    def label(self) -> str:
        """What it is, for people."""
        return baseline_label(self.job) if self.is_baseline else f"job {self.folder.name}"


def assigned(baselines: Iterator[GridJob], jobs: Iterator[GridJob], folder: Path) -> Iterator[Task]:
    """All that is to be drawn into a sweep's folder, baselines first."""
    for baseline in baselines:
        own = baseline_folder(folder)
        own.mkdir()  # the next one's name depends on it
        yield _task(Assignment(baseline, own))
    for job in jobs:
        yield _task(Assignment(job, folder / str(job.number)))


def _task(assignment: Assignment) -> Task:
    return Task(assignment.folder.name, assignment, assignment.label)


@dataclass
class GridWork:
    """What a worker needs to know of the sweep."""

    dirs: tuple[Path, ...]
    overrides: list[str]
    command: list[str]
    jobs: Sequence[JsonObject]
    """The configs of all jobs."""
    _composed: tuple[HydraContext, DictConfig] | None = field(default=None, init=False)
    _open: ExitStack = field(default_factory=ExitStack, init=False)

    @property
    def own_options(self) -> bool:
        """Whether no folder of the user's may hold options of their own."""
        return len(self.dirs) == 1

    def __call__(self, task: Assignment, tell: Tell, pool: SessionPool) -> None:
        """Draw a job; a failure is in its record."""
        job, folder = task.job, task.folder
        how = partial(draw_beside, self.jobs, command=self.command, pool=pool, reporter=ToldPictures(tell))
        if task.is_baseline:
            draw(job.data, folder, how, self.dirs)
            return
        context, config = self._hydra()
        try:
            composed = context.config_loader.load_sweep_config(config, list(job.for_hydra))
        except Exception as error:  # a combination that cannot be: the next job may
            write_failure(folder, job.data, ConfigError(explain_composition(error, job.for_hydra, self.dirs)))
            return
        with open_dict(composed):
            composed.hydra.job.id = composed.hydra.job.num = job.number
        done = run_job(partial(self._run, how), composed, "hydra.sweep.dir", "hydra.sweep.subdir", context)
        configure_log(config.hydra.hydra_logging, config.hydra.verbose)  # a job's log file is its own
        done.return_value  # noqa: B018 - raises what kept it from being recorded

    def _run(self, how: Any, node: DictConfig) -> None:
        hydra: Any = HydraConfig.get()
        draw(to_data(node, hydra.runtime.choices), Path(hydra.runtime.output_dir), how, self.dirs)

    def _hydra(self) -> tuple[HydraContext, DictConfig]:
        """Hydra over the sweep's folders, for the life of the worker."""
        if self._composed is None:
            hydra = self._open.enter_context(hydra_for(self.dirs))
            config = hydra.compose_config(CONFIG_NAME, self.overrides, RunMode.MULTIRUN, with_log_configuration=False)
            self._composed = HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks(config)), config
        return self._composed
