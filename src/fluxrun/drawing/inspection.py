"""Looks at every picture's values on the device: whether they are numbers, and whether there is anything to see."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image

NEARLY_CONSTANT = 0.02
"""Pixels in [-1, 1] that lie closer together than this are looked at byte by byte: two bytes are 0.016 apart."""


@dataclass(frozen=True)
class Finding:
    """What one picture's values are."""

    finite: bool
    constant: bool
    stage: str = ""
    """Where values that are no numbers came first: text_encode (embeddings), denoise (latents), decode (pixels)."""


SOUND = Finding(finite=True, constant=False)


class Inspection:
    """Rides along one pipeline call: one reduction of the latents, one of the pixels.

    Both are read after the pixels have come to the CPU, so that nothing waits for them.
    """

    def __init__(self) -> None:
        self._latents: torch.Tensor | None = None
        self._extremes: torch.Tensor | None = None

    def step(self, values: dict[str, Any]) -> None:
        """A step's latents; the last ones are looked at."""
        self._latents = values.get("latents")

    @contextmanager
    def of(self, pipeline: Any) -> Iterator[None]:
        """Around the call: the image processor is handed what the decoder made, whichever decoder that was."""
        processor = pipeline.image_processor
        own, original = vars(processor).get("postprocess"), processor.postprocess

        def look(image: Any, *arguments: Any, **options: Any) -> Any:
            # On its way before the pixels are: when these have come it has, too, and is not waited for again.
            self._extremes = extremes(self._latents, image).to("cpu", non_blocking=True)
            return original(image, *arguments, **options)

        processor.postprocess = look
        try:
            yield
        finally:
            del processor.postprocess
            if own is not None:
                processor.postprocess = own

    def findings(self, images: Sequence[Image], embeddings: Sequence[torch.Tensor]) -> list[Finding]:
        """One for each picture; ``embeddings`` (a row a picture) are only looked at where a picture is not finite."""
        if self._extremes is None:  # a pipeline that makes its pictures in another way
            return [SOUND] * len(images)
        rows = self._extremes.tolist()
        return [self._finding(number, row, images[number], embeddings) for number, row in enumerate(rows)]

    def _finding(self, number: int, row: list[float], image: Image, embeddings: Sequence[torch.Tensor]) -> Finding:
        latents, pixels = row[:2], row[2:]
        channels = len(pixels) // 2
        if not all(map(math.isfinite, row)):
            encoded = all(bool(torch.isfinite(part[number]).all()) for part in embeddings)
            stage = "text_encode" if not encoded else "decode" if all(map(math.isfinite, latents)) else "denoise"
            return Finding(finite=False, constant=_one_colour(image), stage=stage)
        low, high = ([min(1.0, max(-1.0, v)) for v in part] for part in (pixels[:channels], pixels[channels:]))
        near = all(b - a < NEARLY_CONSTANT for a, b in zip(low, high, strict=True))
        return Finding(finite=True, constant=near and _one_colour(image))


def extremes(latents: torch.Tensor | None, image: torch.Tensor) -> torch.Tensor:
    """[pictures, 2 + 2 * channels]: the latents' least and largest value, then the channels'; NaN where there is one.

    ``image``: [pictures, channels, height, width]; ``latents``: [pictures, …], of the last step. Three kernels and a
    copy, however large the picture.
    """
    if image.device.type == "mps":  # which has no aminmax; its memory is the CPU's
        latents, image = None if latents is None else latents.cpu(), image.cpu()
    pictures = image.shape[0]
    of_latents = image.new_zeros(pictures, 1, 1) if latents is None else latents.reshape(pictures, 1, -1)
    found = [torch.aminmax(values, dim=2) for values in (of_latents, image.flatten(2))]
    return torch.cat([part for both in found for part in both], dim=1)


def _one_colour(image: Image) -> bool:
    return all(low == high for low, high in image.convert("RGB").getextrema())  # type: ignore[misc]
