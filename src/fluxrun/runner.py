"""One run from config to record: compose → plan → build → draw → record. ``run`` and ``build`` are the Python API."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fluxrun.config.prompts import Job
from fluxrun.config.schema import RunConfig
from fluxrun.errors import ConfigError, FluxrunError, mark_said, one_line
from fluxrun.hardware.detection import place
from fluxrun.hardware.machine import Machine
from fluxrun.pipeline.session import Session
from fluxrun.pipeline.session_pool import SessionPool
from fluxrun.pipeline.torchrun import draw_in_ranks
from fluxrun.planning.fallbacks import announce, settle
from fluxrun.planning.plan import Plan
from fluxrun.planning.prepare import Prepared, prepare
from fluxrun.planning.resume import Earlier, earlier_run
from fluxrun.process import spans
from fluxrun.process.console import Reporter, log_to
from fluxrun.process.ranks import ALONE, Group, Ranks
from fluxrun.process.signals import AGAIN, Interrupts
from fluxrun.record.environment import environment
from fluxrun.record.folder import RunFolder, status_of
from fluxrun.record.helping import SharedFolder, UnwrittenFolder
from fluxrun.record.schema import RunRecord
from fluxrun.weights.readahead import read_ahead

if TYPE_CHECKING:
    from fluxrun.weights.store import WeightStore

log = logging.getLogger("fluxrun")

STOPPING = f"stopping at the next step{AGAIN}"


def run(
    config: RunConfig,
    output_dir: Path | str,
    *,
    command: Sequence[str] = (),
    machine: Machine | None = None,
    pool: SessionPool | None = None,
    reporter: Reporter | None = None,
    resume: bool = False,
) -> RunRecord:
    """Draw a config's images into ``output_dir`` and return the record that is also its run.json.

    ``pool`` is what the runs of one process share (weights, pipeline); without one nothing outlives the run.
    ``resume``: the folder holds a run of this config, of which only the images that are missing are drawn.

    Raises what ended the run when it was not completed; the record on disk then says so, with all finished images.
    """
    earlier = earlier_run(config, Path(output_dir)) if resume and not helps_another() else None
    if earlier is not None and earlier.complete:
        return completed(earlier, Path(output_dir), config)
    if (size := _processes_to_start(config, machine)) > 1:
        if pool is not None:
            pool.clear()
        return draw_in_ranks(config, Path(output_dir), size, command, resume=resume)
    kind = UnwrittenFolder if helps_another() else RunFolder
    folder = kind(Path(output_dir), config.source, command, earlier=earlier.record if earlier else None)
    started = time.perf_counter()
    stage = _Stage()
    interrupts = Interrupts(
        on_first=lambda: None if interrupts.is_immediate else log.warning(STOPPING),
        on_second=lambda: folder.abandon(interrupts.error(), stage.name),
    )
    with interrupts:
        try:
            with _borrowed(pool) as sessions:
                with interrupts.immediate(), spans.span("plan"):
                    prepared = prepare(config, machine)
                if prepared.plan.machine.place is not None:
                    with interrupts.immediate(), spans.span("import"):
                        prepared = _joined(prepared, sessions, folder.path)
                if earlier is not None:
                    say_what_is_there(earlier, folder)
                work = _Work(prepared, earlier.done if earlier else frozenset())
                _run(work, folder, interrupts, stage, sessions, reporter or Reporter())
        except BaseException as error:
            ended = interrupts.error() if interrupts.requested else error
            finish(folder, started, ended, stage.name)
            if ended is not error:
                raise ended from None
            raise
        finish(folder, started, None, "")
    if pool is not None and interrupts.requested:  # too late for this run, but not for those that follow
        pool.interrupted = interrupts.error()
    return folder.record


def draw_part(
    config: RunConfig, folder: SharedFolder, jobs: Sequence[Job], done: Collection[int] = (), *, pool: SessionPool,
    reporter: Reporter | None = None, quiet: bool = False,
) -> RunRecord:  # fmt: skip
    """Draw a part of a run (``jobs``, whole batches, without the images ``done``) whose record another process keeps.

    Returns what is to be known of the part: options, environment, memory, times. Raises what ended it; what was saved
    before has been told to the owner. ``quiet``: what was chosen is not said once more.
    """
    started, interrupts = time.perf_counter(), Interrupts()
    with interrupts:
        work = _Work(prepare(config, jobs=jobs), frozenset(done), quiet)
        _run(work, folder, interrupts, _Stage(), pool, reporter or Reporter())
    folder.record.timings.total_s = time.perf_counter() - started
    folder.note_spans(spans.recorded())
    spans.forget()
    return folder.record


def say_what_is_there(earlier: Earlier, folder: RunFolder) -> None:
    """How much of a run that goes on is drawn."""
    log.info("%d of %d image(s) are in %s already", len(earlier.done), earlier.record.images_asked, folder.path)
    if earlier.lost:
        log.warning("%d image(s) are lost, cut short or not finite: they are drawn again", earlier.lost)


def completed(earlier: Earlier, folder: Path, config: RunConfig) -> RunRecord:
    """A run of which no image is missing: its record says so, if it did not yet."""
    log.info("all %d image(s) of %s are drawn", len(earlier.done), folder)
    if earlier.record.status != "completed":
        going_on = RunFolder(folder, config.source, earlier=earlier.record)
        going_on.finish("completed")
        return going_on.record
    return earlier.record


def _borrowed(pool: SessionPool | None) -> AbstractContextManager[SessionPool]:
    """The caller's pool, which stays open, or one for this run alone."""
    return SessionPool() if pool is None else nullcontext(pool)


