"""Pictures between ComfyUI (float tensors, [batch, height, width, channels], 0 to 1) and files."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fluxrun.errors import ConfigError


def png_files(images: Any) -> Iterator[bytes]:
    """Each picture of a batch as a PNG file; transparency is left out."""
    if images.ndim != 4 or images.shape[-1] < 3:
        raise ConfigError(f"a reference picture must be [batch, height, width, 3], got {list(images.shape)}")
    for image in images[..., :3]:
        pixels = image.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8).cpu().numpy()
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG", compress_level=1)
        yield file.getvalue()


def as_batch(paths: Sequence[Path]) -> Any:
    """The pictures of a run, which all have one size."""
    return torch.stack([_as_tensor(path) for path in paths])


def _as_tensor(path: Path) -> Any:
    with Image.open(path) as picture:
        return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255)
