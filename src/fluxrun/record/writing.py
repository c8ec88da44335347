"""run.json as text: short while a run draws and where it has many images, whole where it has few."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic_core import PydanticSerializationError

from fluxrun.atomic import Reserve, write_atomically
from fluxrun.formatting import utf8
from fluxrun.record import journal
from fluxrun.record.schema import ImageLine, RecordModel, RunRecord

RECORD = "run.json"

MOST_LISTED = 100
"""Of more images than these an ended run's run.json has no list, either: they stay in images.jsonl."""


def json_text(record: RecordModel) -> str:
    """A record as JSON. What is no UTF-8 (a link that leads to such a path) is written as ``\\udcff``."""
    try:
        return record.model_dump_json(indent=1)
    except PydanticSerializationError:
        return type(record).model_validate(plain(record.model_dump())).model_dump_json(indent=1)


def short_text(record: RunRecord) -> str:
    """A record as JSON without what its images.jsonl holds."""
    return json_text(journal.without_lines(record))


def write_last(folder: Path, record: RunRecord, reserve: Reserve, unwritten: list[ImageLine]) -> None:
    """The record as it stays. On a full disk the reserve makes room for it; in any case it is not needed any more.

    ``unwritten``: images that are not in images.jsonl. Where there is no room for a list in run.json, they go there.
    """
    record.schema_version = 2
    in_lines = record.images_file is not None  # not in the record of an earlier version
    stays = in_lines and len(record.images) > MOST_LISTED
    write = _write_short if stays else _write_whole
    try:
        write(folder, record, unwritten)
    except OSError:
        reserve.give_up()
        try:
            write(folder, record, unwritten)
        except OSError:
            if stays or not in_lines:
                raise
            _write_short(folder, record, unwritten)
    finally:
        reserve.give_up()


def _write_whole(folder: Path, record: RunRecord, _: list[ImageLine]) -> None:
    """A few images are listed where people look for them, in run.json, and nowhere else."""
    record.images_file = None
    write_atomically(folder / RECORD, json_text(record))
    with suppress(OSError):
        (folder / journal.JOURNAL).unlink(missing_ok=True)


def _write_short(folder: Path, record: RunRecord, unwritten: list[ImageLine]) -> None:
    record.images_file = journal.JOURNAL
    while unwritten:
        journal.append(folder, unwritten[0])
        unwritten.pop(0)
    write_atomically(folder / RECORD, short_text(record))


def plain(value: Any) -> Any:
    """A value as JSON can hold it: paths and other objects as text (in UTF-8), tuples as lists."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (int, float, bool)) or value is None:
        return value
    return utf8(str(value))