def _processes_to_start(config: RunConfig, machine: Machine | None) -> int:
    """How many processes are to draw the pictures, where this one is not one of them."""
    if config.parallel.engine is None or place() is not None:
        return 1
    try:
        return prepare(config, machine).plan.ranks
    except FluxrunError:  # the run refuses it once more, and records that
        return 1


def helps_another() -> bool:
    """Whether this process helps to draw the pictures of another one, which owns the folder."""
    here = place()
    return here is not None and here.rank > 0


def _joined(prepared: Prepared, pool: SessionPool, folder: Path) -> Prepared:
    """Join the processes that torchrun has started; all of them plan with what is free on the fullest GPU."""
    plan = prepared.plan
    if plan.config.parallel.engine is None:
        size = plan.machine.place.size if plan.machine.place else 1
        raise ConfigError(
            f"torchrun has started {size} process(es), and parallel=single draws a picture with one: add "
            "parallel=ulysses, ring or tensor, or leave torchrun out"
        )
    ranks = pool.ranks = Group.join(plan.machine.device, plan.config.parallel.timeout_minutes)
    folder = Path(ranks.first(str(folder)))
    if ranks.rank:
        log_to(folder, f"fluxrun.rank{ranks.rank}.log")
    machine = plan.machine
    if machine.gpu is not None:
        machine = machine.with_free_bytes(min(ranks.gather(machine.gpu.free_bytes)))
    return prepare(plan.config, machine)


@dataclass(frozen=True)
class _Work:
    """What is to be drawn."""

    prepared: Prepared
    done: frozenset[int]
    """Which of its images are there already, by ``Job.index``."""
    quiet: bool = False
    """Whether what was chosen is known, and not said."""


class _Stage:
    """Where the run is, for the record of an error: read when it is needed, a second signal may come at any time."""

    def __init__(self) -> None:
        self.read: Callable[[], str] = lambda: "prepare"

    @property
    def name(self) -> str:
        """The stage right now."""
        return self.read()


