"""The pictures that a run is given: read, or refused in one line."""

from __future__ import annotations

import pytest
from PIL import Image

from fluxrun.config.composition import compose
from fluxrun.config.inputs import read_inputs
from fluxrun.errors import ConfigError


def test_reference_images(tmp_path):
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    Image.new("RGBA", (32, 16)).save(good)
    bad.write_bytes(b"not an image")
    read = read_inputs(compose([f"reference_images=[{good},{good}]"]))
    assert [(each.key, each.picture.mode, each.picture.size) for each in read] == [
        ("reference_images", "RGB", (32, 16))
    ] * 2
    half = tmp_path / "half.png"
    half.write_bytes(good.read_bytes()[:40])
    for path, problem in ((bad, "cannot be read as an image"), (half, "cannot be read"), (tmp_path, "no plain file")):
        with pytest.raises(ConfigError, match=problem):
            read_inputs(compose([f"reference_images=[{path}]"]))
