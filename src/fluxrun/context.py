"""What an option may look at while it is applied: the run, the machine, and places to count in."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fluxrun.catalog import Catalog
from fluxrun.config import Facts, Option, RunConfig
from fluxrun.estimate import PATCH_PIXELS
from fluxrun.machine import Machine
from fluxrun.plan import Plan

if TYPE_CHECKING:
    from fluxrun.compiler import Compiler
    from fluxrun.cuda_graphs import GraphedForward
    from fluxrun.offload import Pins
    from fluxrun.state import ProcessState


class Context:
    """What an option may look at while it is applied: the run, the machine, and places to count in."""

    def __init__(self, plan: Plan, state: ProcessState, compiler: Compiler) -> None:
        self.plan = plan
        self.state = state
        self.compiler = compiler
        self.graphs = Graphs()
        self.counters: Counter[str] = Counter()
        self.weight_facts: Facts = {}
        self.pins: Pins | None = None

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
        return image + self.plan.reference_tokens + self.plan.model.max_sequence_length

    def start_counting(self) -> None:
        """Count from here on: another run carries on with this pipeline."""
        self.counters.clear()
        self.compiler.start_counting()
        self.graphs.start_counting()

    def timed(self, call: Callable[[], Any]) -> float:
        """Seconds ``call`` takes, the device synchronised at both ends."""
        synchronize(self.device)
        started = time.perf_counter()
        call()
        synchronize(self.device)
        return time.perf_counter() - started


class Graphs:
    """The CUDA graphs of one build: what was wrapped, and what came of it."""

    def __init__(self) -> None:
        self.forwards: dict[str, GraphedForward] = {}
        self._replays_before = 0

    def wrap(self, pipeline: Any, targets: Sequence[str]) -> list[str]:
        """Record the forward of each target from its second call on; returns the targets found in the pipeline."""
        from fluxrun.cuda_graphs import GraphedForward
        from fluxrun.text_encoder import with_explicit_mask

        modules = {
            "transformer": pipeline.transformer,
            "vae_decoder": pipeline.vae.decoder,
            "text_encoder": pipeline.text_encoder,
        }
        for target in targets:
            if (module := modules[target]) is not None:
                module.forward = self.forwards[target] = GraphedForward(module.forward)
                if target == "text_encoder":
                    module.forward = with_explicit_mask(module)
        return list(self.forwards)

    def counted(self) -> Facts:
        """Graphs recorded by target, replays since the build or ``start_counting``, and what was dropped or refused."""
        recorded = {target: forward.graphs for target, forward in self.forwards.items()}
        refused = {target: forward.refused for target, forward in self.forwards.items() if forward.refused}
        facts: Facts = {"cuda_graphs": recorded, "cuda_graph_replays": self._replays() - self._replays_before}
        if dropped := {target: forward.dropped for target, forward in self.forwards.items() if forward.dropped}:
            facts["cuda_graphs_dropped"] = dropped
        if refused:
            facts["cuda_graphs_refused"] = refused
        return facts

    def start_counting(self) -> None:
        """Count replays from here on."""
        self._replays_before = self._replays()

    def clear(self) -> None:
        """Give the graphs' memory back; a module and its wrapped forward refer to each other."""
        for forward in self.forwards.values():
            forward.clear()

    def _replays(self) -> int:
        return sum(forward.replays for forward in self.forwards.values())


def synchronize(device: str) -> None:
    """Wait for the device; a CPU has nothing to wait for."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device == "mps":
        torch.mps.synchronize()
