"""What an option may look at while it is applied: the run, the machine, and places to count in."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fluxrun.catalog import Catalog
from fluxrun.config import Facts, Option, RunConfig
from fluxrun.machine import Machine
from fluxrun.plan import Plan

if TYPE_CHECKING:
    from fluxrun.compiler import Compiler
    from fluxrun.state import ProcessState

PATCH_PIXELS = 16
"""Edge in pixels of the square that becomes one image token."""


class Context:
    """What an option may look at while it is applied: the run, the machine, and places to count in."""

    def __init__(self, plan: Plan, state: ProcessState, compiler: Compiler, reference_tokens: int = 0) -> None:
        self.plan = plan
        self.state = state
        self.compiler = compiler
        self.counters: Counter[str] = Counter()
        self.weight_facts: Facts = {}
        self._reference_tokens = reference_tokens

    @property
    def config(self) -> RunConfig:
        """The run's config."""
        return self.plan.config

    @property
    def machine(self) -> Machine:
        """The machine, with the run's device."""
        return self.plan.machine

    @property
    def catalog(self) -> Catalog:
        """Where other options can be loaded from."""
        return self.plan.catalog

    @property
    def options(self) -> dict[str, Option]:
        """The options in use, by group."""
        return self.plan.options

    @property
    def device(self) -> str:
        """torch device string."""
        return self.machine.device

    @property
    def dtype(self) -> str:
        """Name of the weights' torch dtype."""
        return self.plan.dtype

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.plan.size

    @property
    def batch_size(self) -> int:
        """Images per pipeline call."""
        return self.config.batch_size

    @property
    def tokens(self) -> int:
        """Sequence length of the transformer: image, reference and text tokens."""
        height, width = self.size
        image = (height // PATCH_PIXELS) * (width // PATCH_PIXELS)
        return image + self._reference_tokens + self.plan.model.max_sequence_length

    def start_counting(self) -> None:
        """Count from here on: another run carries on with this pipeline."""
        self.counters.clear()
        self.compiler.start_counting()

    def timed(self, call: Callable[[], Any]) -> float:
        """Seconds ``call`` takes, the device synchronised at both ends."""
        synchronize(self.device)
        started = time.perf_counter()
        call()
        synchronize(self.device)
        return time.perf_counter() - started


def synchronize(device: str) -> None:
    """Wait for the device; a CPU has nothing to wait for."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device == "mps":
        torch.mps.synchronize()
