"""images.jsonl: a run's images, a line each, appended when an image is on the disk: its cost does not grow."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from fluxrun.atomic import write_atomically
from fluxrun.errors import ConfigError
from fluxrun.reading import Unreadable, decoded, first_problem, read_bytes
from fluxrun.record.schema import Call, ImageLine, RunRecord, Timings

JOURNAL: Final = "images.jsonl"

IN_LINES = ("step_s", "denoise_s", "decode_s", "save_s", "text_encode_s")
"""The lists of a record's timings that grow with every image: they are in the lines, as the images are."""


def append(folder: Path, line: ImageLine) -> None:
    """Add a line to a run's images.jsonl, whole or not at all. Raises OSError."""
    text = _text(line).encode()
    with (folder / JOURNAL).open("ab", buffering=0) as file:
        before = os.fstat(file.fileno()).st_size
        try:
            if file.write(text) < len(text):  # the last of the room: a write stops short before it fails
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / JOURNAL))
        except OSError:
            file.truncate(before)
            raise


def rewrite(folder: Path, record: RunRecord) -> None:
    """Replace a run's images.jsonl by what its record holds, in one step."""
    write_atomically(folder / JOURNAL, "".join(map(_text, lines_of(record))))


def _text(line: ImageLine) -> str:
    return line.model_dump_json() + "\n"


def lines_of(record: RunRecord) -> list[ImageLine]:
    """A record's images and times as lines: a call and a text each, and the last one has what is left over."""
    timings, images = record.timings, record.images
    calls, encoded, saved = calls_of(timings), timings.text_encode_s, [*timings.save_s, *(0.0 for _ in images)]
    last = len(images) - 1
    return [
        ImageLine(
            **image.model_dump(),
            save_s=saved[n],
            calls=calls[n:] if n == last else calls[n : n + 1],
            text_encode_s=encoded[n:] if n == last else encoded[n : n + 1],
        )
        for n, image in enumerate(images)
    ]


def calls_of(timings: Timings, first: int = 0) -> list[Call]:
    """The pipeline's calls from the one with that number on."""
    until = len(timings.decode_s)  # the list that is appended to last, maybe by another thread right now
    times = zip(
        timings.step_s[first:until], timings.denoise_s[first:until], timings.decode_s[first:until], strict=False
    )
    return [Call(step_s=steps, denoise_s=denoise, decode_s=decode) for steps, denoise, decode in times]


def read_lines(path: Path) -> list[ImageLine]:
    """The lines of an images.jsonl; what a kill has left of its last one is no line.

    Raises FileNotFoundError, or ConfigError in one line.
    """
    try:
        text = decoded(_whole_lines(read_bytes(path)))
    except FileNotFoundError:
        raise
    except Unreadable as error:
        raise ConfigError(f"{path} {error}") from error
    lines = []
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            lines.append(ImageLine.model_validate_json(line))
        except ValidationError as error:
            raise ConfigError(f"{path} line {number} is no image of fluxrun's: {first_problem(error)}") from error
    return lines


def _whole_lines(data: bytes) -> bytes:
    return data[: data.rfind(b"\n") + 1]


def add_lines(record: RunRecord, lines: Sequence[ImageLine]) -> None:
    """Fill in a record's images and times; images in the order in which they were asked for."""
    for line in lines:
        record.timings.add(line)
    record.images += [line.image() for line in lines]
    put_in_order(record)
    record.images_saved = len(record.images)


def put_in_order(record: RunRecord) -> None:
    """Sort a record's images by what asked for them: those of a run that went on were saved in another order."""
    if all(image.identity for image in record.images):
        record.images.sort(key=lambda image: image.identity or ())


def without_lines(record: RunRecord) -> RunRecord:
    """The record without what its images.jsonl holds."""
    timings = record.timings.model_copy(update={name: [] for name in IN_LINES})
    return record.model_copy(update={"images": [], "timings": timings, "images_file": JOURNAL})
