"""Every option on a real GPU, on the tiny model: it works, or its record says why it fell back."""

from __future__ import annotations

from pathlib import Path

import pytest
from loras import write_lora

import fluxrun
from fluxrun.config.catalog import Catalog
from fluxrun.record.schema import RunRecord

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

OPTIONS = [(g, n) for g, names in Catalog().groups().items() if g != "model" for n in names]
TINY = ["model=tiny", "device=cuda", "steps=2", "measure.repeats=2", "height=128", "width=128"]


def draw(folder: Path, *overrides: str) -> RunRecord:
    """A run of the tiny model on the GPU."""
    record = fluxrun.run(fluxrun.compose([*TINY, *overrides]), folder)
    print(overrides, {g: (o.effective, o.fallbacks, o.facts) for g, o in record.options.items() if g != "model"})
    return record


@pytest.mark.parametrize(("group", "name"), OPTIONS)
def test_every_option_works_or_says_why_not(group: str, name: str, tmp_path: Path) -> None:
    extra = ["batch_size=2", "num_images=2"] if name == "sliced" else ["vae.tile_size=64"] if name == "tiled" else []
    record = draw(tmp_path / "run", f"{group}={name}", *extra)
    option = record.options[group]
    assert record.status == "completed"
    assert option.effective == name or option.fallbacks or name == "auto"
    assert all(fallback.reason for fallback in option.fallbacks)


@pytest.mark.parametrize("memory", ["staged", "balanced", "group", "sequential"])
@pytest.mark.parametrize("pipeline", ["klein", "dev"])
def test_memory_options_draw_the_same_picture(memory: str, pipeline: str, tmp_path: Path) -> None:
    resident = draw(tmp_path / "a", f"model.pipeline={pipeline}", "memory=resident")
    other = draw(tmp_path / "b", f"model.pipeline={pipeline}", f"memory={memory}")
    assert other.options["memory"].effective == memory
    assert other.images[0].sha256 == resident.images[0].sha256


@pytest.mark.parametrize("memory", ["staged", "balanced", "group", "sequential"])
def test_lora_files_draw_the_same_picture_wherever_the_weights_are(memory: str, tmp_path: Path) -> None:
    lora = ["lora=adapters", f"lora.files=[{{path: {write_lora(tmp_path / 'lora.safetensors')}}}]"]
    resident, other = (draw(tmp_path / name, *lora, f"memory={name}") for name in ("resident", memory))
    assert (other.options["memory"].effective, other.options["lora"].effective) == (memory, "adapters")
    assert other.images[0].sha256 == resident.images[0].sha256


def test_a_run_begins_with_its_weights_and_works_above_them(tmp_path: Path) -> None:
    before = torch.cuda.memory_allocated()  # workspaces that the libraries keep from earlier tests
    record = draw(tmp_path / "run", "memory=resident")
    memory, weights = record.memory, record.options["memory"].facts["resident_bytes"]
    assert memory.start_bytes is not None
    assert weights <= memory.start_bytes < memory.peak_allocated_bytes
    assert memory.start_bytes < before + weights + 64 * 2**20, "allocated in whole blocks, and buffers"
    missing = {name for name in ("gpu", "gpu_memory_bytes", "driver", "cuda") if not record.environment[name]}
    assert missing == set()


def test_regional_compile_runs_compiled_with_offloading(tmp_path: Path) -> None:
    record = draw(tmp_path / "run", "compile=regional", "memory=balanced")
    assert record.options["compile"].facts["graph_calls"] > 0


def test_decoder_compiles_with_channels_last(tmp_path: Path) -> None:
    record = draw(
        tmp_path / "run", "compile=regional", "compile.targets=[transformer,vae_decoder]", "vae.channels_last=true"
    )
    assert record.options["vae"].facts["channels_last"] == "applied"
    assert record.options["compile"].facts["regions"]["vae_decoder"] == 1
