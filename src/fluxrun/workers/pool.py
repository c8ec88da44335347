"""Tasks over actors: whoever has nothing to do gets the next one; what a lost worker had goes to another one.

Ray's own restarts are not used: an actor that is starting again takes calls, fails them (``ActorUnavailableError``),
and each counts as an attempt. Here a new actor takes the lost one's place, and gets a task once it has said that it is
ready.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from fluxrun.errors import FluxrunError
from fluxrun.workers.actor import Begun, Ended, Event, Said, Saved, Surroundings, Work, Worker
from fluxrun.workers.board import Board
from fluxrun.workers.cluster import Cluster

log = logging.getLogger("fluxrun.workers")

MOST_RETURNS = 2
"""How often a task of a lost worker goes back to the others."""

MOST_STARTS = 3
"""So many actors in a row that do not get as far as their first task end the command."""

LOOK_S = 0.25
"""How often the driver looks up while nothing happens: for signals, and to show how far things are."""

GONE_S = 2.0
"""What actors have for ending when they are told to."""


class WorkerLost(FluxrunError):
    """A worker's process or machine was gone before it had finished."""


@dataclass
class Task:
    """Something for one worker to do."""

    name: str
    what: Any
    """What the work is called with."""
    label: str = ""
    """What it is, for people."""
    lost: int = 0
    """How many workers were lost over it."""


@dataclass
class Seat:
    """A worker's place: the actor that has it now, and what it is at."""

    number: int
    actor: Any
    waiting: Any
    """What Ray will answer next: that the actor is ready, or what happens in its task."""
    task: Task | None = None
    is_ready: bool = False


class Pool:
    """So many actors, for the time of the block; afterwards none of them is left."""

    def __init__(self, cluster: Cluster, work: Work, board: Board) -> None:
        import ray

        self._board, self._resources = board, cluster.resources
        self._arguments = (Surroundings.here(), ray.put(work))
        self._actors = ray.remote(Worker)
        self._failed_starts = 0
        self._back: deque[Task] = deque()
        self._seats = [self._seat(number) for number in range(cluster.workers)]

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import ray

        with contextlib.suppress(ray.exceptions.RayError):
            for seat in self._seats:
                ray.kill(seat.actor)
            ended = [seat.actor.__ray_ready__.remote() for seat in self._seats]
            ray.wait(ended, num_returns=len(ended), timeout=GONE_S)

    def run(self, tasks: Iterator[Task]) -> Iterator[tuple[Task, Event | WorkerLost]]:
        """Have every task done; what happens as it happens: ``Begun``, pictures, ``Ended``, or that it is lost.

        Of a task that goes back ``WorkerLost`` is told, too: while ``task.lost`` is no more than MOST_RETURNS.
        """
        upcoming = next(tasks, None)
        while True:
            for seat in self._seats:
                if seat.is_ready and seat.task is None and (self._back or upcoming):
                    task = self._back.popleft() if self._back else upcoming
                    assert task is not None
                    upcoming = next(tasks, None) if task is upcoming else upcoming
                    self._give(seat, task)
                    yield task, Begun()
            if not self._back and upcoming is None and not any(seat.task for seat in self._seats):
                return
            for seat in self._answering():
                yield from self._take(seat)
            self._board.tick()

    # -- one worker ---------------------------------------------------------------------------------------------------

    def _seat(self, number: int) -> Seat:
        actor = self._actors.options(**self._resources).remote(*self._arguments)
        self._board.starts(number)
        return Seat(number, actor, actor.ready.remote())

    def _give(self, seat: Seat, task: Task) -> None:
        seat.task = task
        seat.waiting = seat.actor.draw.options(num_returns="streaming").remote(task.what)
        self._board.begins(seat.number, task.label or task.name)

    def _answering(self) -> Sequence[Seat]:
        """The seats whose worker has something to tell, or is gone."""
        import ray

        waiting = {seat.waiting: seat for seat in self._seats if seat.waiting is not None}
        ready, _ = ray.wait(list(waiting), num_returns=1, timeout=LOOK_S)
        if ready:
            ready, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
        return [waiting[one] for one in ready]

    def _take(self, seat: Seat) -> Iterator[tuple[Task, Event | WorkerLost]]:
        import ray

        try:
            if seat.task is None:
                self._board.waits(seat.number, ray.get(seat.waiting))
                seat.is_ready, seat.waiting, self._failed_starts = True, None, 0
                return
            events = ray.get(next(seat.waiting))
        except ray.exceptions.RayTaskError as error:  # a mistake of ours in the actor: the task's end
            events = [Ended(_last_line(error))]
        except (ray.exceptions.RayError, StopIteration) as error:
            yield from self._lose(seat, error)
            return
        for event in events:
            yield from self._hear(seat, event)

    def _hear(self, seat: Seat, event: Event) -> Iterator[tuple[Task, Event | WorkerLost]]:
        task = seat.task
        assert task is not None
        if isinstance(event, Said):
            log.log(event.level, "%s: %s", task.label or task.name, event.text)
        elif isinstance(event, Saved):
            self._board.pictures(seat.number, 1)
        elif isinstance(event, Ended):
            seat.task = seat.waiting = None
            self._board.waits(seat.number)
        yield task, event

    def _lose(self, seat: Seat, error: BaseException) -> Iterator[tuple[Task, Event | WorkerLost]]:
        """A worker is gone: another one gets its place, and its task goes back."""
        import ray

        if seat.task is None:
            self._failed_starts += 1
            if self._failed_starts >= MOST_STARTS:
                raise FluxrunError(f"the workers do not start: {_last_line(error)}") from error
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(seat.actor)  # one that only did not answer must not go on drawing
        task = seat.task
        self._seats[self._seats.index(seat)] = self._seat(seat.number)
        if task is None:
            return
        task.lost += 1
        if task.lost <= MOST_RETURNS:
            self._back.append(task)
            log.warning("%s: worker lost; another one gets it", task.label or task.name)
        else:
            log.error("%s: worker lost %d times", task.label or task.name, task.lost)
        yield task, WorkerLost(f"worker lost ({task.lost} time{'s' if task.lost > 1 else ''})")


def _last_line(error: BaseException) -> str:
    """What an error of Ray's comes down to: above it is the actor's traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
