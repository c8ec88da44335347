"""What ``fluxrun plan`` says beside its table: memory, the compiler's wait, and what was not asked for."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from helpers import CPU, H100, RTX_4090, composed, plan_on
from rich.console import Console

from fluxrun.cli import plan as show
from fluxrun.compilation.cache_folder import cache_folder, holds_anything
from fluxrun.planning.prepare import prepare

KLEIN = ("model=flux2_klein_4b", "model.weights=random")
DEV = ("model=flux2_dev", "model.weights=random")


@pytest.mark.parametrize(
    ("machine", "overrides", "expected"),
    [
        (RTX_4090, KLEIN, "memory: resident needs about 16.2 of 24.0 GB (else: staged 10.4, balanced 10.4"),
        (RTX_4090, (*KLEIN, "memory.budget_gb=12"), "memory: staged needs about 10.4 of 12.0 GB"),
        (
            H100,
            (*DEV, "memory=balanced"),
            "memory: balanced needs about 63.2 of 80.0 GB, 97 of the computer's 256 (else",
        ),
        (
            RTX_4090,
            (*DEV, "quantization=fp8"),
            # Measured: 28 blocks, 14.6 GB (15.7e9 bytes) a step (benchmarks/results/speed_h200/memory_block_swap.json).
            "memory: block_swap needs at least 9.2 of 24.0 GB, swaps 28 of 56 blocks, 14.6 GB a step, 67 of the",
        ),
        (CPU, KLEIN, "memory: about 19.7 of 8.0 GB, by an estimate"),
        (CPU, (), None),
    ],
)
def test_memory(machine, overrides, expected):
    line = show.memory_line(plan_on(machine, *overrides))
    assert (line is None) if expected is None else str(line).startswith(expected)


def test_the_wait_is_told_before_it_is_paid(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for overrides in (["compile=max_autotune"], ["compile=regional", "+compile.inductor_options={max_autotune: true}"]):
        plan = plan_on(H100, *KLEIN, *overrides)
        assert str(show.waiting_line(plan)).startswith("first image: minutes for the compiler")
        assert any("expect minutes before the first image" in note for note in plan.notes)
    regional = plan_on(H100, *KLEIN, "compile=regional")
    assert show.waiting_line(regional) == f"first image: about 4-19 s for the compiler ({tmp_path} is empty)"
    (tmp_path / "fxgraph").mkdir()
    (tmp_path / "fxgraph" / "ab").touch()
    assert "less if what" in str(show.waiting_line(regional))
    assert not regional.notes
    assert show.waiting_line(plan_on(H100, *KLEIN)) is None
    assert "nothing to compile" in str(show.waiting_line(plan_on(H100, *KLEIN, "compile=cudagraphs")))


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    assert cache_folder(None).name == "inductor"
    assert cache_folder(Path("~/x")) == Path.home() / "x"
    assert not holds_anything(tmp_path)


def test_what_was_not_asked_for():
    line = str(show.also_line(plan_on(H100, *KLEIN)))
    assert "kernels=fused" in line
    assert "quantization=fp8" in line
    assert "regional" in line
    assert "max_autotune" not in line
    streamed = str(show.also_line(plan_on(H100, *DEV, "memory=group")))
    assert "kernels" not in streamed  # they cannot stand beside offloading
    assert "compile" not in streamed
    assert show.also_line(plan_on(CPU)) is None


def test_a_plan_fits_on_the_screen(monkeypatch):
    text = io.StringIO()
    monkeypatch.setattr(show, "out", Console(file=text, width=80))
    show.show_plan(prepare(composed(*KLEIN, "attention=xformers", "compile=regional"), RTX_4090))
    table = [
        line for line in text.getvalue().splitlines() if not line.startswith(("memory:", "first", "usable", "note"))
    ]
    assert max(map(len, table[1:])) <= 80
    assert "proof" not in text.getvalue()
