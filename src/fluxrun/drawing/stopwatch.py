"""Times one pipeline call: each step, denoising, decoding; it also shows the steps and lets an interrupt stop them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch

from fluxrun.process.clock import DeviceClock, Mark
from fluxrun.process.console import Steps
from fluxrun.types import Pipeline


class Stopwatch:
    """Rides along a pipeline call, in the place of diffusers' progress bar and step callback.

    ``on_step`` is called after every step and may raise; ``on_denoised`` between the last step and the decoder. A GPU
    has then been given that work and may not have done it: the decoder's is lined up behind it, with no gap between.
    """

    def __init__(
        self,
        clock: DeviceClock,
        display: Steps,
        on_step: Callable[[], None],
        on_denoised: Callable[[], None],
        *,
        compiles: bool,
    ) -> None:
        self._clock = clock
        self._display = display
        self._on_step, self._on_denoised = on_step, on_denoised
        self._compiles = compiles
        self._steps: list[Mark] = []
        """The denoising loop's begin, and the end of each step."""
        self._begun = self._denoised = self._ended = clock.mark()
        self._arrived = False

    @contextmanager
    def timing(self, pipeline: Pipeline) -> Iterator[Stopwatch]:
        """Around the call; at its end the device is waited for, unless its pictures have ``arrived`` before."""
        pipeline.progress_bar = self.progress_bar
        self._begun = self._clock.mark()
        yield self
        if not self._arrived:
            self._ended = self._clock.mark()
            self._clock.wait(self._ended)

    def arrived(self) -> None:
        """The pictures are on the CPU, so the call is over, whatever the device has been given since."""
        self._arrived, self._ended = True, time.perf_counter()

    @contextmanager
    def progress_bar(
        self, iterable: Iterable[torch.Tensor] | None = None, total: int | None = None
    ) -> Iterator[Stopwatch]:
        """Stands in for diffusers' own bar, which the pipeline opens around its denoising loop."""
        if self._compiles:
            self._display.compiling()
        self._steps = [self._clock.mark()]
        yield self
        self._denoised = self._clock.mark()
        self._on_denoised()

    def update(self, n: int = 1) -> None:
        """diffusers calls it after each step."""

    def step(
        self, pipeline: Pipeline, step: int, timestep: torch.Tensor, values: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """diffusers' ``callback_on_step_end``: take the time, show it, and stop here if the user asked to."""
        self._steps.append(self._clock.mark())
        # The step has only been handed to a GPU. One in its queue keeps it busy; more of them, which CUDA alone would
        # bound, are what an interrupt has to wait for, and what the progress shows before it is done.
        self._clock.wait(self._steps[-2])
        self._display.advance()
        self._on_step()
        return {}

    # -- after the call, in seconds as time.perf_counter gives them --------------------------------------------------

    @property
    def started_at(self) -> float:
        """When the device began with the call."""
        return self._clock.at(self._begun)

    @property
    def denoising_at(self) -> float:
        """When the denoising loop began; without one, when the call did."""
        return self._clock.at(self._steps[0] if self._steps else self._begun)

    @property
    def denoised_at(self) -> float:
        """When the last step was done, and decoding began."""
        return self._clock.at(self._denoised)

    @property
    def ended_at(self) -> float:
        """When the pictures were there."""
        return self._clock.at(self._ended)

    @property
    def denoise_s(self) -> float:
        """Seconds of the denoising loop."""
        return self.denoised_at - self.denoising_at

    @property
    def decode_s(self) -> float:
        """Seconds from the last step to the pictures."""
        return self.ended_at - self.denoised_at

    def step_seconds(self) -> list[float]:
        """Seconds of each step."""
        return [self._clock.at(after) - self._clock.at(before) for before, after in pairwise(self._steps)]
