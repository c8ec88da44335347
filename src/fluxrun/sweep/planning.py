"""What a sweep is to do, and everything that can be refused before its first job. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from hydra._internal.hydra import Hydra
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from fluxrun.config.schema import SweepConfig, WorkersConfig, sweep_config, workers_config
from fluxrun.errors import ConfigError
from fluxrun.paths import expanded
from fluxrun.process.console import console
from fluxrun.report.rows import GridJob, config_value
from fluxrun.sweep.axes import Axis
from fluxrun.sweep.baseline import describes
from fluxrun.sweep.elsewhere import has_workers
from fluxrun.sweep.grid import axes_of_grid, compose_grid, is_grid, ordered
from fluxrun.sweep.launch import BASIC_LAUNCHER
from fluxrun.sweep.run import Sweep
from fluxrun.workers.cluster import check_workers

SUBDIR = "${hydra.job.num}"
"""Hydra's own name of a job's folder."""


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
    workers, crew = has_workers(node), workers_config(node)
    if crew is not None:
        _check_crew(crew, node, config)
    if not is_grid(node):
        return Sweep(config, folder, dirs, [*rest, *pinned], [*command], None, workers=workers)
    params = OmegaConf.to_container(node.hydra.sweeper.params) if node.hydra.sweeper.params else None
    assert params is None or isinstance(params, dict)
    # Given in full on the command line, so that the order is ours and not the sweep file's.
    ours = ordered(rest, {str(key): value for key, value in (params or {}).items()})
    axes = axes_of_grid(hydra, ours, dirs)
    grid = compose_grid(hydra, axes, dirs)
    _check_baseline(config, grid)
    _check_jobs(crew, axes, grid)
    # The first line; logging is Hydra's to set up, later.
    console.print(f"{len(grid):,} jobs, into {folder}", markup=False, highlight=False, soft_wrap=True)
    order = [axis.key for axis in axes if axis.override.is_sweep_override()]
    ours += ["hydra.sweeper.params=null", *pinned]
    return Sweep(config, folder, dirs, ours, [*command], grid, order, workers, crew)


def _check_baseline(config: SweepConfig, grid: Sequence[GridJob]) -> None:
    if config.baseline in ("auto", "neutral") or os.path.isfile(Path(config.baseline) / "run.json"):
        return
    if not any(describes(config.baseline, job.data) for job in grid):
        raise ConfigError(
            f"sweep.baseline={config.baseline!r} is neither auto, neutral, the folder of a run, nor the options of a "
            "job of this sweep ('attention=sdpa compile=none')"
        )


def _check_crew(crew: WorkersConfig, node: DictConfig, config: SweepConfig) -> None:
    """Refuse what workers do not go together with."""
    asked = f"workers={crew.workers}"
    launcher = str(node.hydra.launcher.get("_target_"))
    if not is_grid(node):
        raise ConfigError(f"{asked}: a sweeper that chooses jobs as it goes has none of its own; leave workers out")
    if launcher != BASIC_LAUNCHER:
        raise ConfigError(f"{asked} and hydra/launcher both say who runs the jobs: leave one of them out")
    if config.isolation == "process":
        raise ConfigError(
            f"{asked} does not go with sweep.isolation=process: a worker keeps its weights from job to job"
        )
    if OmegaConf.to_container(node.hydra.sweep, resolve=False).get("subdir") != SUBDIR:  # type: ignore[union-attr]
        raise ConfigError(f"{asked}: hydra.sweep.subdir must be left as it is, the job's number")
    check_workers(crew)


def _check_jobs(crew: WorkersConfig | None, axes: Sequence[Axis], grid: Sequence[GridJob]) -> None:
    for axis in axes:
        if axis.count > 1 and axis.key.lstrip("+").split(".")[0] in ("workers", "ray"):
            raise ConfigError(f"{axis.key} is the whole sweep's: it takes one value")
    several = next((job for job in grid if config_value(job.data, "parallel") != "single"), None)
    if crew is not None and several is not None:
        raise ConfigError(
            f"workers={crew.workers} and parallel={config_value(several.data, 'parallel')} do not go together: a "
            "worker draws with one GPU; leave one of them out"
        )
