"""Distances between pictures, and whether a picture shows its prompt."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("skimage", reason="the extra 'report'")

from fluxrun.report.fidelity import distance, shows_prompt


def save(path: Path, pixels: np.ndarray) -> Path:
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def test_equal_pictures_have_no_finite_psnr(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3))
    found = distance(save(tmp_path / "a.png", pixels), save(tmp_path / "b.png", pixels))
    assert found is not None
    assert math.isinf(found.psnr_db)
    assert found.ssim == 1


def test_psnr_is_the_textbooks(tmp_path: Path) -> None:
    pixels = np.full((64, 64, 3), 100)
    found = distance(save(tmp_path / "a.png", pixels), save(tmp_path / "b.png", pixels + 5))
    assert found is not None
    assert found.psnr_db == pytest.approx(10 * math.log10(255**2 / 25))


def test_pictures_of_other_sizes_are_not_compared(tmp_path: Path) -> None:
    small, large = save(tmp_path / "a.png", np.zeros((32, 32, 3))), save(tmp_path / "b.png", np.zeros((64, 64, 3)))
    assert distance(small, large) is None


def test_a_drawing_shows_its_caption_and_not_another_one(tmp_path: Path) -> None:
    from fluxrun.shapes.captions import parse
    from fluxrun.shapes.scenes import draw

    prompt = "a red circle left of a blue square"
    scene = parse(prompt)
    assert scene is not None
    path = tmp_path / "drawn.png"
    Image.fromarray(np.asarray(draw(scene))).save(path)
    assert shows_prompt(path, prompt) is True
    assert shows_prompt(path, "a green star above a yellow ring") is False
    assert shows_prompt(path, "a lighthouse at dusk") is None
