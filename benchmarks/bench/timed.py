"""A section whose settings take turns: side by side, A B C, C B A, or one by one where memory holds only one."""

import math
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from bench.results import Measured, Row, markdown, median, newest
from bench.section import Run, Section
from bench.settings import REFERENCE, Setting
from bench.worker import Job, Task, Worker
from fluxrun.hardware.detection import detect

BUILD_S, WARM_S, TURN_S = 90.0, 100.0, 60.0
"""The longest a worker may take to build (random weights are made on the device), for first calls, and for a turn."""
ERROR = "relative L2 against plain eager, one step"
KLEIN_GB, TEXT_ENCODER_GB = 12.0, 8.0
"""GPU memory of a process with klein-4B's transformer and VAE in bf16, graphs included; its text encoder beside it."""


@dataclass(frozen=True, kw_only=True)
class Timed(Section):
    """Settings in turns, each in a process that does ``task``."""

    key: str
    """Of the samples that it is about; ``scale`` brings them to ``unit``."""
    scale: float = 1.0
    model: str = "klein_4b"
    task: Task
    overrides: tuple[str, ...] = ()
    groups: tuple[tuple[Setting, ...], ...]
    """Measured side by side, in order of importance; each has plain diffusers in it."""
    gigabytes: float | None = KLEIN_GB
    """GPU memory of one process in bf16; None where the card holds only one: then one after the other."""
    rounds: int = 5
    passes: int = 2
    """One after the other: A B C, and then C B A while there is time."""
    errs: bool = False
    """Whether its error is a row of the summary."""
    stages: Mapping[str, str] | None = None
    """For a second table: samples in seconds, and what they are called."""

    def measure(self, run: Run) -> None:
        """Groups side by side as far as they fit; what fits only alone, one by one."""
        first, *rest = self.groups
        groups = [[one for one in group if run.keep.has(one.name)] for group in ((*first, *run.keep.added), *rest)]
        groups = [group for group in groups if len(group) > 1] or groups[:1]
        room = gpu.free_bytes / 2**30 if (gpu := detect().gpu) else math.inf
        if self.gigabytes is None or room < 2 * self.gigabytes:
            return self._one_by_one(run, [*dict.fromkeys(setting for group in groups for setting in group)])
        for number, part in enumerate(parts(groups, int(min(room / self.gigabytes, 100)))):
            with self._workers(run, part, number) as workers:
                self._take_turns(run, workers)

    def _one_by_one(self, run: Run, settings: Sequence[Setting]) -> None:
        """A later pass is a new process whose samples join those of the first; it finds compiled code."""
        taken = 0.0
        for _ in range(self.passes):
            if run.left < 0.55 * taken:  # what was compiled in the first pass takes no time in the second
                return
            started = time.monotonic()
            with self._workers(run, settings, 0) as workers:
                for worker in workers:
                    self._take_turns(run, [worker])
                    worker.end()
            taken = max(taken, time.monotonic() - started)
            settings = [worker.setting for worker in reversed(workers) if not worker.row["error"]]

    @contextmanager
    def _workers(self, run: Run, settings: Iterable[Setting], group: int) -> Iterator[list[Worker]]:
        """A worker per setting; all import at the same time."""
        workers: list[Worker] = []
        overrides = (*run.models[self.model], *self.overrides)
        try:
            for one in settings:
                about = {"recipe": one.recipe, "overrides": [] if one.recipe else [*overrides, *one.overrides.split()]}
                job = Job(one, self.task, overrides, run.work, run.logs / f"{self.name}_{one.name}.log")
                workers.append(Worker(job, run.row(one.name, group, about)))
            yield workers
        finally:
            for worker in workers:
                worker.end()

    def _take_turns(self, run: Run, workers: Sequence[Worker]) -> None:
        """Build together; first calls one at a time, as what autotunes must have the device to itself; then rounds."""
        for worker in workers:
            worker.begin("build")
        for worker in workers:
            worker.wait(BUILD_S)
        for worker in workers:
            if run.left <= 0:
                worker.give_up("out of time", "not measured")
            worker.begin("warm")
            worker.wait(min(WARM_S, run.left))
            run.save()
        for number in range(self.turns(run)):
            for worker in workers if number % 2 == 0 else reversed(workers):
                if run.left > 0 or number == 0:
                    worker.begin("turn")
                    worker.wait(TURN_S)
            run.note_state()
        for worker in workers:
            run.say(worker.row)

    def turns(self, run: Run) -> int:
        """How many each setting takes; in a dry run enough for both orders."""
        return 2 if run.tiny else self.rounds

    def entries(self, one: Measured) -> Iterator[Row]:
        plain = one.plain()
        beside = median(plain.samples(self.key), self.scale) if plain else None
        yield one.entry(self.label, self.metric, self.unit, median(one.samples(self.key), self.scale), beside)
        error = one.row.get("rel_l2")
        if self.errs and error is not None and one.row["setting"] != REFERENCE:
            yield one.entry(self.label, ERROR, "", float(f"{error:.3g}"), 0.0)

    def tables(self, rows: Sequence[Measured]) -> dict[str, str]:
        found = newest(rows, self.name)
        compiled = self._faster(found.get("plain_regional"))
        order = sorted(found.values(), key=lambda one: -statistics.median(one.samples(self.key)))
        header = ("setting", f"{self.metric}, {self.unit}", "min–max", "× plain", "× plain compiled", "error")
        made = {self.name: markdown((*header, "first call"), (self._line(one, compiled) for one in order))}
        if self.stages:
            names = ("setting", *(f"{stage}, ms" for stage in self.stages.values()))
            made["stages"] = markdown(names, map(self._stages, found.values()))
        return made

    def _stages(self, one: Measured) -> list[str]:
        return [f"`{one.row['setting']}`", *(f"{median(one.samples(key), 1e3):.4g}" for key in self.stages or ())]

    def _line(self, one: Measured, compiled: float | None) -> list[str]:
        values = [value * self.scale for value in one.samples(self.key)]
        faster, error = self._faster(one), one.row.get("rel_l2")
        return [
            one.shown,
            f"**{median(values):.4g}**",
            f"{min(values):.4g}–{max(values):.4g}, n={len(values)}",
            f"{faster:.2f}×" if faster else "–",
            f"{faster / compiled:.2f}×" if faster and compiled else "–",
            "–" if error is None else f"{error:.1e}",
            f"{one.row.get('first_call_s', 0):.1f} s",
        ]

    def _faster(self, one: Measured | None) -> float | None:
        """How many times faster than the plain diffusers beside it."""
        if one is None or (plain := one.plain()) is None:
            return None
        return statistics.median(plain.samples(self.key)) / statistics.median(one.samples(self.key))


def parts(groups: Iterable[Sequence[Setting]], fitting: int) -> Iterator[list[Setting]]:
    """Split groups that would not fit side by side; plain diffusers leads each part."""
    for reference, *others in groups:
        for start in range(0, max(1, len(others)), fitting - 1):
            yield [reference, *others[start : start + fitting - 1]]
