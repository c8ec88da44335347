"""torch.compile with its own bookkeeping: what was compiled, what really ran compiled, and what it cost."""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fluxrun.compilation.artifacts import Artifacts, made_with
from fluxrun.hardware.machine import Machine
from fluxrun.paths import cache_dir, expanded
from fluxrun.types import Json

if TYPE_CHECKING:
    from torch._inductor.cudagraph_trees import CUDAGraphNode
    from torch._inductor.utils import InputType

COMPILE_TIME_KEY = "entire_frame_compile"


class CountingBackend:
    """Inductor as a torch.compile backend that counts compilations, recompilations and calls of compiled graphs.

    Two backends with the same settings are equal, so that a fresh module shell reuses the graphs compiled for an
    earlier one; the counts are therefore the class's, and read as differences.
    """

    compilations = 0
    recompilations = 0
    graph_calls = 0

    def __init__(self, patches: dict[str, Json]) -> None:
        self.patches = patches
        self._identity = json.dumps(patches, sort_keys=True, default=str)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CountingBackend) and other._identity == self._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[InputType]) -> Callable[..., Any]:
        from torch._guards import CompileContext
        from torch._inductor.compile_fx import compile_fx

        compile_id = CompileContext.current_compile_id()
        CountingBackend.compilations += 1
        CountingBackend.recompilations += bool(compile_id and compile_id.frame_compile_id)
        compiled: Any = compile_fx(graph, inputs, config_patches=self.patches)

        @functools.wraps(compiled)
        def run(*args: InputType) -> Any:
            CountingBackend.graph_calls += 1
            return compiled(*args)

        return run


class LimitWatch(logging.Handler):
    """Counts the functions dynamo gave up on: after eight recompilations it runs them eagerly, and only logs it."""

    hits = 0

    def emit(self, record: logging.LogRecord) -> None:
        if str(record.msg).startswith("torch._dynamo hit config."):
            LimitWatch.hits += 1

    @staticmethod
    def install() -> None:
        """Listen to dynamo; once a process."""
        logger = logging.getLogger("torch._dynamo.convert_frame")
        if not any(isinstance(handler, LimitWatch) for handler in logger.handlers):
            logger.addHandler(LimitWatch(logging.WARNING))


class Compiler:
    """What a build needs of torch.compile: backends, cache folder, and the counts since it was made.

    Until a backend is asked for, nothing of torch's compiler is imported, and there is nothing to count.
    """

    _last_identity: str | None = None

    def __init__(self) -> None:
        self.active = False
        self.artifacts: Artifacts | None = None
        self._start: dict[str, float] = {}

    def backend(self, mode: str | None, options: Mapping[str, Json]) -> CountingBackend:
        """The backend of these settings. Settings other than the last ones reset dynamo first: after eight
        different ones it would refuse (``fullgraph``) or silently run eager."""
        from torch._inductor import list_mode_options

        patches = {**(list_mode_options(mode) if mode and mode != "default" else {}), **options}
        backend = CountingBackend(patches)
        LimitWatch.install()
        if Compiler._last_identity not in (None, backend._identity):
            torch.compiler.reset()
        Compiler._last_identity = backend._identity
        self.active = True
        self._start = _counts()
        return backend

    def use_cache(self, folder: Path | None) -> None:
        """Keep compiled kernels in ``folder`` (None: fluxrun's cache folder; the user's environment wins)."""
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir

        # torch writes its own default, a temporary folder, into the environment as soon as inductor is imported.
        given = os.environ.get("TORCHINDUCTOR_CACHE_DIR") not in (None, default_cache_dir())
        if folder is not None or not given:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(expanded(folder or cache_dir() / "inductor"))

    def share(self, file: Path, machine: Machine) -> str | None:
        """Use compiled code from ``file``, and add to it what is compiled new; returns a note for the user, or None."""
        self.artifacts = Artifacts(expanded(file), made_with(machine), saved_at=_counts()["cache_misses"])
        return self.artifacts.load()

    def start_counting(self) -> None:
        """Count from here on: another run carries on with the same compiled pipeline."""
        if self.active:
            self._start = _counts()

    @staticmethod
    def forget() -> None:
        """Throw compiled code away, and what it holds of the device's memory (a CUDA graph's pool)."""
        torch.compiler.reset()
        Compiler._last_identity = None

    def counted(self) -> dict[str, Any]:
        """Counts since the backend was made, or since ``start_counting``; times in seconds."""
        now = _counts()
        return {key: round(now[key] - self._start.get(key, 0), 3) for key in now}

    def shared(self) -> dict[str, Any]:
        """Write the shared file if anything was compiled since; what was loaded from and saved to it."""
        if self.artifacts is None:
            return {}
        self.artifacts.save(_counts()["cache_misses"])
        return {"artifacts": dict(self.artifacts.facts)}

    def seconds(self) -> float:
        """Seconds spent compiling since the backend was made."""
        return _compile_seconds() - self._start["compile_s"]


def _counts() -> dict[str, float]:
    from torch._dynamo.utils import counters

    inductor, autograd = counters["inductor"], counters["aot_autograd"]
    return {
        "compile_s": _compile_seconds(),
        "graphs_compiled": CountingBackend.compilations,
        "recompiles": CountingBackend.recompilations,
        "recompile_limit_hits": LimitWatch.hits,
        "graph_calls": CountingBackend.graph_calls,
        "graph_breaks": sum(counters["graph_break"].values()),
        "cache_hits": inductor["fxgraph_cache_hit"] + autograd["autograd_cache_hit"],
        "cache_misses": inductor["fxgraph_cache_miss"] + autograd["autograd_cache_miss"],
        "cudagraphs": _recorded_cudagraphs(),
    }


def _compile_seconds() -> float:
    import torch._dynamo.utils as dynamo_utils

    return float(dynamo_utils.calculate_time_spent().get(COMPILE_TIME_KEY, 0.0))


def _recorded_cudagraphs() -> int:
    """CUDA graphs inductor has recorded and still holds, over all devices."""
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return 0
    from torch._inductor import cudagraph_trees

    managers = (cudagraph_trees.get_manager(n, create_if_none_exists=False) for n in range(torch.cuda.device_count()))
    roots = [node for manager in managers if manager is not None for node in manager.get_roots()]
    return sum(_tree_size(node) for node in roots)


def _tree_size(node: CUDAGraphNode) -> int:
    return 1 + sum(_tree_size(child) for children in node.children.values() for child in children)
