"""The noise that pictures begin with, drawn on the CPU while the device is busy: the bits that diffusers would draw."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple

import torch
from diffusers.utils.torch_utils import randn_tensor

from fluxrun.process import spans
from fluxrun.types import Pipeline

MOST_KEPT = 2
"""The noise in use and the next one; repeats and fallbacks find the first again."""


class Wanted(NamedTuple):
    """One pipeline call's noise: it depends on nothing else."""

    seeds: tuple[int, ...]
    shape: tuple[int, int, int]
    """Channels, height and width of one picture's latents, as the pipeline packs them."""
    dtype: torch.dtype

    @classmethod
    def of(cls, pipeline: Pipeline, seeds: Sequence[int], size: tuple[int, int], dtype: torch.dtype) -> Wanted:
        """For pictures of ``size`` (height, width), as the pipeline's ``prepare_latents`` shapes them."""
        height, width = (pixels // (2 * pipeline.vae_scale_factor) for pixels in size)
        channels = int(pipeline.transformer.config["in_channels"])
        return cls(tuple(seeds), (channels // 4 * 4, height, width), dtype)

    def generators(self) -> torch.Generator | list[torch.Generator]:
        """A fresh CPU generator for each picture, as a user of plain diffusers would make them."""
        made = [torch.Generator("cpu").manual_seed(seed) for seed in self.seeds]
        return made[0] if len(made) == 1 else made

    def draw(self) -> torch.Tensor:
        """[pictures, channels, height, width] on the CPU, by diffusers' own function."""
        with spans.span("noise"):
            shape = (len(self.seeds), *self.shape)
            noise: torch.Tensor = randn_tensor(
                shape, generator=self.generators(), device=torch.device("cpu"), dtype=self.dtype
            )
            return noise


class NoiseAhead:
    """Draws noise on a thread of its own, as a context: 14 ms for 1024x1024, in which a GPU would wait.

    ``begin`` it beside the text encoder, or beside the denoising of the picture before; ``of`` waits for what is left.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fluxrun-noise")
        self._begun: dict[Wanted, Future[torch.Tensor]] = {}

    def __enter__(self) -> NoiseAhead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nobody waits for what nobody wants any more."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def begin(self, wanted: Wanted) -> None:
        """Begin to draw it, unless that was begun before."""
        if wanted not in self._begun:
            self._begun[wanted] = self._thread.submit(wanted.draw)
        while len(self._begun) > MOST_KEPT:
            del self._begun[next(iter(self._begun))]  # the one used longest ago

    def of(self, wanted: Wanted) -> torch.Tensor:
        """The noise, begun or not. It is kept for a repeat: the caller must not write to it."""
        drawing = self._begun.pop(wanted, None) or self._thread.submit(wanted.draw)
        noise = drawing.result()
        self._begun[wanted] = drawing  # not if it failed: a repeat draws it anew
        return noise
