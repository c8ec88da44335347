"""Triton kernels compiled before they are needed, on many threads: what would launch them is rehearsed without data."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch

MOST_THREADS = 16

_rehearsing: ContextVar[bool] = ContextVar("rehearsing", default=False)


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """``kernel[grid]``, a Triton kernel's launch; in a rehearsal it is only compiled for its arguments."""
    return partial(kernel.warmup, grid=grid) if _rehearsing.get() else kernel[grid]


@contextmanager
def rehearsal() -> Iterator[None]:
    """Within, in this thread: no kernel runs, so tensors may be of the meta device."""
    token = _rehearsing.set(True)
    try:
        yield
    finally:
        _rehearsing.reset(token)


class Compilers(ThreadPoolExecutor):
    """Triton's compiler on threads: a kernel comes back with its launcher built and its code on the GPU."""

    def __init__(self, device: torch.device) -> None:
        threads = min(MOST_THREADS, os.cpu_count() or 1)
        super().__init__(threads, "fluxrun-triton", initializer=partial(_use, device))
        self.compiled = 0

    def submit(self, compiling: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Compile one kernel: what Triton asks its executor for."""
        self.compiled += 1
        return super().submit(_made_ready, partial(compiling, *args, **kwargs))


def compile_ahead(parts: Sequence[Callable[[], Any]], compilers: Compilers, device: torch.device) -> None:
    """Compile what ``parts`` launch, all at once; returns when it is done. Raises what Triton raises."""
    import triton

    _use(device)
    with triton.AsyncCompileMode(compilers), rehearsal(), torch.no_grad():
        for part in parts:
            part()


def _use(device: torch.device) -> None:
    """Each thread has a current GPU of its own."""
    if device.index is not None:
        torch.cuda.set_device(device)


def _made_ready(compiling: Callable[[], Any]) -> Any:
    kernel = compiling()
    _ = kernel.run  # Triton builds the launcher, and loads the code, when this is asked for
    return kernel
