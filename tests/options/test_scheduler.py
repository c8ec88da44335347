"""Schedulers: each solves the same equation over Euler's own sigmas, and says what it took."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from helpers import H100, draw, effective, hashes, plan_on

from fluxrun.config.composition import compose
from fluxrun.errors import ConfigError
from fluxrun.options.flow_schedulers import made_like
from fluxrun.pipeline.session_pool import SessionPool

SOLVERS = ("euler", "heun", "dpmpp_2m", "unipc")


def flux(**changed):
    """FLUX.2's own scheduler."""
    return FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, "use_dynamic_shifting": True, **changed})


def end(solver, steps, sigmas=None, shift=None, mu=1.0, base=None):
    """Where an equation with a known slope ends, as the pipelines go through it."""
    scheduler = made_like(base or flux(), solver, sigmas, shift)
    given = sigmas or torch.linspace(1, 1 / steps, steps).tolist()
    flow = scheduler.config.get("use_flow_sigmas")
    count = {"num_inference_steps": steps} if flow else {}
    scheduler.set_timesteps(**count, sigmas=None if flow else given, mu=mu, device="cpu")
    scheduler.set_begin_index(0)
    x = torch.tensor([[0.3, -1.2, 2.0]])
    for t in scheduler.timesteps:
        sigma = t / 1000
        x = scheduler.step(torch.sin(2 * x) + sigma * x, t, x, return_dict=False)[0]
    return x


@pytest.fixture(scope="module")
def exact():
    return end("euler", 20000)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solver_converges_faster_than_euler(solver, exact):
    error = {steps: float((end(solver, steps) - exact).abs().max()) for steps in (32, 64)}
    assert error[64] < error[32] / (2.8 if solver == "heun" else 1.6)
    assert error[64] < (0.05 if solver == "euler" else 0.004)


@pytest.mark.parametrize("solver", SOLVERS)
def test_all_have_eulers_sigmas_and_unrounded_timesteps(solver):
    euler, other = made_like(flux(), "euler", None, None), made_like(flux(), solver, None, None)
    euler.set_timesteps(sigmas=torch.linspace(1, 1 / 7, 7).tolist(), mu=1.3)
    if solver in ("euler", "heun"):
        other.set_timesteps(sigmas=torch.linspace(1, 1 / 7, 7).tolist(), mu=1.3)
    else:
        other.set_timesteps(7, mu=1.3)
    torch.testing.assert_close(other.sigmas.unique(), euler.sigmas.unique(), atol=2e-6, rtol=0)
    torch.testing.assert_close(other.timesteps.unique(), euler.timesteps.unique(), atol=1e-3, rtol=0)
    assert other.timesteps.is_floating_point()
    assert len(other.timesteps) == (13 if solver == "heun" else 7)


@pytest.mark.parametrize("solver", SOLVERS)
def test_given_sigmas_and_a_fixed_shift_reach_every_solver(solver):
    sigmas = [1.0, 0.8, 0.5, 0.3]
    scheduler = made_like(flux(), solver, sigmas, 1.0)
    count = {"num_inference_steps": 4} if scheduler.config.get("use_flow_sigmas") else {"sigmas": sigmas}
    scheduler.set_timesteps(**count, mu=2.0)
    torch.testing.assert_close(scheduler.sigmas.unique().flip(0), torch.tensor([*sigmas, 0.0]), atol=2e-6, rtol=0)


def test_a_model_with_a_fixed_shift_keeps_it():
    fixed = flux(use_dynamic_shifting=False)
    euler = made_like(fixed, "euler", None, None)
    euler.set_timesteps(sigmas=[1.0, 0.5], mu=None)
    heun = made_like(fixed, "heun", None, None)
    heun.set_timesteps(sigmas=[1.0, 0.5], mu=9.0)
    torch.testing.assert_close(heun.sigmas.unique(), euler.sigmas.unique())


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("deis", "does not converge"),
        ("lcm", "distilled"),
        ("ddim", "noise"),
        ("dpmpp_2m_sde", "fresh noise"),
        ("euller", "did you mean 'euler'"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_reason(name, why):
    with pytest.raises(ConfigError, match=why):
        compose([f"scheduler={name}"])


@pytest.mark.parametrize("text", ["[0.5,1]", "[1,1]", "[1.2,1]", "[1,0]", "[]", "[1,nan]"])
def test_sigmas_that_do_not_fall_are_refused(text):
    with pytest.raises(ConfigError, match=r"scheduler\.sigmas"):
        compose([f"scheduler.sigmas={text}"])


def test_sigmas_are_the_steps():
    assert plan_on(H100, "scheduler.sigmas=[1,0.7,0.4]").steps == 3
    assert plan_on(H100, "scheduler.sigmas=[1,0.7,0.4]", "steps=3").steps == 3
    with pytest.raises(ConfigError, match=r"steps=4: scheduler.sigmas has 3 values"):
        plan_on(H100, "scheduler.sigmas=[1,0.7,0.4]", "steps=4")


def test_a_step_cache_gives_way_to_two_calls_a_step():
    machine = H100.__class__(**{**vars(H100), "packages": {**H100.packages, "cache-dit": "1.5.3"}})
    plan = plan_on(machine, "scheduler=heun", "cache=fixed", "steps=20")
    assert (effective(plan)["scheduler"], effective(plan)["cache"]) == ("heun", "none")


# --- pictures -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench() -> Iterator[SessionPool]:
    with SessionPool() as pool:
        yield pool


def test_pictures_calls_and_sigmas(bench: SessionPool, tmp_path: Path) -> None:
    found = {}
    for name in SOLVERS:
        record = draw(tmp_path / name, f"scheduler={name}", "steps=3", pool=bench)
        found[name] = hashes(record)[0]
        facts = record.options["scheduler"].facts
        assert facts["transformer_calls"] == len(record.timings.step_s[0]) == (5 if name == "heun" else 3)
        assert len(facts["sigmas"]) == 4
        assert not record.options["scheduler"].fallbacks
    assert len(set(found.values())) == 4
    given = draw(tmp_path / "given", "scheduler.sigmas=[1,0.6,0.2]", "scheduler.shift=1", "steps=3", pool=bench)
    assert given.options["scheduler"].facts["sigmas"] == [1.0, 0.6, 0.2, 0.0]
    assert bench.loads == ["first load"]
