"""The pictures that a run is given, read from their files: references, a picture to edit and its mask."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fluxrun.config.schema import RunConfig
from fluxrun.errors import ConfigError
from fluxrun.formatting import shorten
from fluxrun.paths import expanded
from fluxrun.pictures import open_picture
from fluxrun.reading import Unreadable

if TYPE_CHECKING:
    from PIL.Image import Image

REFERENCES, IMAGE, MASK = "reference_images", "image", "mask_image"


@dataclass(frozen=True)
class InputPicture:
    """One picture as its file holds it, RGB, and the config key that names the file."""

    key: str
    path: Path
    picture: Image


def read_inputs(config: RunConfig) -> list[InputPicture]:
    """Every picture that the config names; raises ConfigError in one line for one that cannot be read."""
    named = [(REFERENCES, path) for path in config.reference_images]
    named += [(key, path) for key, path in ((IMAGE, config.image), (MASK, config.mask_image)) if path is not None]
    return [InputPicture(key, path, _read(key, path)) for key, path in named]


def _read(key: str, path: Path) -> Image:
    try:
        with open_picture(expanded(path)) as picture:
            return picture.convert("RGB")
    except FileNotFoundError as error:
        raise ConfigError(f"{key}: {path}: no such file") from error
    except Unreadable as error:
        raise ConfigError(f"{key}: {shorten(path)} {error}") from error
