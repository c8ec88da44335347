"""What a sweeper is told about a job: from the rows that the sweep knows, with no record read again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fluxrun.config.schema import SweepConfig
from fluxrun.record.schema import Chosen, ImageRecord, RunRecord, Timings
from fluxrun.report.comparison import worst_psnr
from fluxrun.report.rows import Picture, Row
from fluxrun.sweep.objective import WORTHLESS_S, objective

pytest.importorskip("skimage", reason="the extra 'report'")

NEUTRAL, NEAR, FAR = 100, 101, 180
"""Grey pictures: the baseline's, one next to it, one far from it."""


def picture(folder: Path, grey: int) -> Picture:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    path = folder / "images" / "0.png"
    Image.fromarray(np.full((16, 16, 3), grey, np.uint8)).save(path)
    return Picture(path=f"{folder.name}/images/0.png", prompt="p", seed=0, sha256="x")


def row(root: Path, job: str, grey: int, attention: str = "math", status: str = "completed") -> Row:
    options = {"attention": Chosen(requested=attention, effective=attention)}
    images = [picture(root / job, grey)]
    return Row(job=job, folder=job, status=status, options=options, image_s=1.5, steps=2, size=[16, 16], images=images)


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    """A baseline and three jobs, of which there is no run.json: whatever read one would not find it."""
    failed = row(tmp_path, "2", NEAR, status="failed")
    return [row(tmp_path, "baseline", NEUTRAL, "sdpa"), row(tmp_path, "0", NEAR), row(tmp_path, "1", FAR), failed]


def test_seconds_where_the_pictures_are_near_enough(rows: list[Row], tmp_path: Path) -> None:
    bound = SweepConfig(min_psnr=30)
    _, near, far, failed = rows
    assert objective(near, rows, tmp_path, bound) == 1.5
    assert WORTHLESS_S < objective(far, rows, tmp_path, bound) < WORTHLESS_S + 30
    assert objective(failed, rows, tmp_path, bound) == 2 * WORTHLESS_S
    assert objective(far, rows, tmp_path, SweepConfig()) == 1.5, "no bound: seconds alone"
    assert objective(near, rows[1:], tmp_path, bound) == 2 * WORTHLESS_S, "nothing to compare with"


def test_measuring_leaves_the_row_as_it_was(rows: list[Row], tmp_path: Path) -> None:
    before = rows[1].model_dump()
    assert worst_psnr(rows[1], rows, tmp_path) == pytest.approx(48.13, abs=0.01)  # 20 log10(255)
    assert rows[1].model_dump() == before


def test_an_earlier_run_can_be_the_baseline(rows: list[Row], tmp_path: Path) -> None:
    folder = tmp_path / "earlier"
    image = picture(folder, NEUTRAL)
    images = [
        ImageRecord(**image.model_dump(include={"prompt", "seed", "sha256"}), path="images/0.png", width=16, height=16)
    ]
    record = RunRecord(
        run_id="x", started_at="", status="completed", config={}, config_hash="x", images=images,
        timings=Timings(step_s=[[1, 1]], denoise_s=[2], decode_s=[1]),
    )  # fmt: skip
    (folder / "run.json").write_text(record.model_dump_json())
    config = SweepConfig(min_psnr=30, baseline=str(folder))
    assert objective(rows[1], rows[1:], tmp_path, config) == 1.5
    assert objective(rows[2], rows[1:], tmp_path, config) > WORTHLESS_S
