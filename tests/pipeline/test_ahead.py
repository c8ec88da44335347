"""Kernels are compiled on a thread, in a rehearsal; what fails there is kept, and nothing is drawn at random."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import CPU, H100, SMALL, composed

from fluxrun.kernels.ahead import launch, rehearsal
from fluxrun.pipeline.ahead import KernelsAhead, begin
from fluxrun.planning.prepare import prepare
from fluxrun.weights.skeletons import component_config, skeleton


class Kernel:
    """Stands in for a Triton kernel: says how it was called."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return lambda *args, **kwargs: ("launched", grid, args, kwargs)

    def warmup(self, *args: Any, grid: tuple[int, ...], **kwargs: Any) -> Any:
        return ("compiled", grid, args, kwargs)


@pytest.fixture
def triton(monkeypatch) -> SimpleNamespace:
    """A Triton whose compiler does nothing."""
    found = SimpleNamespace(executors=[])

    @contextmanager
    def compile_mode(executor: Any) -> Iterator[None]:
        found.executors.append(executor)
        yield

    found.AsyncCompileMode = compile_mode
    monkeypatch.setitem(sys.modules, "triton", found)
    return found


def test_a_kernel_is_launched_and_in_a_rehearsal_only_compiled():
    assert launch(Kernel(), (2, 3))(1, SIZE=4) == ("launched", (2, 3), (1,), {"SIZE": 4})
    with rehearsal():
        assert launch(Kernel(), (2,))(1, SIZE=4) == ("compiled", (2,), (1,), {"SIZE": 4})
    assert launch(Kernel(), (2,))()[0] == "launched"


def test_parts_are_rehearsed_on_a_thread_of_their_own(triton):
    found = []
    ahead = KernelsAhead([lambda: found.append((threading.current_thread(), launch(Kernel(), (1,))()[0]))], "cpu")
    ahead.wait()
    assert [(thread is threading.main_thread(), how) for thread, how in found] == [(False, "compiled")]
    assert ahead.failed is None
    assert len(triton.executors) == 1


def test_other_work_is_done_beside_it_for_real(triton):
    found = []
    ahead = KernelsAhead([], "cpu", beside=[lambda: found.append(launch(Kernel(), (1,))()[0])])
    ahead.wait()
    assert (found, ahead.failed) == (["launched"], None)


@pytest.mark.parametrize("parts", [([lambda: 1 / 0], []), ([], [lambda: 1 / 0])])
def test_what_fails_there_is_kept(parts, triton):
    ahead = KernelsAhead(parts[0], "cpu", beside=parts[1])
    ahead.wait()
    assert ahead.failed is not None
    assert "division by zero" in ahead.failed


def test_a_compiled_kernel_comes_back_ready_to_run(triton):
    asked = []

    class Compiled:
        run = property(lambda self: asked.append("launcher and code"))

    def part() -> None:
        triton.executors[0].submit(Compiled).result()

    ahead = KernelsAhead([part], "cpu")
    ahead.wait()
    assert (ahead.failed, asked) == (None, ["launcher and code"])


KLEIN = ("model=flux2_klein_4b", "model.weights=random")


def test_nothing_is_begun_where_nothing_of_ours_is_launched():
    for machine, overrides in (
        (CPU, (*SMALL, "kernels.compile_ahead=true")),
        (H100, (*KLEIN, "kernels=diffusers", "kernels.compile_ahead=true", "vae=full")),
        (H100, (*KLEIN, "+preset=h100_fast", "kernels.compile_ahead=false")),
    ):
        prepared = prepare(composed(*overrides), machine)
        assert begin(prepared.plan, prepared.located) is None


@pytest.mark.parametrize("name", ["transformer", "vae"])
def test_a_skeleton_has_the_models_shapes_and_draws_no_random_numbers(name):
    prepared = prepare(composed(*SMALL), CPU)
    before = torch.get_rng_state()
    module = skeleton(prepared.plan.model, prepared.located, name, torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), before)
    assert module is not None
    assert {(parameter.device.type, parameter.dtype) for parameter in module.parameters()} == {("meta", torch.bfloat16)}
    config = component_config(prepared.plan.model, prepared.located, name)
    assert config is not None
    assert {key: module.config[key] for key in config if not key.startswith("_")}.keys() <= module.config.keys()


def test_of_a_model_that_is_not_downloaded_there_is_none():
    prepared = prepare(composed(*SMALL), CPU)
    located = SimpleNamespace(folder=None, kind="hub")
    assert component_config(prepared.plan.model, located, "vae") is None
