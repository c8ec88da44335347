"""Reference pictures of runs that share one pipeline."""

from __future__ import annotations

from pathlib import Path

from helpers import draw, hashes
from PIL import Image

from fluxrun.pipeline.session_pool import SessionPool


def test_a_later_run_has_its_own_references(tmp_path: Path) -> None:
    for colour in ("red", "blue"):
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{colour}.png")
    pool = SessionPool()
    red, blue = (draw(tmp_path / c, f"reference_images=[{tmp_path / c}.png]", pool=pool) for c in ("red", "blue"))
    pool.close()
    alone = draw(tmp_path / "alone", f"reference_images=[{tmp_path}/blue.png]")
    assert hashes(red) != hashes(blue) == hashes(alone)
