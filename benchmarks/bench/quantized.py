"""A process that measures one quantization after the other: built, drawn with, timed, freed. See quantization.py."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

from bench.results import Row
from bench.settings import Setting
from bench.worker import Job
from fluxrun.errors import one_line

STEPS = 4
ROUNDS = 3
"""Pictures that are timed, and their steps."""
LEFT_GB = 0.5
"""More than this left on the GPU after a row, and the next row gets a new process."""
NEUTRAL = "bf16"


class Process:
    """The process of a model's rows, started again when a row has ended it."""

    def __init__(self, work: Path, overrides: tuple[str, ...]) -> None:
        work.mkdir(parents=True)
        self._work, self._overrides = work, (*overrides, f"steps={STEPS}")
        self._pool: ProcessPoolExecutor | None = None
        self._pid: Future[int] | None = None

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def measure(self, name: str, overrides: str, seconds: float) -> Row:
        """A row, or why there is none."""
        if self._pool is None:
            self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
            self._pid = self._pool.submit(os.getpid)
        job = Job(Setting(name, overrides), _never, self._overrides, self._work, self._work / "log")
        try:
            row = self._pool.submit(measured, job).result(seconds)
        except TimeoutError:
            row = {"status": "failed", "error": f"no answer within {seconds:.0f} s"}
        except BrokenProcessPool as error:
            row = {"status": "failed", "error": one_line(error)}
        if row["status"] == "failed" or row["left_gb"] > LEFT_GB:
            self._end()
        return row

    def _end(self) -> None:
        """Kill it: it may hang, and its memory is the next one's."""
        if self._pool is None or self._pid is None:
            return
        with suppress(ProcessLookupError, BrokenProcessPool):
            os.kill(self._pid.result(), signal.SIGKILL)
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool = None


def _never(job: Job) -> Iterator[Row]:
    raise AssertionError(job)


def measured(job: Job) -> Row:
    """One row, in the process itself; whatever fails is its result."""
    from bench.subject import Subject, free_memory

    subject = None
    try:
        started = time.perf_counter()
        with _timed_conversion() as conversion:
            subject = Subject(job)
        row: Row = {
            "status": "measured", "build_s": time.perf_counter() - started, "quantize_s": sum(conversion),
            "load_peak_gb": subject.peak_gb(), **_drawn(subject),
        }  # fmt: skip
    except Exception as error:  # a library's failure is the row's result
        row = {"status": "failed", "error": one_line(error)[:300], "traceback": traceback.format_exc()[-3000:]}
    if subject is not None and subject.session is not None:
        subject.session.close()
    del subject
    _forget_compiled()
    free_memory()
    return {**row, "left_gb": _allocated_gb()}


def _drawn(subject: Any) -> Row:
    """The first picture, which compiles; then what its transformer is off by, memory, and steps."""
    first_s, _ = subject.timed(lambda: subject.first(subject.draw))
    error = _error(subject)
    subject.peak_gb()
    image_s, _ = subject.timed(subject.draw)
    peak = subject.peak_gb()
    steps = [ms for _ in range(ROUNDS) for ms in subject.step_ms()]
    facts = subject.facts()
    model = facts["options"]["model"]["facts"]
    return {
        "first_call_s": first_s, "image_s": image_s, "draw_peak_gb": peak, "step_ms": steps, **error,
        "weights_gb": round(model["bytes"] / 2**30, 3), "options": facts["options"],
    }  # fmt: skip


def _error(subject: Any) -> Row:
    """Relative L2 of the first step against the unquantized one's, from the same weights and inputs."""
    import torch

    output, file = subject.first_step().float().cpu(), subject.job.work / "neutral.pt"
    if f" {NEUTRAL} " in subject.job.setting.name and not file.exists():
        torch.save(output, file)
    if not file.exists():
        return {"finite": bool(output.isfinite().all()), "rel_l2": None}
    expected = torch.load(file)
    return {
        "finite": bool(output.isfinite().all()),
        "rel_l2": float((output - expected).norm() / expected.norm()),
    }


@contextmanager
def _timed_conversion() -> Iterator[list[float]]:
    """The seconds of each component's conversion, while random weights are made: apart from making these."""
    from fluxrun.options.quantization import QuantizationOption
    from fluxrun.process.device import synchronize

    seconds: list[float] = []
    convert = QuantizationOption.quantize

    def timed(self: QuantizationOption, component: Any, name: str, place: str, device: str) -> Any:
        synchronize(device)
        started = time.perf_counter()
        facts = convert(self, component, name, place, device)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
        return facts

    with patch.object(QuantizationOption, "quantize", timed):
        yield seconds


def _forget_compiled() -> None:
    """The next row's blocks are the same code over other weights: eight of these, and torch would stop compiling."""
    import torch

    torch._dynamo.reset()


def _allocated_gb() -> float:
    import torch

    return round(torch.cuda.memory_allocated() / 2**30, 2) if torch.cuda.is_available() else 0.0
