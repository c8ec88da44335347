"""What a composed command line does: one run, or a sweep; what can be refused is refused before any folder is made."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.hydra import Hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log
from omegaconf import DictConfig, flag_override

from fluxrun.config.composition import CONFIG_NAME, escape_interpolation, hydra_errors, to_data
from fluxrun.config.schema import RunConfig, WorkersConfig, command_config, workers_config
from fluxrun.errors import ConfigError, FluxrunError, Interrupted, exit_code_of, is_said, one_line
from fluxrun.hardware.detection import place
from fluxrun.paths import expanded
from fluxrun.planning.libraries import libraries_of
from fluxrun.planning.prepare import prepare
from fluxrun.planning.resume import Earlier, earlier_run
from fluxrun.process import spans
from fluxrun.record.claiming import claimed
from fluxrun.runner import helps_another, run
from fluxrun.startup.lean import start_lean
from fluxrun.streams import lasting
from fluxrun.workers.cluster import check_workers
from fluxrun.workers.prompts import run_on_workers

log = logging.getLogger("fluxrun")

Draw = Callable[..., object]
"""Draws a config into a folder."""


def draw_run(
    app: Hydra, node: DictConfig, overrides: Sequence[str], dirs: tuple[Path, ...], command: Sequence[str]
) -> int:
    """Check one run's config, then let Hydra make its folder and call the job in it; returns the exit code."""
    if stray := next((o for o in overrides if o.lstrip("+~").startswith("sweep.")), None):
        raise ConfigError(f"{stray}: the sweep keys belong to a sweep; add --multirun, or +sweep=NAME")
    config, resumed, crew = RunConfig.from_dict(to_data(node), dirs), command_config(node).resume, workers_config(node)
    if crew is not None:
        _check_crew(crew, config)
    if resumed is not None and _go_on(config, node, expanded(resumed)).complete and helps_another():
        return 0
    with spans.span("plan"):
        prepared = prepare(config)
        start_lean(libraries_of(prepared))
    if helps_another():
        return _exit_code(lambda: run(config, Path(), command=command, machine=prepared.plan.machine))
    alone = functools.partial(run, machine=prepared.plan.machine)
    draw: Draw = alone if crew is None else functools.partial(run_on_workers, crew=crew)
    draw = functools.partial(draw, command=command, resume=resumed is not None)
    job = functools.partial(_job, config=config, draw=draw)
    folder = Path(str(node.hydra.run.dir))
    with lasting("stdout"), claimed(folder, again=resumed is not None), hydra_errors(overrides, dirs):
        app.compose_config = functools.partial(_composed, node)  # type: ignore[method-assign]
        return int(app.run(CONFIG_NAME, job, list(overrides)).return_value)


def _go_on(config: RunConfig, node: DictConfig, folder: Path) -> Earlier:
    """Have Hydra use the folder of an earlier run, if the run there is this one; returns what is in it."""
    earlier = earlier_run(config, folder)
    with flag_override(node.hydra, "readonly", False):
        node.hydra.run.dir = escape_interpolation(str(folder))
    return earlier


def _composed(node: DictConfig, with_log_configuration: bool, **_: Any) -> DictConfig:
    """What Hydra's run asks for first: the config as it was composed, and checked, before."""
    if with_log_configuration:
        configure_log(node.hydra.hydra_logging, node.hydra.verbose)
    return node


def _check_crew(crew: WorkersConfig, config: RunConfig) -> None:
    """Refuse workers that cannot be, or do not go with the run."""
    if config.parallel.engine is not None or place() is not None:
        raise ConfigError(
            f"workers={crew.workers} does not go with parallel={config.parallel.name}, nor with torchrun: a worker "
            "draws with one GPU; leave one of them out"
        )
    check_workers(crew)


def _job(node: DictConfig, config: RunConfig, draw: Draw) -> int:
    """The run, in the folder Hydra made; returns its exit code, never raises an ordinary error."""
    hydra: Any = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    spans.end("compose")
    return _exit_code(lambda: draw(config, folder), folder)


def _exit_code(draw: Callable[[], object], folder: Path | None = None) -> int:
    """What a run ends with; what its record, in the folder, says has been said."""

    def said(error: Exception) -> bool:
        return is_said(error) or (folder is not None and (folder / "run.json").exists())

    try:
        draw()
    except KeyboardInterrupt:
        return 130
    except FluxrunError as error:
        log.debug("refused", exc_info=error)
        if not (isinstance(error, Interrupted) or said(error)):
            log.error("%s", error)
        return error.exit_code
    except Exception as error:  # already one line on screen and a traceback in the log
        log.debug("failed", exc_info=error)
        if not said(error):
            log.error("%s: %s", type(error).__name__, one_line(error))
        return exit_code_of(error)
    return 0
