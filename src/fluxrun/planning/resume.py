"""``resume=FOLDER``: which of a run's images are there already, and whether the command is still the same."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxrun.config.prompts import Job, jobs_of
from fluxrun.config.schema import RunConfig
from fluxrun.errors import ConfigError
from fluxrun.formatting import shorten
from fluxrun.record import asked
from fluxrun.record.folder import read_record
from fluxrun.record.schema import ImageRecord, RunRecord
from fluxrun.record.writing import plain


@dataclass(frozen=True)
class Earlier:
    """What an earlier command has left in a run's folder."""

    record: RunRecord
    """Its record, with the images that are whole."""
    done: frozenset[int]
    """Which images of the run these are, by their ``Job.index``."""
    lost: int
    """How many images it names whose files are gone, of another size or not finite: they are drawn again."""

    @property
    def complete(self) -> bool:
        """Whether nothing is left to draw."""
        return len(self.done) == self.record.images_asked


def earlier_run(config: RunConfig, folder: Path) -> Earlier:
    """What an earlier command with this config has drawn in ``folder``; nothing is changed there.

    Raises ConfigError in one line where it was another config, or another line of the prompts file.
    """
    if not os.path.exists(folder / "run.json") and os.path.exists(folder / "sweep.json"):
        raise ConfigError(f"resume={folder} is a sweep's folder: --multirun sweep.resume={folder} goes on with it")
    record, jobs = read_record(folder), jobs_of(config)
    _check_config(record.config, plain(config.source), folder)
    _check_lines(asked.read(folder), jobs, config, folder)
    known = _known(record.images, jobs, config, folder)
    if record.images_asked not in (None, len(jobs)):
        raise ConfigError(
            f"resume={folder}: its run was to have {record.images_asked} image(s), and this command asks for "
            f"{len(jobs)}; give the same prompts again, or leave resume out"
        )
    done = {job.index: image for job, image in known if image.finite and _is_whole(folder / image.path, image)}
    record.images, record.images_asked = [done[index] for index in sorted(done)], len(jobs)
    return Earlier(record, frozenset(done), len(known) - len(done))


def _check_config(was: Any, now: Any, folder: Path) -> None:
    if (found := _difference(was, now)) is not None:
        key, old, new = found
        raise ConfigError(
            f"resume={folder}: {key} is {_shown(new)} now and was {_shown(old)} when the run began; give the same "
            "command again, or leave resume out"
        )


_NOTHING = object()


def _difference(was: Any, now: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The first key whose values differ, with both."""
    if not isinstance(was, dict) or not isinstance(now, dict):
        return None if was == now else (key, was, now)
    for name in dict.fromkeys([*now, *was]):
        within = f"{key}.{name}" if key else name
        if found := _difference(was.get(name, _NOTHING), now.get(name, _NOTHING), within):
            return found
    return None


def _shown(value: Any) -> str:
    return "not there" if value is _NOTHING else "null" if value is None else shorten(str(value), 60)


def _check_lines(was: list[asked.AskedLine] | None, jobs: Sequence[Job], config: RunConfig, folder: Path) -> None:
    """Refuse a prompts file of which a line is new, gone or another one."""
    if was is None:
        return
    old, new = ({line.line: line for line in lines} for lines in (was, asked.lines_of(jobs)))
    for line in sorted(old.keys() | new.keys()):
        if old.get(line) != new.get(line):
            raise _changed(config, folder, line, old.get(line), new.get(line))


def _known(
    images: Sequence[ImageRecord], jobs: Sequence[Job], config: RunConfig, folder: Path
) -> list[tuple[Job, ImageRecord]]:
    """The images of a record with what asks for them now; a record of version 1 has them in the jobs' order."""
    by_identity = {(job.line, job.number): job for job in jobs}
    found = []
    for place, image in enumerate(images):
        job = by_identity.get(image.identity or (0, 0)) if image.identity else jobs[place : place + 1][0]
        line = image.line or place + 1
        if job is None or (job.prompt, job.seed) != (image.prompt, image.seed):
            raise _changed(config, folder, line, _text(image), None if job is None else _text(job))
        found.append((job, image))
    return found


def _text(one: Job | ImageRecord) -> str:
    return str(asked.AskedLine(line=0, prompt=one.prompt, seed=one.seed))


def _changed(config: RunConfig, folder: Path, line: int, old: object, new: object) -> ConfigError:
    what = f"prompts_file={config.prompts_file} line" if config.prompts_file else "prompt"
    return ConfigError(
        f"resume={folder}: {what} {line} is {new or 'gone'} now, and was {old or 'not there'} when the run began; put "
        "it back, or leave resume out"
    )


def _is_whole(path: Path, image: ImageRecord) -> bool:
    """Whether an image's file is there, and as long as it was when it was written."""
    try:
        size = path.stat().st_size
    except OSError:
        return False
    return size == image.file_bytes if image.file_bytes else size > 0
