"""A GPU's queue on a real GPU: a step in it keeps the GPU busy, and more are not put there."""

from __future__ import annotations

import pytest

from fluxrun.drawing.stopwatch import Stopwatch
from fluxrun.process.clock import DeviceClock
from fluxrun.process.console import Steps

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

CYCLES = 40_000_000
"""Of a kernel that does nothing, about 20 ms: queued in microseconds, as a recorded step is."""


class Pipeline:
    """What a stopwatch needs of one."""


class Kept(DeviceClock):
    """A clock that keeps its marks."""

    def __init__(self, device: str) -> None:
        self.marks: list[torch.cuda.Event] = []
        super().__init__(device)

    def mark(self) -> torch.cuda.Event:
        """One more."""
        self.marks.append(super().mark())
        return self.marks[-1]


def test_steps_are_noted_when_the_one_before_is_done_and_the_next_is_queued() -> None:
    clock = Kept("cuda")
    seen: list[list[bool]] = []
    watch = Stopwatch(
        clock, Steps("", 8), lambda: seen.append([mark.query() for mark in clock.marks]), lambda: None, compiles=False
    )
    pipeline = Pipeline()
    with watch.timing(pipeline), pipeline.progress_bar(total=8):
        for number in range(8):
            torch.cuda._sleep(CYCLES)
            watch.step(pipeline, number, torch.tensor(0.0), {})
    assert all(all(done[:-1]) for done in seen), "a step before the one before is still queued"
    assert not any(done[-1] for done in seen), "the GPU had nothing to do"
    seconds = watch.step_seconds()
    assert len(seconds) == 8
    assert max(seconds) < 2 * min(seconds)
    assert watch.denoise_s == pytest.approx(sum(seconds), rel=0.01)
