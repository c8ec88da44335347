"""Taking turns: workers side by side in rounds A B C, C B A, or one after the other where memory holds only one."""

from __future__ import annotations

import importlib.util
import multiprocessing
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from speed_settings import REFERENCE, Setting
from speed_worker import Job, Reply, serve

IMPORT_S = 120.0
"""Seconds a worker may take to import its libraries."""
BUILD_S = 90.0
"""Seconds it may take to build: random weights are made on the device."""
LEAVE_S = 15.0
"""Seconds it may take to end; then it is killed."""
Row = dict[str, Any]


class Failed(Exception):
    """A worker's answer was an error, did not come in time, or its process died."""


class Worker:
    """A process that measures one setting, and what it has measured so far as a row."""

    def __init__(self, job: Job, row: Row) -> None:
        self.job = job
        self.row = row
        self.alive = True
        """Whether it can be asked: nothing has failed so far."""
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        # Not a daemon: compiling starts processes of its own.
        self._process = context.Process(target=serve, args=(theirs, job), daemon=False)
        self._process.start()
        theirs.close()
        self._waiting = True

    def send(self, command: str, argument: Any = None) -> None:
        """Ask without waiting, so that several workers build at the same time. Raises Failed when it is gone."""
        try:
            self._connection.send((command, argument))
        except OSError as error:
            raise Failed(f"its process died (exit code {self._process.exitcode})") from error

    def receive(self, seconds: float) -> Reply:
        """The answer. Raises Failed (and ends the process) when it is an error or does not come within ``seconds``."""
        try:
            if not self._connection.poll(max(seconds, 0.1)):
                raise Failed(f"no answer within {max(seconds, 0):.0f} s")
            reply: Reply = self._connection.recv()
        except (EOFError, OSError) as error:
            raise Failed(f"its process died (exit code {self._process.exitcode})") from error
        if "error" in reply:
            raise Failed(reply["error"])
        return reply

    def note(self, command: str, seconds: float) -> None:
        """Wait for the answer to ``command`` and keep it in the row; its own seconds go by the command's name."""
        reply = self.receive(seconds)
        self.row.update({(f"{command}_s" if key == "seconds" else key): value for key, value in reply.items()})

    def take_turn(self, seconds: float, argument: Any = None) -> None:
        """One turn: each key of its samples holds one list per turn; a turn with an argument is kept as it is."""
        self.send("turn", argument)
        samples = self.receive(seconds)
        self.row["status"] = "measured"
        if argument is not None:
            self.row.setdefault("turns", []).append(samples)
            return
        for key, values in samples.items():
            if isinstance(values, list):
                self.row["samples"].setdefault(key, []).append(values)

    def wait_until_ready(self) -> None:
        """Wait for its imports."""
        if self._waiting:
            self._waiting = False
            self.receive(IMPORT_S)

    def give_up(self, why: str, status: str) -> None:
        """End it at once (it may hang, and its memory is another's) and note why; what it has measured stays."""
        self.alive = False
        self._process.kill()
        self.row["error"] = why
        if self.row["status"] != "measured":
            self.row["status"] = status

    def end(self) -> None:
        """Let it go, and wait until its memory is free; ending it twice is fine."""
        if self._connection.closed:
            return
        try:
            self.send("quit")
        except Failed:  # it is gone already
            self._process.kill()
        self._process.join(LEAVE_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._connection.close()


@dataclass
class Rounds:
    """How one section is measured, and its rows as they grow; ``save`` is called whenever there is something new."""

    jobs: Callable[[Setting], Job]
    deadline: float
    """``time.monotonic()`` at which no new work begins."""
    save: Callable[[list[Row]], None]
    rounds: int = 5
    warm_s: float = 100.0
    """Seconds a setting's first calls may take, compiling included."""
    turn_s: float = 60.0
    say: Callable[[Row], None] = lambda row: None
    after_round: Callable[[], None] = lambda: None
    """Called while the device is still warm: it notes clocks and power."""
    rows: list[Row] = field(default_factory=list)

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    # -- side by side -------------------------------------------------------------------------------------------

    def side_by_side(self, settings: Sequence[Setting], group: int) -> list[Setting]:
        """Measure a group in rounds; returns the settings that ran out of memory beside the others."""
        workers = self._start(settings, group)
        try:
            self._build_together(workers)
            for worker in workers:
                self._warm(worker, reserve=15.0)
            self._take_turns([worker for worker in workers if worker.alive])
            for worker in workers:
                self._note_facts(worker)
        finally:
            self._end(workers)
        return [w.job.setting for w in workers if "out of memory" in (w.row["error"] or "").lower()]

    def leave_out(self, settings: Sequence[Setting], group: int, why: str) -> None:
        """Note a group that is not measured."""
        for setting in settings:
            self.rows.append({**_new_row(self.jobs(setting), group), "error": why})
            self.say(self.rows[-1])
        self.save(self.rows)

    def _take_turns(self, workers: list[Worker]) -> None:
        for number in range(self.rounds):
            if self.left <= 0:
                return
            for worker in workers if number % 2 == 0 else reversed(workers):
                if worker.alive:
                    self._attempt(worker, worker.take_turn, self.turn_s)
            self.after_round()
            self.save(self.rows)

    def _build_together(self, workers: list[Worker]) -> None:
        for worker in workers:
            self._attempt(worker, worker.wait_until_ready)
        building = [worker for worker in workers if worker.alive]
        for worker in building:
            self._attempt(worker, worker.send, "build")
        for worker in building:
            self._attempt(worker, worker.note, "build", BUILD_S)

    # -- one after the other ------------------------------------------------------------------------------------

    def one_at_a_time(self, settings: Sequence[Setting], passes: int = 2) -> None:
        """Measure each setting alone on the device, A B C and then C B A; later passes only while there is time.

        A later pass is a new process whose samples join those of the first; its first calls find compiled code.
        """
        started = time.monotonic()
        self._pass(settings, self._turns)
        taken = time.monotonic() - started
        for number in range(1, passes):
            if self.left < 0.55 * taken:  # what was compiled in the first pass takes no time in the second
                return
            earlier, self.rows = self.rows, []
            good = {row["setting"] for row in earlier if not row["error"]}
            again = [setting for setting in settings if setting.name in good]
            self._pass(again[::-1] if number % 2 else again, self._turns)
            self.rows = [_joined(row, self.rows) for row in earlier]
            self.save(self.rows)

    def at_each(self, settings: Sequence[Setting], arguments: Sequence[Any]) -> None:
        """Measure each setting alone, one turn for each argument, kept in the row's ``turns``."""

        def turns(worker: Worker) -> None:
            for argument in arguments:
                self._ask_for_turn(worker, argument)

        self._pass(settings, turns)

    def _pass(self, settings: Sequence[Setting], turns: Callable[[Worker], None]) -> None:
        workers = self._start(settings, 0)
        try:
            for worker in workers:
                if self.left > 0:
                    self._alone(worker, turns)
                else:
                    worker.give_up("out of time", "not measured")
                    self.say(worker.row)
                worker.end()
        finally:
            self._end(workers)

    def _alone(self, worker: Worker, turns: Callable[[Worker], None]) -> None:
        self._attempt(worker, worker.wait_until_ready)
        self._attempt(worker, worker.send, "build")
        self._attempt(worker, worker.note, "build", BUILD_S)
        self._warm(worker, reserve=0.0)
        turns(worker)
        self.after_round()
        self._note_facts(worker)

    def _turns(self, worker: Worker) -> None:
        for _ in range(worker.job.setting.images or self.rounds):
            self._ask_for_turn(worker)

    def _ask_for_turn(self, worker: Worker, argument: Any = None) -> None:
        if self.left > 0:
            self._attempt(worker, worker.take_turn, self.turn_s, argument)
            self.save(self.rows)

    # -- what both share ----------------------------------------------------------------------------------------

    def _start(self, settings: Iterable[Setting], group: int) -> list[Worker]:
        """A worker per setting that can be measured here; all import at the same time."""
        workers = []
        for setting in settings:
            job = self.jobs(setting)
            self.rows.append(_new_row(job, group))
            if missing := [name for name in setting.needs if importlib.util.find_spec(name) is None]:
                self.rows[-1]["error"] = f"{', '.join(missing)} is not installed"
                self.say(self.rows[-1])
                continue
            workers.append(Worker(job, self.rows[-1]))
        self.save(self.rows)
        return workers

    def _warm(self, worker: Worker, reserve: float) -> None:
        """First calls, one worker at a time: what autotunes must have the device to itself."""
        if not worker.alive:
            return
        seconds = min(self.warm_s, self.left - reserve)
        if seconds <= 0:
            worker.give_up("out of time", "not measured")
            return
        self._attempt(worker, worker.send, "warm")
        self._attempt(worker, worker.note, "warm", seconds)
        self.save(self.rows)

    def _note_facts(self, worker: Worker) -> None:
        self._attempt(worker, worker.send, "facts")
        self._attempt(worker, worker.note, "facts", self.turn_s)
        self.say(worker.row)
        self.save(self.rows)

    def _attempt(self, worker: Worker, do: Callable[..., Any], *arguments: Any) -> None:
        """A failure is the setting's result; the others carry on."""
        if not worker.alive:
            return
        try:
            do(*arguments)
        except Failed as failed:
            worker.give_up(str(failed), "failed")

    def _end(self, workers: Iterable[Worker]) -> None:
        for worker in workers:
            worker.end()
        self.save(self.rows)


def _new_row(job: Job, group: int) -> Row:
    setting = job.setting
    return {
        "setting": setting.name,
        "recipe": setting.recipe,
        "overrides": [*job.overrides, *setting.overrides] if setting.recipe is None else [],
        "group": group,
        "status": "not measured",
        "error": None,
        "samples": {},
    }


def _joined(row: Row, later: Sequence[Row]) -> Row:
    """A row with the samples of a later pass, which keeps its own first calls in ``later_passes``."""
    same = next((r for r in later if r["setting"] == row["setting"]), None)
    if same is None:
        return row
    samples = {key: [*turns, *same["samples"].get(key, [])] for key, turns in row["samples"].items()}
    about = {key: value for key, value in same.items() if key in ("build_s", "warm_s", "first_call_s", "error")}
    return {**row, "samples": samples, "later_passes": [*row.get("later_passes", []), about]}


def groups_that_fit(
    groups: Iterable[Sequence[Setting]], bf16_gb: float, memory_gb: float | None
) -> list[list[Setting]]:
    """Split groups that would not fit side by side; plain diffusers leads each part. ``None``: any number fits."""
    split: list[list[Setting]] = []
    for group in groups:
        reference = [setting for setting in group if setting.name == REFERENCE]
        room = (memory_gb or float("inf")) - sum(s.gigabytes(bf16_gb) for s in reference)
        part, used = list(reference), 0.0
        for setting in (s for s in group if s.name != REFERENCE):
            need = setting.gigabytes(bf16_gb)
            if used + need > room and len(part) > len(reference):
                split.append(part)
                part, used = list(reference), 0.0
            part, used = [*part, setting], used + need
        if len(part) > len(reference) or len(group) == len(reference):
            split.append(part)
    return split
