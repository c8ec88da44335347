"""A grid's jobs through Hydra: one after another in this process, or in a launcher's; each is composed as it comes.

Hydra's own sweeper composes them all before the first one begins, and its launcher keeps what it composed of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hydra._internal.callbacks import Callbacks
from hydra._internal.hydra import Hydra
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, configure_log, run_job
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from fluxrun.config.composition import CONFIG_NAME
from fluxrun.config.files import COMPOSE_ERRORS
from fluxrun.errors import FluxrunError, one_line
from fluxrun.process.signals import Interrupts
from fluxrun.report.rows import GridJob

BASIC_LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"

Failed = Callable[[GridJob, Exception], object]


def launch_grid(
    hydra: Hydra,
    overrides: Sequence[str],
    task: TaskFunction,
    jobs: Iterator[GridJob],
    failed: Failed,
    spread: Callable[[Iterator[GridJob]], None] | None = None,
) -> None:
    """What ``Hydra.multirun`` does, for jobs that are known. ``failed`` is told of one that cannot be composed.

    ``spread``: who has the jobs done instead of a launcher of Hydra's.
    """
    config = hydra.compose_config(CONFIG_NAME, list(overrides), RunMode.MULTIRUN, with_log_configuration=True)
    callbacks = Callbacks(config)
    callbacks.on_multirun_start(config=config, config_name=CONFIG_NAME)
    OmegaConf.save(config, Path(config.hydra.sweep.dir) / "multirun.yaml")
    context = HydraContext(config_loader=hydra.config_loader, callbacks=callbacks)
    if spread is not None:
        spread(jobs)
    elif str(config.hydra.launcher.get("_target_")) == BASIC_LAUNCHER:
        _one_by_one(context, config, task, jobs, failed)
    else:
        _elsewhere(context, config, task, list(jobs))
    callbacks.on_multirun_end(config=config, config_name=CONFIG_NAME)


def _one_by_one(
    context: HydraContext, config: DictConfig, task: TaskFunction, jobs: Iterator[GridJob], failed: Failed
) -> None:
    for job in jobs:
        try:
            composed = context.config_loader.load_sweep_config(config, list(job.for_hydra))
        except Exception as error:  # a combination that cannot be: the next job may
            if interrupts := Interrupts.innermost():
                interrupts.check()
            failed(job, error)
            continue
        with open_dict(composed):
            composed.hydra.job.id = composed.hydra.job.num = job.number
        done = run_job(task, composed, "hydra.sweep.dir", "hydra.sweep.subdir", context)
        configure_log(config.hydra.hydra_logging, config.hydra.verbose)  # a job's log file is its own
        done.return_value  # noqa: B018 - raises what ended the job


def _elsewhere(context: HydraContext, config: DictConfig, task: TaskFunction, jobs: Sequence[GridJob]) -> None:
    """Through a launcher, which composes the jobs in its processes, as many at once as its sweeper's batches allow."""
    launcher = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=task, config=config)
    size = config.hydra.sweeper.max_batch_size or len(jobs)
    for start in range(0, len(jobs), size):
        batch = [job.for_hydra for job in jobs[start : start + size]]
        for done in _launched(launcher, batch, start):
            done.return_value  # noqa: B018 - raises what ended the job


def _launched(launcher: Launcher, batch: Sequence[Sequence[str]], start: int) -> Sequence[JobReturn]:
    try:
        return launcher.launch(batch, initial_job_idx=start)
    except (FluxrunError, *COMPOSE_ERRORS, OSError):
        raise
    except Exception as error:  # joblib's: one of its workers was killed
        raise FluxrunError(f"{type(launcher).__name__} failed: {one_line(error)}") from error
