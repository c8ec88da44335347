"""Memory on a real GPU: the budget is real and is lifted again, offloading draws the same, fp8 goes along."""

from __future__ import annotations

from pathlib import Path

import pytest

import fluxrun
from fluxrun.errors import FluxrunError
from fluxrun.formatting import GIB
from fluxrun.hardware.detection import detect
from fluxrun.offload import block_sizes as swap_sizes
from fluxrun.pipeline.session_pool import SessionPool
from fluxrun.record.schema import RunRecord

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

SHAPES = ["model=shapes", "model.dtype=bfloat16", "device=cuda", "vae=full", "prompt=[a red circle, a blue square]"]
KLEIN = ["model=flux2_klein_4b", "model.weights=random", "device=cuda", "steps=2"]


def draw(folder: Path, *overrides: str, pool: SessionPool | None = None) -> RunRecord:
    record = fluxrun.run(fluxrun.compose(list(overrides)), folder, pool=pool)
    memory = record.options["memory"]
    print(overrides, memory.effective, memory.facts, record.memory, record.timings.steady_step_s)
    return record


def pixels(record: RunRecord) -> list[str]:
    return [image.sha256 for image in record.images]


def test_a_budget_is_real_and_is_lifted_again(tmp_path: Path) -> None:
    assert torch.cuda.get_per_process_memory_fraction(0) == 1.0
    record = draw(tmp_path / "a", *KLEIN, "memory.budget_gb=12")
    assert record.options["memory"].effective == "staged"
    assert record.options["memory"].facts["allocator_limit_bytes"] <= 12 * GIB
    assert record.memory.peak_allocated_bytes < 12 * GIB
    assert torch.cuda.get_per_process_memory_fraction(0) == 1.0
    with pytest.raises(FluxrunError, match="out of memory"):
        draw(tmp_path / "b", *KLEIN, "memory=resident", "memory.budget_gb=12")
    assert torch.cuda.get_per_process_memory_fraction(0) == 1.0


@pytest.mark.parametrize("overrides", [[], ["quantization=fp8"]], ids=["bf16", "fp8"])
@pytest.mark.parametrize("memory", ["balanced", "group", "staged"])
def test_the_same_picture(memory: str, overrides: list[str], tmp_path: Path) -> None:
    resident = draw(tmp_path / "a", *SHAPES, *overrides, "memory=resident")
    other = draw(tmp_path / "b", *SHAPES, *overrides, f"memory={memory}")
    for record in (resident, other):
        assert record.options["quantization"].fallbacks == []
    assert (other.options["memory"].effective, other.options["memory"].fallbacks) == (memory, [])
    assert pixels(other) == pixels(resident)


@pytest.mark.parametrize("overrides", [[], ["kernels=fused"], ["quantization=fp8", "kernels=fused"]], ids=" ".join)
@pytest.mark.parametrize("count", [3, 5, 99])
def test_swapped_blocks_draw_the_same(
    overrides: list[str], count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swap_sizes, "LARGE_BYTES", 2**16)  # the weights of a small model are small
    resident = draw(tmp_path / "a", *SHAPES, *overrides, "memory=resident")
    swapped = draw(tmp_path / "b", *SHAPES, *overrides, "memory=block_swap", f"memory.blocks_to_swap={count}")
    facts = swapped.options["memory"].facts
    assert (swapped.options["memory"].fallbacks, swapped.options["kernels"].fallbacks) == ([], [])
    assert facts["blocks_swapped"] == min(count, facts["blocks"])
    assert pixels(swapped) == pixels(resident)


@pytest.mark.parametrize("budget", [8, 10])
def test_as_many_blocks_stay_as_the_budget_allows(budget: int, tmp_path: Path) -> None:
    """klein-4B at real size: the same picture within a budget, with real copies that real matmuls have to wait for."""
    resident = draw(tmp_path / "a", *KLEIN, "kernels=fused", "memory=resident", "num_images=2")
    swapped = draw(
        tmp_path / "b", *KLEIN, "kernels=fused", "memory=block_swap", f"memory.budget_gb={budget}", "num_images=2"
    )
    facts = swapped.options["memory"].facts
    assert pixels(swapped) == pixels(resident)
    assert swapped.memory.peak_allocated_bytes < budget * GIB
    assert 0 < facts["blocks_swapped"] < facts["blocks"]
    assert swapped.options["kernels"].fallbacks == []


def test_blocks_stream_too(tmp_path: Path) -> None:
    resident = draw(tmp_path / "a", *SHAPES, "memory=resident")
    other = draw(tmp_path / "b", *SHAPES, "memory=group", "memory.group_level=block")
    assert pixels(other) == pixels(resident)


def test_a_step_cache_beside_balanced_memory_and_compile(tmp_path: Path) -> None:
    pytest.importorskip("cache_dit")
    cached = [*SHAPES, "cache=fixed", "compile=regional", "strict=true"]
    resident = draw(tmp_path / "a", *cached, "memory=resident")
    other = draw(tmp_path / "b", *cached, "memory=balanced")
    assert pixels(other) == pixels(resident)
    assert other.options["compile"].facts["graph_breaks"] == 0


def test_large_weights_are_pinned_where_they_lie(tmp_path: Path) -> None:
    record = draw(tmp_path / "a", *KLEIN, "memory=balanced", "prompt=[a, b]")
    facts = record.options["memory"].facts
    assert facts["pinned_bytes"] > 10 * 2**30
    assert "not_pinned_bytes" not in facts
    assert facts["components_moved"] == 4
    # The allocator held one of the two components at a time.
    assert record.memory.peak_allocated_bytes < 12 * GIB


def test_a_later_job_plans_as_the_first_one_did(tmp_path: Path) -> None:
    """Its own process's weights are not memory that is gone."""
    with SessionPool() as bench:
        first = draw(tmp_path / "a", *KLEIN, pool=bench)
        free = detect().gpus[0].free_bytes
        second = draw(tmp_path / "b", *KLEIN, "seed=1", "attention=math", pool=bench)
        assert bench.loads == ["first load"]
    assert first.options["memory"].effective == second.options["memory"].effective
    assert free > torch.cuda.get_device_properties(0).total_memory - 4 * GIB
