"""Times one pipeline call: each step, denoising, decoding; it also shows the steps and lets an interrupt stop them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch

from fluxrun.process.console import Steps
from fluxrun.process.device import synchronize
from fluxrun.types import Pipeline


class Stopwatch:
    """Rides along a pipeline call, in the place of diffusers' progress bar and step callback.

    ``on_step`` is called after every step and may raise; ``on_denoised`` between the last step and the decoder.
    """

    def __init__(
        self,
        device: str,
        display: Steps,
        on_step: Callable[[], None],
        on_denoised: Callable[[], None],
        *,
        compiles: bool,
    ) -> None:
        self._device = device
        self._display = display
        self._on_step, self._on_denoised = on_step, on_denoised
        self._compiles = compiles
        self._clock: list[float] = []
        self._events: list[torch.cuda.Event] = []
        self.started_at = self.denoising_at = self.denoised_at = time.perf_counter()
        """When the call, its denoising loop and its decoding began."""
        self.denoise_s = 0.0
        self.decode_s = 0.0

    @contextmanager
    def timing(self, pipeline: Pipeline) -> Iterator[Stopwatch]:
        """Around the call: the device is synchronised at both ends."""
        pipeline.progress_bar = self.progress_bar
        synchronize(self._device)
        self.started_at = time.perf_counter()
        yield self
        synchronize(self._device)
        self.decode_s = time.perf_counter() - self.denoised_at

    @contextmanager
    def progress_bar(
        self, iterable: Iterable[torch.Tensor] | None = None, total: int | None = None
    ) -> Iterator[Stopwatch]:
        """Stands in for diffusers' own bar, which the pipeline opens around its denoising loop."""
        if self._compiles:
            self._display.compiling()
        synchronize(self._device)
        self.denoising_at = time.perf_counter()
        self._mark()
        yield self
        synchronize(self._device)
        self.denoised_at = time.perf_counter()
        self.denoise_s = self.denoised_at - self.denoising_at
        self._on_denoised()

    def update(self, n: int = 1) -> None:
        """diffusers calls it after each step."""

    def step(
        self, pipeline: Pipeline, step: int, timestep: torch.Tensor, values: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """diffusers' ``callback_on_step_end``: take the time, show it, and stop here if the user asked to."""
        self._mark()
        self._display.advance()
        self._on_step()
        return {}

    def _mark(self) -> None:
        """A point in time: an event on a GPU (nothing waits for it), the clock elsewhere."""
        if not self._device.startswith("cuda"):
            self._clock.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)

    def step_seconds(self) -> list[float]:
        """Seconds of each step; the device must have been synchronised since."""
        if self._events:
            return [before.elapsed_time(after) / 1e3 for before, after in pairwise(self._events)]
        return [after - before for before, after in pairwise(self._clock)]
