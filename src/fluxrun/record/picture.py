"""Picture files: written whole or not at all, each with the config that drew it, and read back."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxrun.errors import ConfigError
from fluxrun.pictures import open_picture
from fluxrun.reading import Unreadable, parse_json
from fluxrun.record import png
from fluxrun.types import JsonObject

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger("fluxrun.record")

METADATA_KEY = "fluxrun"

EXIF_IMAGE_DESCRIPTION = 0x010E

MOST_EXIF_BYTES = 65_000
"""A JPEG segment holds 65533 bytes."""


def save_image(image: Image, path: Path, metadata: JsonObject, output_format: str) -> str:
    """Write the file with ``metadata`` as JSON: a PNG text chunk, or EXIF for JPEG and WebP. Atomic.

    Returns what compressed it: isal, zlib, or Pillow.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        compressed_by = _write(image, temporary, metadata, output_format, path.name)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return compressed_by


def _write(image: Image, file: Path, metadata: JsonObject, output_format: str, name: str) -> str:
    if output_format == "png":
        texts = {METADATA_KEY: json.dumps(metadata, ensure_ascii=False)}
        with file.open("wb") as opened:
            opened.writelines(png.encode(_rgb(image), texts))
        return png.encoder().name
    exif = _exif(image, metadata)
    if output_format == "jpeg" and len(exif.tobytes()) > MOST_EXIF_BYTES:
        log.warning("%s: its config is too long for this format, only run.json has it", name)
        exif = _exif(image, {key: metadata[key] for key in ("run_id", "seed") if key in metadata})
    options: dict[str, Any] = {"quality": 95} if output_format == "jpeg" else {"lossless": True}
    image.save(file, format=output_format.upper(), exif=exif, **options)
    return "pillow"


def _exif(image: Image, metadata: JsonObject) -> Any:
    exif = image.getexif()
    # EXIF text is ASCII: other characters travel as JSON escapes.
    exif[EXIF_IMAGE_DESCRIPTION] = json.dumps({METADATA_KEY: metadata})
    return exif


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata fluxrun wrote into an image. Raises ConfigError if there is none or it cannot be read."""
    try:
        with open_picture(path) as image:
            text = image.info.get(METADATA_KEY)
            described = image.getexif().get(EXIF_IMAGE_DESCRIPTION)
    except (FileNotFoundError, Unreadable) as error:
        raise ConfigError(f"{path} {error}") from error
    metadata = _parsed(text) if text else _described(described)
    if not isinstance(metadata, dict) or not isinstance(metadata.get("config"), dict):
        raise ConfigError(f"{path} carries no fluxrun metadata: only images that fluxrun saved can be run again")
    return metadata


def _described(text: Any) -> Any:
    data = _parsed(text)
    return data.get(METADATA_KEY) if isinstance(data, dict) else None


def _parsed(text: Any) -> Any:
    """The JSON in a picture's text, or None: there may be anything in it."""
    try:
        return parse_json(text) if isinstance(text, str) else None
    except Unreadable:
        return None


def pixel_hash(image: Image) -> str:
    """SHA-256 of the picture's RGB bytes, row by row."""
    return hashlib.sha256(_rgb(image).tobytes()).hexdigest()


def _rgb(image: Image) -> Image:
    """The picture in 3 x 8 bits; itself if it is, as ``convert`` would copy it."""
    return image if image.mode == "RGB" else image.convert("RGB")
