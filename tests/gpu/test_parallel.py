"""One picture by two GPUs: nearly the picture of one, with every kernel that goes together with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fluxrun
from fluxrun.record.folder import read_record
from fluxrun.record.schema import RunRecord

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]

TESTS = Path(__file__).resolve().parents[1]
KLEIN = ["model=flux2_klein_4b", "model.weights=random", "memory=resident", "steps=2", "height=512", "width=512"]
SHAPES = ["model=shapes", "seed=1"]
JOBS = {
    "ulysses": [*KLEIN, "parallel=ulysses"],
    "ulysses fused": [*KLEIN, "kernels=fused", "compile=cudagraphs", "parallel=ulysses"],
    "ulysses fp8": [*KLEIN, "+preset=h100_fast", "parallel=ulysses"],
    "tensor": [*KLEIN, "parallel=tensor"],
    "ring": [*SHAPES, "parallel=ring"],
}

LARGEST = {"ulysses fp8": 10}
"""Grey levels: float8 attention scales by what a GPU holds, and random weights make much of it (5.9 on two H200s)."""


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[RunRecord, Path]]:
    """All jobs drawn by the two processes of one torchrun."""
    folders = {name: tmp_path_factory.mktemp("parallel") / name.replace(" ", "_") for name in JOBS}
    given = json.dumps([(str(folders[name]), overrides) for name, overrides in JOBS.items()])
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*words, "--local-addr=127.0.0.1", "-m", "drawn_together", given],
        capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "PYTHONPATH": path, "NCCL_NVLS_ENABLE": "0"},
    )  # fmt: skip
    print(done.stderr[-4000:])
    return {name: (read_record(folder), folder) for name, folder in folders.items() if (folder / "run.json").exists()}


def pixels(folder: Path) -> np.ndarray:
    [file] = folder.glob("images/*.png")
    return np.asarray(Image.open(file).convert("RGB"), dtype=float)


@pytest.mark.parametrize("name", JOBS)
def test_two_gpus_draw_nearly_the_picture_of_one(
    name: str, records: dict[str, tuple[RunRecord, Path]], tmp_path: Path
) -> None:
    record, folder = records[name]
    alone = [word for word in JOBS[name] if not word.startswith("parallel=")]
    fluxrun.run(fluxrun.compose([*alone, "device=cuda:0"]), tmp_path / "one")
    difference = np.abs(pixels(folder) - pixels(tmp_path / "one")).mean()
    print(name, {g: (o.effective, o.fallbacks, o.facts) for g, o in record.options.items() if g != "model"})
    print(name, "mean difference in grey levels", difference, record.memory.by_rank_bytes)
    assert record.status == "completed"
    assert record.options["parallel"].effective == name.split(maxsplit=1)[0]
    assert record.options["parallel"].facts["backend"] == "nccl"
    if "f" in name:
        assert record.options["kernels"].effective == "fused"
        assert record.options["attention"].effective == ("fp8" if "fp8" in name else "sdpa")
    assert difference < LARGEST.get(name, 4)