def _run(
    work: _Work,
    folder: RunFolder,
    interrupts: Interrupts,
    stage: _Stage,
    pool: SessionPool,
    reporter: Reporter,
) -> None:
    prepared, plan = work.prepared, work.prepared.plan

    def note_options() -> None:
        folder.note_options(plan.record(), plan.notes)

    with interrupts.immediate():
        folder.record.environment = environment(plan.machine)
        folder.record.inputs = prepared.inputs
        folder.begin(prepared.jobs, from_file=plan.config.prompts_file is not None)
        note_options()
        folder.write()
        if not work.quiet:
            _announce(prepared)
        stage.read = lambda: "load"
        reading = None if pool.loads else read_ahead(prepared.weight_files)
        with spans.span("import"):
            from fluxrun.drawing.generation import Generation

    with pool.session(prepared, reporter=reporter, interrupts=interrupts, on_change=note_options) as session:
        plan = session.plan
        generation = Generation(session, folder, prepared.jobs, work.done)
        stage.read = lambda: generation.stage
        try:
            generation.run()
        finally:
            note_options()
            if reading is not None:
                reading.stop()


def _announce(prepared: Prepared) -> None:
    plan = prepared.plan
    chosen = " ".join(f"{group}={choice.effective}" for group, choice in plan.choices.items())
    log.info("%s on %s (%s)", chosen, plan.machine.device, plan.dtype)
    announce(plan, {})
    for note in plan.notes:
        log.warning("%s", note)
    if announcement := prepared.located.announcement():
        log.info("%s", announcement)


def finish(folder: RunFolder, started: float, error: BaseException | None, stage: str) -> None:
    """Close a run's record, and say how it ended."""
    folder.record.timings.total_s += time.perf_counter() - started
    folder.note_spans(spans.recorded())
    spans.forget()
    unrecorded = ""
    try:
        folder.finish("completed" if error is None else status_of(error), error, stage)
    except OSError as problem:  # a full disk, a folder that went away: then at least the screen says it
        unrecorded = f"cannot write {folder.path / 'run.json'}: {problem.strerror or one_line(problem)}"
        if error is None or status_of(error) == "interrupted":
            log.error("%s", unrecorded)
        if error is None:
            raise
    if error is None:
        log.info("%d image(s) in %s (%.1f s)", len(folder.record.images), folder.path, folder.record.timings.total_s)
        return
    if status_of(error) == "interrupted":
        log.warning("%s after %d image(s); record and images are in %s", error, len(folder.record.images), folder.path)
    else:
        text = str(error) if isinstance(error, FluxrunError) else f"{type(error).__name__}: {one_line(error)}"
        # The console prints one line, the log file has the traceback too.
        where = unrecorded or f"traceback in {folder.path / 'fluxrun.log'}"
        log.error("%s (stage %s; %s)", text, stage, where, exc_info=error)
        mark_said(error)


# --- a pipeline of one's own ----------------------------------------------------------------------------------------


def build(config: RunConfig) -> Session:
    """The optimized pipeline of a config, with what was applied; for notebooks and node graphs.

    ``session.pipeline`` is an ordinary diffusers pipeline, ``session.plan.choices`` says what is in effect and why.
    Process-wide switches stay set until ``session.close()``. ``memory=staged`` is refused: it throws the text encoder
    away after the prompts it was told; where ``auto`` would take it, balanced memory takes its place.
    """
    prepared = prepare(config)
    keep_whole(prepared.plan)
    return assembled(prepared, whole=True)


def assembled(
    prepared: Prepared, *, whole: bool = False, ranks: Ranks = ALONE, store: WeightStore | None = None
) -> Session:
    """A session with its pipeline built; ``whole`` keeps the text encoder whatever has to fall back."""
    session = Session(
        prepared.plan, store=store, pictures=prepared.pictures, located=prepared.located, adapters=prepared.adapters
    )
    session.whole, session.loader.ranks = whole, ranks
    session.__enter__()
    try:
        session.assemble()
    except BaseException:
        session.close()
        raise
    return session


def keep_whole(plan: Plan) -> None:
    """No staged memory for a pipeline that will be asked to encode prompts later."""
    choice = plan.choices["memory"]
    if choice.effective != "staged":
        return
    if choice.requested != "auto":
        raise ConfigError(
            "memory=staged frees the text encoder, so that a pipeline of your own could encode no prompt; use "
            "memory=balanced, or fluxrun.run, which knows its prompts beforehand"
        )
    plan.switch("memory", "balanced", {"chosen_because": "a pipeline that is handed out keeps its text encoder"})
    settle(plan)
