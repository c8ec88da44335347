"""A folder is one run's, from before anything is written there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fluxrun.errors import ConfigError
from fluxrun.record.writing import RECORD

LOCK = ".lock"

USED = "{} already holds a run: choose another hydra.run.dir, remove it, or go on with it by resume=FOLDER"


@contextmanager
def claimed(folder: Path, *, again: bool = False) -> Iterator[None]:
    """Keep a folder for one run of this process, from before anything is written there: log, config, record.

    However the process ends, the system lets go of it. Raises ConfigError when it is kept by another, or holds a run
    and is not to be used ``again``.
    """
    from filelock import FileLock, Timeout  # 25 ms, which `fluxrun plan` has no use for

    if not again:
        refuse_used(folder)
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(f"another run is being drawn into {folder}: choose another hydra.run.dir") from error
    except OSError as error:
        raise cannot_write(folder, error) from error
    try:
        if not again:
            refuse_used(folder)  # by one that has ended since
        yield
    finally:
        with suppress(OSError):  # who comes next finds run.json
            (folder / LOCK).unlink(missing_ok=True)
        lock.release()


def refuse_used(folder: Path) -> None:
    """Raise ConfigError when a folder holds a run."""
    if os.path.exists(folder / RECORD):  # not path.exists(), which raises for a name that is too long
        raise ConfigError(USED.format(folder))


def cannot_write(folder: Path, error: OSError) -> ConfigError:
    """The refusal of a folder that cannot be written."""
    return ConfigError(f"cannot write to the output folder {folder}: {error.strerror or error}")
