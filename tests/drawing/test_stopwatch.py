"""The stopwatch: what it makes of a call's points in time, and how far a GPU's queue may fill."""

from __future__ import annotations

import time

import torch

from fluxrun.drawing.stopwatch import Stopwatch
from fluxrun.process.clock import DeviceClock
from fluxrun.process.console import Steps


class Queue(DeviceClock):
    """A clock whose marks are numbers; it notes what was waited for."""

    marks = 0

    def __init__(self) -> None:
        super().__init__("cpu")
        self.waited = []

    def mark(self):
        """One more second."""
        self.marks += 1
        return float(self.marks)

    def wait(self, mark):
        """Noted."""
        self.waited.append(mark)


class Pipeline:
    """What a stopwatch needs of one."""

    def call(self, watch, steps):
        """As diffusers' pipelines do it."""
        with self.progress_bar(total=steps):
            for number in range(steps):
                watch.step(self, number, torch.tensor(0.0), {})


def drawn(clock, steps, on_step=lambda: None):
    watch = Stopwatch(clock, Steps("", steps), on_step, lambda: None, compiles=False)
    pipeline = Pipeline()
    with watch.timing(pipeline):
        pipeline.call(watch, steps)
    return watch


def test_the_parts_of_a_call_follow_each_other():
    watch = drawn(Queue(), 3)
    times = [watch.started_at, watch.denoising_at, watch.denoised_at, watch.ended_at]
    assert times == sorted(times)
    assert watch.step_seconds() == [1.0, 1.0, 1.0]
    assert watch.denoise_s == 4.0
    assert watch.denoise_s + watch.decode_s == watch.ended_at - watch.denoising_at


def test_a_step_waits_for_the_one_before_and_not_for_itself():
    clock = Queue()
    waited = []
    drawn(clock, 3, lambda: waited.append(clock.marks - clock.waited[-1]))
    assert waited == [1.0, 1.0, 1.0]


def test_without_a_denoising_loop_all_of_a_call_is_decoding():
    watch = Stopwatch(Queue(), Steps("", 0), lambda: None, lambda: None, compiles=False)
    with watch.timing(Pipeline()):
        pass
    assert watch.step_seconds() == []
    assert watch.denoising_at == watch.started_at


def test_a_clocks_marks_are_seconds_of_the_process():
    before = time.perf_counter()
    clock = DeviceClock("cpu")
    first = clock.mark()
    second = clock.mark()
    clock.wait(second)
    assert before <= clock.at(first) <= clock.at(second) <= time.perf_counter()
