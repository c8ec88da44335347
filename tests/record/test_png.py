"""PNG files of our own making: Pillow reads the same pixels and texts, whatever compressed them."""

from __future__ import annotations

import builtins
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fluxrun.record import png
from fluxrun.record.picture import pixel_hash, read_metadata, save_image

TEXTS = {"fluxrun": '{"prompt": "ein Leuchtturm – 灯台"}'}


def photograph(height: int, width: int) -> Image.Image:
    """Smooth light with noise on it, as photographs have."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    light = np.stack([np.sin(3 * x + y), np.cos(2 * y), np.sin(x * y * 5)], axis=-1) * 100 + 128
    return Image.fromarray((light + random.normal(0, 3, light.shape)).clip(0, 255).astype(np.uint8))


def without_isal(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where it is not installed."""
    real = builtins.__import__

    def refusing(name: str, *arguments, **how):
        if name.partition(".")[0] == "isal":
            raise ImportError(name)
        return real(name, *arguments, **how)

    monkeypatch.setattr(builtins, "__import__", refusing)


@pytest.fixture(params=["isal", "zlib"])
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each encoder in turn."""
    if request.param == "isal":
        pytest.importorskip("isal", reason="the extra 'fast-png'")
    else:
        without_isal(monkeypatch)
    png.encoder.cache_clear()
    yield request.param
    png.encoder.cache_clear()


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (48, 112), (257, 131)])
def test_pillow_reads_the_same_pixels_and_texts(tmp_path: Path, name: str, size: tuple[int, int]) -> None:
    image, file = photograph(*size), tmp_path / "image.png"
    file.write_bytes(b"".join(png.encode(image, TEXTS)))
    assert png.encoder().name == name
    with Image.open(file) as found:
        found.verify()  # checksums
    with Image.open(file) as found:
        assert (found.format, found.mode, found.size) == ("PNG", "RGB", image.size)
        assert found.tobytes() == image.tobytes()
        assert found.text == TEXTS


@pytest.mark.parametrize("pixels", [np.zeros((9, 5, 3)), np.full((9, 5, 3), 255), np.arange(135).reshape(9, 5, 3)])
def test_differences_wrap_around(name: str, tmp_path: Path, pixels: np.ndarray) -> None:
    pixels = pixels.astype(np.uint8)
    pixels[::2] = 255 - pixels[::2]
    (tmp_path / "image.png").write_bytes(b"".join(png.encode(Image.fromarray(pixels), {})))
    with Image.open(tmp_path / "image.png") as found:
        assert np.array_equal(np.asarray(found), pixels)


def test_a_saved_picture_carries_its_config_and_is_no_larger_than_pillows(name: str, tmp_path: Path) -> None:
    metadata = {"config": {"prompt": "灯台"}, "seed": 3}
    image, file, pillows = photograph(512, 512), tmp_path / "image.png", tmp_path / "pillow.png"
    assert save_image(image, file, metadata, "png") == name
    assert read_metadata(file) == metadata
    image.save(pillows, compress_level=1)
    assert file.stat().st_size < 1.1 * pillows.stat().st_size
    assert save_image(image, tmp_path / "image.jpg", metadata, "jpeg") == "pillow"


def test_other_modes_are_saved_as_the_rgb_that_is_hashed(name: str, tmp_path: Path) -> None:
    image = photograph(16, 16).convert("L")
    save_image(image, tmp_path / "image.png", {}, "png")
    with Image.open(tmp_path / "image.png") as found:
        assert pixel_hash(found) == pixel_hash(image)


def test_the_text_chunk_is_the_one_that_pillow_writes(name: str, tmp_path: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    image, info = photograph(4, 4), PngInfo()
    info.add_itxt("fluxrun", TEXTS["fluxrun"])
    image.save(tmp_path / "pillow.png", pnginfo=info)
    chunk = next(part for part in png.encode(image, TEXTS) if part.startswith(b"fluxrun"))
    whole = b"iTXt" + chunk + zlib.crc32(b"iTXt" + chunk).to_bytes(4)
    assert whole in (tmp_path / "pillow.png").read_bytes()
