"""How near a picture is to another one, and whether it shows what was asked for."""

from __future__ import annotations

import functools
import logging
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxrun.errors import one_line

log = logging.getLogger("fluxrun.sweep")

UNREADABLE = (OSError, SyntaxError, ValueError)
"""What Pillow raises for a file that is gone, is no image, or is torn."""

EXTRA = "pip install 'fluxrun[report]'"

SHAPES = "shapes"
"""The bundled model, whose pictures a pixel checker can read."""


@dataclass(frozen=True)
class Distance:
    """From one picture to another. ``psnr_db`` is in decibels, infinite for equal pixels; ``ssim`` is 1 for them."""

    psnr_db: float
    ssim: float


def missing() -> str | None:
    """Why pictures cannot be compared here, or None."""
    import importlib.util

    return None if importlib.util.find_spec("skimage") else f"scikit-image is not installed ({EXTRA})"


def unreadable(path: Path) -> str | None:
    """Why an image file cannot be shown or compared, or None; its pixels are not looked at."""
    from PIL import Image

    try:
        Image.open(path).close()
    except UNREADABLE as error:
        return f"{path}: {getattr(error, 'strerror', None) or one_line(error)}"
    return None


@functools.lru_cache(maxsize=4096)
def distance(first: Path, second: Path) -> Distance | None:
    """The distance between two image files; None when their sizes differ, or one is gone. Needs scikit-image."""
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    a, b = _pixels(first), _pixels(second)
    if a is None or b is None or a.shape != b.shape:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # equal pictures: the division by zero is the answer
        psnr = float(peak_signal_noise_ratio(a, b))
    return Distance(math.inf if math.isinf(psnr) else psnr, float(structural_similarity(a, b, channel_axis=2)))


def shows_prompt(path: Path, prompt: str) -> bool | None:
    """Whether a picture of the shapes world shows all that its prompt asks for.

    None when the prompt is not of that world, or the picture is gone.
    """
    from fluxrun.shapes.captions import parse
    from fluxrun.shapes.checker import score

    if (scene := parse(prompt)) is None or (pixels := _pixels(path)) is None:
        return None
    return bool(score(scene, pixels)["all"])


def _pixels(path: Path) -> Any:
    """RGB values of an image file; None, with a line in the log, where it cannot be read to its end."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except UNREADABLE as error:
        log.info("%s cannot be read: %s", path, one_line(error))
        return None
