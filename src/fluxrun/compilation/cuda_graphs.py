"""A module's forward recorded as CUDA graphs, one for each shape of its inputs, and replayed.

A FLUX.2 step is hundreds of short kernels: launching them one by one leaves the GPU idle between them. A graph is
launched at once. Recording needs no compiler, so it costs one step's launches and nothing else.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from fluxrun.errors import one_line
from fluxrun.types import Pipeline

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE
    from transformers import PreTrainedModel


class Graphs:
    """The CUDA graphs of one build: what was wrapped, and what came of it."""

    def __init__(self) -> None:
        self.forwards: dict[str, GraphedForward] = {}
        self._replays_before = 0

    def wrap(self, pipeline: Pipeline, targets: Sequence[str]) -> list[str]:
        """Record the forward of each target from its second call on; returns the targets found in the pipeline."""
        encoder = pipeline.text_encoder
        modules: dict[str, nn.Module | None] = {
            "transformer": pipeline.transformer,
            "vae_decoder": pipeline.vae.decoder,
            "text_encoder": encoder,
        }
        for target in targets:
            if (module := modules[target]) is not None:
                module.forward = self.forwards[target] = GraphedForward(module.forward)
                if encoder is not None and module is encoder:
                    module.forward = with_explicit_mask(encoder)
        return list(self.forwards)

    def counted(self) -> dict[str, Any]:
        """Graphs recorded by target, replays since the build or ``start_counting``, and what was dropped or refused."""
        recorded = {target: forward.graphs for target, forward in self.forwards.items()}
        refused = {target: forward.refused for target, forward in self.forwards.items() if forward.refused}
        facts: dict[str, Any] = {"cuda_graphs": recorded, "cuda_graph_replays": self._replays() - self._replays_before}
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


log = logging.getLogger("fluxrun.compile")

MOST_GRAPHS = 8
"""Graphs kept per module, those used last, so that a sweep over sizes cannot fill the memory."""


@dataclass
class _Recorded:
    """One graph with the tensors it reads from and writes to."""

    graph: torch.cuda.CUDAGraph
    inputs: list[torch.Tensor]
    output: Any


class Call(NamedTuple):
    """The arguments of one call of a module, whatever the module takes."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class GraphedForward:
    """Stands in for a module's ``forward``: the first call of a shape runs as ever, the second is recorded.

    The first call is where kernels are compiled, tuned and fail; only what has run once is recorded. Tensor arguments
    are copied into the graph's own before each replay and its outputs copied out, so callers see ordinary values.
    Arguments that are not tensors must be equal for a graph to be reused. A forward that cannot be recorded (it waits
    for the device, or decides by a tensor's values) goes on as it is; ``refused`` says why.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward
        self.graphs = 0
        self.dropped = 0
        self.replays = 0
        self.refused: str | None = None
        self._seen: set[Hashable] = set()
        self._recorded: dict[Hashable, _Recorded] = {}
        self._pool: _POOL_HANDLE | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = Call(args, kwargs)
        key, tensors = _signature(call)
        if key is None or self.refused or not all(tensor.is_cuda for tensor in tensors):
            return self.forward(*args, **kwargs)
        if key in self._recorded:
            self._recorded[key] = self._recorded.pop(key)  # the last one is the one used last
            return self._replay(self._recorded[key], tensors)
        if key in self._seen and (recorded := self._try_to_record(call, tensors)):
            self._recorded[key] = recorded
            self.graphs += 1
            return self._replay(recorded, tensors)
        self._seen.add(key)
        return self.forward(*args, **kwargs)

    def clear(self) -> None:
        """Forget every graph and free what they hold."""
        self._recorded.clear()
        self._seen.clear()
        self._pool = None

    def _try_to_record(self, call: Call, tensors: list[torch.Tensor]) -> _Recorded | None:
        try:
            return self._record(call, tensors)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a library may refuse in any way it likes; it is said, recorded, and run as before
            self.refused = one_line(error)
            log.warning("a forward cannot be recorded as a CUDA graph and runs as it is (%s)", self.refused)
            return None

    def _record(self, call: Call, tensors: list[torch.Tensor]) -> _Recorded:
        """Record one call over copies of its tensors; nothing is computed yet."""
        inputs = [tensor.clone() for tensor in tensors]
        fresh = iter(inputs)
        args, kwargs = _map_tensors(call, lambda _: next(fresh))
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize()
        while len(self._recorded) >= MOST_GRAPHS:
            self._recorded.pop(next(iter(self._recorded)))
            self.dropped += 1
        graph = torch.cuda.CUDAGraph()
        # Not torch.cuda.graph: when recording fails it leaves its own stream behind as the current one.
        with _undone_on_failure(self._pool), torch.cuda.stream(torch.cuda.Stream()):
            # thread_local: another thread (a progress display, a data loader) may call CUDA meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                output = self.forward(*args, **kwargs)
            except BaseException:
                with contextlib.suppress(RuntimeError):  # says once more what went wrong
                    graph.capture_end()
                raise
            graph.capture_end()
        log.debug("recorded a CUDA graph for inputs %s", [tuple(tensor.shape) for tensor in inputs])
        return _Recorded(graph, inputs, output)

    def _replay(self, recorded: _Recorded, tensors: list[torch.Tensor]) -> Any:
        for mine, given in zip(recorded.inputs, tensors, strict=True):
            mine.copy_(given)
        recorded.graph.replay()
        self.replays += 1
        return _map_tensors(recorded.output, torch.Tensor.clone)


@contextlib.contextmanager
def _undone_on_failure(pool: _POOL_HANDLE) -> Iterator[None]:
    """Mend what torch 2.11 leaves behind when recording fails: a generator and an allocator that still record."""
    device = torch.cuda.current_device()
    generator = torch.cuda.default_generators[device]
    spare = generator.clone_state()
    try:
        yield
    except BaseException:
        generator.graphsafe_set_state(spare)
        with contextlib.suppress(RuntimeError):  # says that it is not recording, where torch has seen to it
            torch._C._cuda_endAllocateToPool(device, pool)
        raise


def _signature(call: Call) -> tuple[Hashable, list[torch.Tensor]]:
    """(what must be equal for a graph to be reused, the tensors in order); (None, []) if that cannot be told."""
    tensors: list[torch.Tensor] = []

    def describe(tensor: torch.Tensor) -> tuple[Hashable, ...]:
        tensors.append(tensor)
        return (tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)

    described = _map_tensors(call, describe)
    try:
        key = _frozen(described)
        hash(key)
    except TypeError:
        return None, []
    return key, tensors


def _map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor | tuple[Hashable, ...]]) -> Any:
    """``value`` with every tensor in its tuples, lists, dicts and model outputs changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        changed = {key: _map_tensors(item, change) for key, item in value.items()}
        return changed if type(value) is dict else type(value)(**changed)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map_tensors(item, change) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_map_tensors(item, change) for item in value)
    return value


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple(sorted((key, _frozen(item)) for key, item in value.items()))
    if isinstance(value, (tuple, list)):
        return tuple(_frozen(item) for item in value)
    return value


def with_explicit_mask(encoder: PreTrainedModel) -> Callable[..., Any]:
    """The forward of a Qwen3 text encoder with its causal mask made beforehand; any other encoder's as it is.

    Given a [batch, tokens] mask, transformers asks the device whether anything is padded, which no CUDA graph can hold;
    a mask [batch, 1, tokens, tokens] is taken as it is. The embeddings are the same.
    """
    forward: Callable[..., Any] = encoder.forward
    if encoder.config.model_type != "qwen3":
        return forward

    def masked(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if attention_mask is not None and attention_mask.ndim == 2:
            attention_mask = causal_mask(attention_mask)
        return forward(*args, attention_mask=attention_mask, **kwargs)

    return masked


def causal_mask(padding: torch.Tensor) -> torch.Tensor:
    """bool [batch, 1, tokens, tokens] of ``padding`` [batch, tokens] (1: a token): who may look at whom."""
    positions = torch.arange(padding.shape[1], device=padding.device)
    return (positions[None, :] <= positions[:, None]) & padding.bool()[:, None, None, :]
