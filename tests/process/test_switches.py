"""Process-wide switches on a computer with two GPUs, which is made up: torch's functions are replaced."""

from __future__ import annotations

import contextlib

import pytest
import torch
from helpers import small

from fluxrun.pipeline.session import Session
from fluxrun.pipeline.weights_loader import WeightsLoader
from fluxrun.planning.prepare import prepare
from fluxrun.process.switches import ProcessState, snapshot


class TwoGpus:
    """What torch.cuda keeps of two GPUs; setting a share leaves its GPU the current one, as in torch."""

    def __init__(self) -> None:
        self.initialized = False
        self.current = 0
        self.shares = [1.0, 1.0]

    def set_device(self, number: int) -> None:
        self.initialized, self.current = True, number

    def current_device(self) -> int:
        assert self.initialized, "asking initialises CUDA"
        return self.current

    def _maybe_exchange_device(self, number: int) -> int:
        assert self.initialized
        before, self.current = self.current, number
        return before

    def set_per_process_memory_fraction(self, share: float, number: int) -> None:
        self.shares[number], self.current = share, number

    def get_per_process_memory_fraction(self, number: int) -> float:
        assert self.initialized
        return self.shares[number]

    def is_initialized(self) -> bool:
        return self.initialized

    def device_count(self) -> int:
        return 2

    @contextlib.contextmanager
    def device(self, number: int):
        before, self.current = self.current, number
        yield
        self.current = before


@pytest.fixture
def gpus(monkeypatch) -> TwoGpus:
    made = TwoGpus()
    for name in (name for name in dir(TwoGpus) if not name.startswith("__")):
        monkeypatch.setattr(torch.cuda, name, getattr(made, name))
    return made


def test_a_gpu_chosen_by_number_is_the_current_one_until_the_session_ends(gpus, monkeypatch):
    prepared = prepare(small())
    prepared.plan.machine = prepared.plan.machine.on("cuda:1")
    seen: list[int] = []

    def load(*_: object):
        seen.append(gpus.current)
        raise InterruptedError

    monkeypatch.setattr(WeightsLoader, "load", load)
    with Session(prepared.plan, located=prepared.located) as session, pytest.raises(InterruptedError):
        session.assemble()
    assert (seen, gpus.current) == ([1], 0)


@pytest.mark.parametrize("device", ["cpu", "mps", "cuda"])
def test_a_device_without_a_number_leaves_the_current_gpu(gpus, device):
    with ProcessState() as state:
        state.use_device(device)
    assert not gpus.initialized


@pytest.mark.parametrize("before", [0, 1])
def test_the_gpu_that_was_current_is_so_again(gpus, before):
    gpus.set_device(before)
    switches = snapshot()
    with ProcessState() as state:
        state.use_device(f"cuda:{1 - before}")
        assert gpus.current == 1 - before
    assert snapshot() == switches
    assert gpus.current == before


@pytest.mark.parametrize("used", [False, True])
def test_a_share_put_back_does_not_change_the_current_gpu(gpus, used):
    if used:
        gpus.set_device(0)
    with ProcessState():
        gpus.set_device(0)
        torch.cuda.set_per_process_memory_fraction(0.5, 1)
        gpus.set_device(0)
    assert (gpus.shares, gpus.current) == ([1.0, 1.0], 0)
