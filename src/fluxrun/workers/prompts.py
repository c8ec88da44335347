"""A prompt set over workers: they draw parts of it into one folder, whose record this process alone writes."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fluxrun.config.prompts import jobs_of
from fluxrun.config.schema import RunConfig, WorkersConfig
from fluxrun.config.shards import Shard, shards
from fluxrun.errors import FluxrunError
from fluxrun.pipeline.session_pool import SessionPool
from fluxrun.planning.resume import Earlier, earlier_run
from fluxrun.process.console import log_to
from fluxrun.process.signals import Interrupts
from fluxrun.record.folder import RunFolder
from fluxrun.record.helping import Owner, SharedFolder, steady_steps, take_over
from fluxrun.record.schema import ImageLine, RunRecord
from fluxrun.runner import completed, draw_part, finish, say_what_is_there
from fluxrun.types import JsonObject
from fluxrun.workers.actor import Ended, Event, Saved, Tell
from fluxrun.workers.board import Board
from fluxrun.workers.cluster import connected
from fluxrun.workers.pool import MOST_RETURNS, Pool, Task, WorkerLost

log = logging.getLogger("fluxrun.workers")


@dataclass(frozen=True)
class Part:
    """A shard, and which of its images are there already (by ``Job.index``)."""

    shard: Shard
    done: frozenset[int] = frozenset()


@dataclass
class PartWork:
    """What a worker needs to know of the run."""

    data: JsonObject
    dirs: tuple[Path, ...]
    owner: Owner
    _config: RunConfig | None = field(default=None, init=False)

    @property
    def own_options(self) -> bool:
        """Whether no folder of the user's may hold options of their own."""
        return len(self.dirs) == 1

    def __call__(self, task: Part, tell: Tell, pool: SessionPool) -> RunRecord:
        """Draw a part; returns what is to be known of it. Raises what ended it."""
        first = self._config is None
        if first:
            log_to(self.owner.path, f"fluxrun.worker-{socket.gethostname()}-{os.getpid()}.log")
            self._config = RunConfig.from_dict(self.data, self.dirs)
        assert self._config is not None
        folder = SharedFolder(self.owner, self._config.source, lambda line: tell(Saved(line)))
        part = draw_part(self._config, folder, task.shard.jobs, task.done, pool=pool, quiet=not first)
        return part.model_copy(update={"images": []})


class PromptSet:
    """The run, as its record's owner sees it."""

    def __init__(self, config: RunConfig, folder: RunFolder, earlier: Earlier | None) -> None:
        self.config, self.folder = config, folder
        self.jobs = jobs_of(config)
        self._index = {(job.line, job.number): job.index for job in self.jobs}
        self.done = set(earlier.done if earlier else ())
        self.lost: list[str] = []
        """Parts that were given up."""

    def draw(self, crew: WorkersConfig) -> None:
        """Have everything drawn that is missing; raises what keeps it from being complete."""
        self.folder.begin(self.jobs, from_file=self.config.prompts_file is not None)
        self.folder.write()
        board = Board(len(self.jobs), "pictures")
        board.done = len(self.done)
        work = PartWork(self.config.source, self.config.config_dirs, Owner.of(self.folder))
        with connected(crew) as cluster, board, Pool(cluster, work, board) as pool:
            for task, event in pool.run(self._parts(cluster.workers)):
                self.hear(task, event)
                board.done = len(self.done)
                if self.folder.is_due:
                    self.folder.write()
        if self.lost:
            missing = len(self.jobs) - len(self.done)
            raise WorkerLost(
                f"worker lost, {MOST_RETURNS + 1} times each over {', '.join(self.lost)}: {missing} image(s) are "
                f"missing; resume={self.folder.path} draws them"
            )

    def _parts(self, workers: int) -> Iterator[Task]:
        for shard in shards(self.jobs, self.done, self.config.batch_size, workers):
            yield Task(shard.name, Part(shard, self._there(shard)))

    def _there(self, shard: Shard) -> frozenset[int]:
        return frozenset(job.index for job in shard.jobs if job.index in self.done)

    def hear(self, task: Task, event: Event | WorkerLost) -> None:
        if isinstance(event, Saved):
            self._add(event.picture)
        elif isinstance(event, Ended):
            if event.error:
                raise FluxrunError(f"{task.name}: {event.error}")
            take_over(self.folder, event.result, task.name)
            log.info("%s drawn (%d of %d)", task.name, len(self.done), len(self.jobs))
        elif isinstance(event, WorkerLost):
            task.what = replace(task.what, done=self._there(task.what.shard))
            if task.lost > MOST_RETURNS:
                self.lost.append(task.name)

    def _add(self, line: ImageLine) -> None:
        self.folder.add(line)
        if line.finite and line.identity is not None:
            self.done.add(self._index[line.identity])


def run_on_workers(
    config: RunConfig, output_dir: Path, crew: WorkersConfig, *, command: Sequence[str] = (), resume: bool = False
) -> RunRecord:
    """``runner.run`` with workers. Raises what ended the run when it was not completed; the record then says so."""
    earlier = earlier_run(config, output_dir) if resume else None
    if earlier is not None and earlier.complete:
        return completed(earlier, output_dir, config)
    folder = RunFolder(output_dir, config.source, command, earlier=earlier.record if earlier else None)
    started = time.perf_counter()
    interrupts = Interrupts(on_second=lambda: folder.abandon(interrupts.error(), "denoise"))
    with interrupts:
        try:
            with interrupts.immediate():
                if earlier is not None:
                    say_what_is_there(earlier, folder)
                PromptSet(config, folder, earlier).draw(crew)
        except BaseException as error:
            ended = interrupts.error() if interrupts.requested else error
            _close(folder, started, ended)
            if ended is not error:
                raise ended from None
            raise
        _close(folder, started, None)
    return folder.record


def _close(folder: RunFolder, started: float, error: BaseException | None) -> None:
    folder.record.timings.steady_step_s = steady_steps(folder.record)
    finish(folder, started, error, "denoise" if folder.record.images else "prepare")
