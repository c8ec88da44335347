"""Block swap's two streams, on a model of a GPU: nothing is read before it is there or overwritten while it is read.

On a real GPU a missing wait shows now and then, as a wrong picture, if it shows at all. The model does everything at
once on the CPU, and keeps vector clocks: a stream's clock says how much of each stream's work is over before its next
work begins. An event captures the clock of the stream it is recorded on; who waits for it takes that over. A race is

- a read of memory whose last write is not over by the reader's clock,
- a write into memory that was written or read by work which is not over by the writer's clock; memory fresh from the
  allocator was just written by the main stream, which may have had it for something else,
- a write on a stream that the allocator has not been told of: freed, the memory would be used again too early.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fluxrun.offload import block_sizes as swap_sizes
from fluxrun.offload import block_swap
from fluxrun.offload.block_swap import BlockSwap

DEVICE = SimpleNamespace(type="cuda")
"""Enough of a device for a ``BlockSwap``, whose memory comes from the model."""
TRIALS = 300

EARLY = "read before it has arrived"
IN_USE = "written while in use"
UNTOLD = "written on a stream the allocator does not know of"

Moment = tuple[str, int]
"""A piece of work: its stream, and its number there."""


@dataclass(eq=False)
class Stream:
    """A queue of work."""

    name: str
    left_out: str | None = None
    """A call that has no effect, as if it were missing in the source."""
    clock: Counter[str] = field(default_factory=Counter)

    def work(self) -> Moment:
        self.clock[self.name] += 1
        return self.name, self.clock[self.name]

    def is_after(self, moment: Moment) -> bool:
        name, number = moment
        return self.clock[name] >= number

    def wait_event(self, event: Event) -> None:
        if self.left_out != "wait_event":
            self.clock |= event.clock

    def wait_stream(self, stream: Stream) -> None:
        if self.left_out != "wait_stream":
            self.clock |= stream.clock


class Event:
    """What was over when it was last recorded: nothing, if it never was."""

    def __init__(self) -> None:
        self.clock: Counter[str] = Counter()

    def record(self, stream: Stream) -> None:
        if stream.left_out != "record":
            self.clock = stream.clock.copy()


@dataclass
class Memory:
    """Who touched a piece of memory."""

    written: Moment
    read: list[Moment] = field(default_factory=list)
    told: set[str] = field(default_factory=lambda: {"main"})
    """Streams whose work the allocator waits for before it uses the memory again."""


class Gpu:
    """A main stream, one for copies, and the races between them. ``left_out``: a stream and its call without effect."""

    def __init__(self, left_out: tuple[str, str] = ("", "")) -> None:
        streams = (Stream(name, left_out[1] if left_out[0] == name else None) for name in ("main", "copies"))
        self.main, self.copies = streams
        self.current = self.main
        self.races: set[str] = set()
        self._memory: dict[int, Memory] = {}

    @contextmanager
    def instead_of_cuda(self) -> Iterator[None]:
        """What a ``BlockSwap`` does on ``DEVICE`` is done here."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "Stream", lambda device: self.copies)
            patch.setattr(torch.cuda, "Event", Event)
            patch.setattr(torch.cuda, "stream", self.on)
            patch.setattr(torch.cuda, "current_stream", lambda device: self.current)
            patch.setattr(torch.cuda, "empty_cache", lambda: None)
            patch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: self.tell(stream, tensor))
            patch.setattr(block_swap, "allocate", lambda size, device: self.allocate(size))
            patch.setattr(block_swap, "copy_all", self.copy)
            patch.setattr(swap_sizes, "LARGE_BYTES", 1)
            yield

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def memory(self, tensor: torch.Tensor) -> Memory:
        return self._memory[tensor.untyped_storage().data_ptr()]

    def allocate(self, size: int) -> torch.Tensor:
        tensor = torch.empty(size, dtype=torch.uint8)
        self._memory[tensor.data_ptr()] = Memory(self.main.work())
        return tensor

    def tell(self, stream: Stream, tensor: torch.Tensor) -> None:
        """The allocator, that ``stream`` uses a tensor."""
        if stream.left_out != "record_stream":
            self.memory(tensor).told.add(stream.name)

    def copy(self, originals: Sequence[torch.Tensor], copies: Sequence[torch.Tensor]) -> None:
        for original, copy in zip(originals, copies, strict=True):
            copy.copy_(original)
            self._write(self.memory(copy))

    def _write(self, memory: Memory) -> None:
        if not all(map(self.current.is_after, [memory.written, *memory.read])):
            self.races.add(IN_USE)
        if self.current.name not in memory.told:
            self.races.add(UNTOLD)
        memory.written, memory.read = self.current.work(), []

    def read(self, tensor: torch.Tensor) -> None:
        memory = self.memory(tensor)
        if not self.current.is_after(memory.written):
            self.races.add(EARLY)
        memory.read.append(self.current.work())


class Reader(nn.Module):
    """A block that reads its weights, which are its number."""

    def __init__(self, gpu: Gpu, number: int) -> None:
        super().__init__()
        self.gpu, self.number = gpu, number
        self.weight = nn.Parameter(torch.full((4,), float(number)), requires_grad=False)

    def forward(self) -> None:
        self.gpu.read(self.weight)
        assert (self.weight == self.number).all(), "another block's weights"


def swap_of(gpu: Gpu, total: int, *, cyclic: bool) -> tuple[list[nn.Module], BlockSwap]:
    module = nn.ModuleList(Reader(gpu, number) for number in range(total))
    return list(module), BlockSwap(module, list(module), DEVICE, Counter(), cyclic=cyclic)


def races(seed: int, left_out: tuple[str, str] = ("", "")) -> set[str]:
    """Those of onloading and offloading a few blocks twice; they are called in order or in any."""
    random, gpu = Random(seed), Gpu(left_out)
    total = random.randint(1, 9)
    with gpu.instead_of_cuda():
        blocks, swap = swap_of(gpu, total, cyclic=random.random() < 0.7)
        for _ in range(2):
            swap.onload(random.randint(0, total))
            for _ in range(random.randint(1, 4)):
                for block in blocks if random.random() < 0.4 else random.choices(blocks, k=2 * total):
                    block()
            swap.offload()
    return gpu.races


def test_no_races():
    assert {seed: found for seed in range(TRIALS) if (found := races(seed))} == {}


@pytest.mark.parametrize(
    ("stream", "call", "race"),
    [
        pytest.param("main", "wait_event", EARLY, id="a block does not wait for its weights"),
        pytest.param("copies", "record", EARLY, id="a copy does not say that it is over"),
        pytest.param("copies", "wait_event", IN_USE, id="a copy does not wait for the block before it"),
        pytest.param("main", "record", IN_USE, id="a block does not say that it is over"),
        pytest.param("copies", "wait_stream", IN_USE, id="the first copies do not wait for who had the memory"),
        pytest.param("copies", "record_stream", UNTOLD, id="the allocator is not told"),
    ],
)
def test_the_model_notices_what_is_missing(stream, call, race):
    assert race in set().union(*(races(seed, (stream, call)) for seed in range(TRIALS // 10)))


def test_a_block_computes_while_the_next_one_arrives():
    """Waiting for more than a block's own weights would be no race, but the copies' time would show.

    An even number: of an odd one, the first and the last block share a buffer.
    """
    gpu = Gpu()
    with gpu.instead_of_cuda():
        blocks, swap = swap_of(gpu, 6, cyclic=True)
        swap.onload(6)
        for block in [*blocks, *blocks]:
            block()
            assert not any(gpu.main.is_after(gpu.memory(buffer.memory).written) for buffer in swap.buffers)
