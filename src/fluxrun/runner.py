"""One run from config to record: prepare, build, generate, record."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxrun.checkpoint import Located, check_layers, inspect
from fluxrun.config import RunConfig
from fluxrun.errors import FluxrunError, one_line
from fluxrun.estimate import reference_tokens
from fluxrun.interrupt import Interrupts
from fluxrun.machine import Machine, detect
from fluxrun.plan import Plan, make_plan, stand_in
from fluxrun.progress import Reporter
from fluxrun.prompts import Job, jobs_of, load_reference_images
from fluxrun.record import RunFolder, RunRecord, environment, exit_code_of, status_of
from fluxrun.workbench import Workbench

log = logging.getLogger("fluxrun")


@dataclass
class Prepared:
    """Everything that can be known, and refused, before any weight is read."""

    config: RunConfig
    jobs: list[Job]
    references: list[Any]
    located: Located
    plan: Plan


def prepare(config: RunConfig, machine: Machine | None = None) -> Prepared:
    """Check all of a run's input and plan it. Imports no torch; raises ConfigError or OptionUnavailable."""
    jobs = jobs_of(config)
    references = load_reference_images(config.reference_images)
    machine = machine or detect()
    located = inspect(config.model, machine)  # type: ignore[arg-type]
    plan = make_plan(config, machine, located, reference_tokens(references))
    check_layers(plan.model, located)
    return Prepared(config, jobs, references, located, plan)


def run(
    config: RunConfig,
    output_dir: Path | str,
    *,
    command: Sequence[str] = (),
    machine: Machine | None = None,
    workbench: Workbench | None = None,
    reporter: Reporter | None = None,
) -> RunRecord:
    """Draw a config's images into ``output_dir`` and return the record that is also its run.json.

    ``workbench`` is what the runs of one process share (weights, pipeline); without one nothing outlives the run.

    Raises what ended the run when it was not completed; the record on disk then says so, with all finished images.
    """
    folder = RunFolder(Path(output_dir), config, command)
    started = time.perf_counter()
    stage = _Stage()
    interrupts = Interrupts(
        on_first=lambda: log.warning("stopping at the next step; Ctrl+C again ends at once"),
        on_second=lambda: folder.abandon(interrupts.error(), stage.name),
    )
    with interrupts:
        try:
            with _borrowed(workbench) as bench:
                _run(config, folder, interrupts, stage, machine, bench, reporter or Reporter())
        except BaseException as error:
            ended = interrupts.error() if interrupts.requested else error
            _finish(folder, started, ended, stage.name)
            if ended is not error:
                raise ended from None
            raise
        _finish(folder, started, None, "")
    if workbench is not None and interrupts.requested:  # too late for this run, but not for those that follow
        workbench.interrupted = interrupts.error()
    return folder.record


def _borrowed(workbench: Workbench | None) -> AbstractContextManager[Workbench]:
    """The caller's workbench, which stays open, or one for this run alone."""
    return Workbench() if workbench is None else nullcontext(workbench)


class _Stage:
    """Where the run is, for the record of an error: read when it is needed, a second signal may come at any time."""

    def __init__(self) -> None:
        self.read: Callable[[], str] = lambda: "prepare"

    @property
    def name(self) -> str:
        """The stage right now."""
        return self.read()


def _run(
    config: RunConfig,
    folder: RunFolder,
    interrupts: Interrupts,
    stage: _Stage,
    machine: Machine | None,
    workbench: Workbench,
    reporter: Reporter,
) -> None:
    prepared = prepare(config, machine)
    folder.record.environment = environment(prepared.plan.machine)
    folder.plan(prepared.plan)
    folder.write()
    _announce(prepared)
    stage.read = lambda: "load"
    with interrupts.immediate():
        from fluxrun.generate import Generation
    plan = prepared.plan

    def on_change() -> None:
        folder.plan(plan)

    with workbench.session(prepared, reporter=reporter, interrupts=interrupts, on_change=on_change) as session:
        plan = session.plan
        generation = Generation(session, folder, prepared.jobs)
        stage.read = lambda: generation.stage
        try:
            generation.run()
        finally:
            folder.plan(plan)


def _announce(prepared: Prepared) -> None:
    plan = prepared.plan
    chosen = " ".join(f"{group}={choice.effective}" for group, choice in plan.choices.items())
    log.info("%s on %s (%s)", chosen, plan.machine.device, plan.dtype)
    for group, choice in plan.choices.items():
        for fallback in choice.fallbacks:
            log.warning(
                "%s=%s cannot be used, falling back to %s (%s)",
                group,
                fallback.option,
                stand_in(fallback.option, choice.effective),
                fallback.reason,
            )
    for note in plan.notes:
        log.warning("%s", note)
    if announcement := prepared.located.announcement():
        log.info("%s", announcement)


def _finish(folder: RunFolder, started: float, error: BaseException | None, stage: str) -> None:
    folder.record.timings.total_s = time.perf_counter() - started
    try:
        folder.finish("completed" if error is None else status_of(error), error, stage)
    except OSError as problem:  # a full disk, a folder that went away: then at least the screen says it
        log.error("cannot write %s: %s", folder.path / "run.json", one_line(problem))
        if error is None:
            raise
    if error is None:
        log.info("%d image(s) in %s (%.1f s)", len(folder.record.images), folder.path, folder.record.timings.total_s)
        return
    if exit_code_of(error) in (130, 143):
        log.warning("%s after %d image(s); record and images are in %s", error, len(folder.record.images), folder.path)
    else:
        text = str(error) if isinstance(error, FluxrunError) else f"{type(error).__name__}: {one_line(error)}"
        # The console prints one line, the log file has the traceback too.
        log.error("%s (stage %s; traceback in %s)", text, stage, folder.path / "fluxrun.log", exc_info=error)
