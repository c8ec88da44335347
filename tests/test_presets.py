"""Presets: each runs here, falling back where it must, and plans on its own machine what its comments say."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from helpers import CONF, H100, RTX_4090, cuda_machine, draw, effective, plan_on

from fluxrun.pipeline.session_pool import SessionPool

PRESETS = sorted(path.stem for path in (CONF / "preset").glob("*.yaml"))
RTX_3060 = cuda_machine("NVIDIA GeForce RTX 3060", 12, (8, 6), free=11.6, ram=64)
RTX_4070 = cuda_machine("NVIDIA GeForce RTX 4070", 12, (8, 9), free=11.6, ram=64)


@pytest.fixture(scope="module")
def bench():
    with SessionPool() as pool:
        yield pool


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_runs_on_this_machine(name, bench, tmp_path):
    record = draw(tmp_path / "run", f"+preset={name}", "device=cpu", pool=bench)
    assert (record.status, len(record.images)) == ("completed", 1)
    assert all(fallback.reason for option in record.options.values() for fallback in option.fallbacks)


@pytest.mark.parametrize("name", PRESETS)
def test_every_line_of_a_preset_says_why(name):
    text = (CONF / "preset" / f"{name}.yaml").read_text()
    lines = [line for line in text.splitlines()[2:] if "override" in line]
    said = re.compile(r"\d.*(ms|GB|dB|times)|reasoned|measured|fits|falls back|no gaps|klein|dev")
    unsaid = [line for line in lines if not said.search(line.partition("#")[2])]
    # A line without a comment of its own shares the next one's figure, and one says so at the top of the file.
    assert not unsaid or "docs/performance.md" in text or all(line.endswith("auto") for line in unsaid)


@pytest.mark.parametrize(
    ("machine", "preset", "model", "expected"),
    [
        (RTX_4090, "rtx4090_24gb", "flux2_klein_4b", {"memory": "resident", "quantization": "fp8", "kernels": "fused"}),
        (RTX_4090, "rtx4090_24gb", "flux2_klein_9b", {"memory": "resident", "quantization": "fp8", "kernels": "fused"}),
        (RTX_4090, "rtx4090_24gb", "flux2_dev", {"memory": "block_swap", "quantization": "fp8", "kernels": "fused"}),
        (H100, "rtx4090_24gb", "flux2_klein_9b", {"memory": "resident"}),
        (RTX_4070, "low_vram_12gb", "flux2_klein_4b", {"memory": "resident", "quantization": "fp8", "vae": "tiled"}),
        (RTX_3060, "low_vram_12gb", "flux2_klein_4b", {"memory": "staged", "quantization": "none", "vae": "tiled"}),
        (RTX_4070, "low_vram_12gb", "flux2_klein_9b", {"memory": "staged", "quantization": "fp8"}),
        (
            RTX_3060,
            "low_vram_12gb",
            "flux2_klein_9b",
            {"memory": "block_swap", "quantization": "none", "kernels": "fused"},
        ),
        (H100, "cpu", "flux2_klein_4b", {"memory": "resident", "compile": "none"}),
    ],
)
def test_what_a_preset_comes_to(machine, preset, model, expected):
    plan = plan_on(machine, f"+preset={preset}", f"model={model}", "model.weights=random")
    assert effective(plan) | expected == effective(plan)
    assert plan.machine.device == ("cpu" if preset == "cpu" else "cuda")


def test_the_fast_preset_keeps_what_graphs_it_can_beside_a_step_cache():
    machine = replace(H100, packages={**H100.packages, "cache-dit": "1.5.3"})
    plan = plan_on(machine, "+preset=h100_fast", "model=flux2_dev", "model.weights=random", "cache=fixed")
    assert effective(plan).items() >= {"compile": "cudagraphs", "cache": "fixed", "kernels": "fused"}.items()
    assert plan.options["compile"].targets == ("vae_decoder", "text_encoder")
