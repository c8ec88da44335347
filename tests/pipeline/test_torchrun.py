"""Pictures that two processes draw together on a CPU (gloo), and what becomes of a run that loses one of them.

``drawn_together.py`` says what of diffusers is put aside for it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import SMALL, draw
from PIL import Image

from fluxrun.config.composition import compose
from fluxrun.errors import FluxrunError
from fluxrun.pipeline.torchrun import draw_in_ranks
from fluxrun.record.folder import read_record

PROGRAM = "drawn_together"
TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def findable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes import the program from the tests' folder."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")])))


def pixels(folder: Path) -> np.ndarray:
    [file] = folder.glob("images/*.png")
    return np.asarray(Image.open(file).convert("RGB"), dtype=int)


def draw_together(jobs: list[tuple[Path, list[str]]]) -> None:
    """Each job done by the same two processes of one torchrun, as a user starts it."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    given = json.dumps([(str(folder), overrides) for folder, overrides in jobs])
    done = subprocess.run(
        [*words, "--local-addr=127.0.0.1", "-m", PROGRAM, given],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_two_processes_draw_the_picture_of_one(tmp_path: Path) -> None:
    engines = ("ulysses", "tensor")
    jobs = [(tmp_path / engine, [*SMALL, f"parallel={engine}"]) for engine in engines]
    failing = (tmp_path / "failing", [*SMALL, "parallel=ulysses", "vae=fast", "seed=4242"])
    shapes = (tmp_path / "shapes", ["model=shapes", "height=64", "width=64", "steps=1", "parallel=ulysses"])
    fused, meshes = (tmp_path / "fused.json", ["fused"]), (tmp_path / "meshes.json", ["meshes"])
    draw_together([*jobs, failing, shapes, fused, meshes])
    draw(tmp_path / "one")
    *records, fallen_back, of_shapes = (read_record(folder) for folder, _ in [*jobs, failing, shapes])
    for engine, record in zip(engines, records, strict=True):
        parallel = record.options["parallel"]
        assert (record.status, parallel.effective, parallel.fallbacks) == ("completed", engine, [])
        shares = {"ulysses": (24, 1), "tensor": (48, 1)}[engine]
        assert parallel.facts == {
            "engine": engine, "degree": 2, "backend": "gloo", "tokens_per_rank": shares[0], "heads_per_rank": shares[1],
        }  # fmt: skip
        assert len(record.memory.by_rank_bytes) == 2
        assert np.abs(pixels(tmp_path / engine) - pixels(tmp_path / "one")).max() <= 1
        files = {path.name for path in (tmp_path / engine).iterdir()}
        assert files == {"run.json", "images", "fluxrun.rank1.log"}
    # The decoder of the second process failed once, see drawn_together.py: both fell back, and drew.
    [fallback] = fallen_back.options["vae"].fallbacks
    assert (fallback.option, fallback.stage, fallback.reason) == ("fast", "first_call", "rank 1: out of luck")
    assert (fallen_back.status, fallen_back.options["parallel"].effective) == ("completed", "ulysses")
    # The fused blocks' own exchange, for a batch of one and of two.
    assert max(json.loads(fused[0].read_text())) < 1e-5
    # A ring after ulysses, in the same processes.
    assert json.loads(meshes[0].read_text()) == [[1, 2], [2, 1], [1, 2]]
    # Three heads: two processes cannot share them.
    assert (of_shapes.status, of_shapes.options["parallel"].effective) == ("completed", "single")


@pytest.mark.slow
def test_a_killed_process_ends_the_run_and_the_record_says_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / "run"

    def kill() -> None:
        """Once the picture is being drawn."""
        while not (folder / "fluxrun.rank1.log").exists():
            time.sleep(0.1)
        time.sleep(3)
        [beat] = tmp_path.glob("fluxrun-ranks-*/rank1.json")
        os.kill(json.loads(beat.read_text())["pid"], signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    config = compose([*SMALL, "steps=1000", "parallel=ulysses", "parallel.degree=2"])
    with pytest.raises(FluxrunError, match=r"^rank 1 was killed$"):
        draw_in_ranks(config, folder, 2, ["fluxrun", "parallel=ulysses"], program=PROGRAM)
    record = read_record(folder)
    assert record.status == "failed"
    assert record.error is not None
    assert record.error.message == "rank 1 was killed"
    assert record.command == ["fluxrun", "parallel=ulysses"]
    assert "model=tiny" in capfd.readouterr().err  # the first process spoke where we do
    assert not list(tmp_path.glob("fluxrun-ranks-*"))
