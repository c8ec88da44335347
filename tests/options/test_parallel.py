"""``parallel``: what a plan makes of it on machines that are not here, and what does not go with it. No torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers import CPU, H100, T4, effective, plan_on

from fluxrun.errors import OptionUnavailable
from fluxrun.hardware.machine import Machine, Place
from fluxrun.planning.plan import Plan

KLEIN = ("model=flux2_klein_4b", "model.weights=random")
EDITING_KV = ("model.pipeline=klein_kv",)


def several(machine: Machine, count: int = 2, **packages: str) -> Machine:
    """The same computer with more such GPUs."""
    return replace(machine, gpus=machine.gpus * count, packages={**machine.packages, **packages})


TWO = several(H100)


def reason(plan: Plan, group: str = "parallel") -> str:
    return plan.choices[group].fallbacks[0].reason


@pytest.mark.parametrize("engine", ["ulysses", "ring", "tensor"])
def test_every_gpu_there_is_draws_along(engine: str) -> None:
    plan = plan_on(several(H100, 4), *KLEIN, f"parallel={engine}")
    assert (effective(plan)["parallel"], plan.ranks) == (engine, 4)


def test_one_gpu_draws_alone_if_nothing_is_said() -> None:
    assert plan_on(TWO, *KLEIN).ranks == 1


@pytest.mark.parametrize(
    ("machine", "overrides", "why"),
    [
        (CPU, (), "needs a CUDA GPU; this run is on cpu"),
        (H100, (), "needs 2 GPUs, this machine has 1"),
        (TWO, ("parallel.degree=4",), "needs 4 GPUs, this machine has 2"),
        (TWO, ("device=cuda:1",), "device=cuda:1 is one GPU"),
        (TWO, ("height=1040", "width=1008"), "4095 image tokens cannot be shared by 2 GPUs"),
        (TWO, ("model.max_sequence_length=333",), "333 text tokens cannot be shared by 2 GPUs"),
        (several(H100, 5), (), "24 attention heads cannot be shared by 5 GPUs"),
        (replace(TWO, place=Place(1, 1, 2)), ("parallel.degree=3",), r"degree=3, and torchrun has started 2 process"),
        (several(H100, xformers="0.0.35"), ("attention=xformers",), "no way to share out this attention kernel"),
        (TWO, ("attention=flex",), "no way to share out this attention kernel"),
        (TWO, ("memory=balanced",), "weights that are moved"),
        (TWO, (*EDITING_KV,), "klein_kv keeps keys and values"),
    ],
)
def test_where_it_cannot_be_one_gpu_draws(machine: Machine, overrides: tuple[str, ...], why: str) -> None:
    plan = plan_on(machine, *KLEIN, "parallel=ulysses", *overrides)
    assert (effective(plan)["parallel"], plan.ranks) == ("single", 1)
    assert why in reason(plan)


def test_strict_refuses_instead() -> None:
    with pytest.raises(OptionUnavailable, match="parallel=ulysses: needs a CUDA GPU"):
        plan_on(CPU, *KLEIN, "parallel=ulysses", "strict=true")


def test_the_heads_of_a_folder_are_known_before_it_is_loaded() -> None:
    """The bundled model has three: two GPUs cannot share them, and in a ring they need not."""
    plan = plan_on(TWO, "model=shapes", "parallel=ulysses")
    assert "3 attention heads cannot be shared by 2 GPUs" in reason(plan)
    assert effective(plan_on(TWO, "model=shapes", "parallel=ring"))["parallel"] == "ring"
    assert plan_on(several(H100, 3), "model=shapes", "parallel=ulysses", "model.max_sequence_length=48").ranks == 1


def test_a_ring_needs_a_kernel_that_returns_what_it_summed_up() -> None:
    plan = plan_on(TWO, *KLEIN, "parallel=ring")
    assert effective(plan)["attention"] == "cudnn"
    assert "log-sum-exp" in reason(plan, "attention")
    assert "compute capability 8.0" in reason(plan_on(several(T4), "model=tiny", "parallel=ring"))
    assert "needs a CUDA GPU" in reason(plan_on(CPU, "model=tiny", "parallel=ring"))


def test_float8_attention_goes_with_ulysses_and_gives_way_in_a_ring() -> None:
    machine = several(H100, **{"nvidia-cudnn-frontend": "1.15.0"})
    found = {
        engine: effective(plan_on(machine, *KLEIN, "+preset=h100_fast", f"parallel={engine}"))
        for engine in ("ulysses", "ring")
    }
    assert [found[engine]["attention"] for engine in found] == ["fp8", "cudnn"]
    assert {(one["quantization"], one["kernels"]) for one in found.values()} == {("fp8", "fused")}
    assert [found[engine]["parallel"] for engine in found] == ["ulysses", "ring"]


@pytest.mark.parametrize("overrides", [("quantization=fp8",), ("lora=adapters", "lora.files=[a.safetensors]")])
def test_tensor_parallel_takes_plain_weights(overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluxrun.planning.prepare.find_adapters", lambda option: ())
    machine = several(H100, peft="0.18.0")
    assert effective(plan_on(machine, *KLEIN, "parallel=tensor", *overrides))["parallel"] == "single"
    assert effective(plan_on(machine, *KLEIN, "parallel=ulysses", *overrides))["parallel"] == "ulysses"


def test_the_fused_kernels_give_way_to_shares_of_the_weights() -> None:
    found = effective(plan_on(TWO, *KLEIN, "+preset=h100_lossless", "parallel=tensor"))
    assert (found["kernels"], found["parallel"]) == ("diffusers", "tensor")


def test_a_step_cache_that_decides_by_the_picture_gives_way() -> None:
    machine = several(H100, **{"cache-dit": "1.5.3"})
    found = {
        name: effective(plan_on(machine, *KLEIN, "steps=30", f"cache={name}", "parallel=ulysses"))
        for name in ("dbcache", "fixed")
    }
    assert [found[name]["cache"] for name in found] == ["none", "fixed"]
    assert {one["parallel"] for one in found.values()} == {"ulysses"}


def test_shares_of_the_weights_take_less_memory() -> None:
    dev = ("model=flux2_dev", "model.weights=random")
    need = {name: plan_on(TWO, *dev, f"parallel={name}").workload.needs for name in ("ulysses", "tensor")}
    whole, shared = (found["staged"].bytes / 2**30 for found in need.values() if found)
    assert 25 < whole - shared < 35


def test_each_of_torchruns_processes_has_a_gpu_of_its_own() -> None:
    plan = plan_on(replace(TWO, place=Place(1, 1, 2)), *KLEIN, "parallel=ulysses")
    assert (plan.machine.device, plan.ranks) == ("cuda:1", 2)
