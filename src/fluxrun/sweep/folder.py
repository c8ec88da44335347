"""A sweep's folder when it is used again: completed jobs stay, unfinished ones are set aside and run anew."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from fluxrun.errors import ConfigError
from fluxrun.record.folder import read_record
from fluxrun.record.schema import RunRecord
from fluxrun.report.rows import BASELINE, is_baseline, run_folders

EARLIER = "earlier"
"""Where unfinished attempts are kept."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a sweep folder for this process; the system lets go of it however the process ends.

    Raises ConfigError when another sweep is running in it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _acquired(folder)
    except OSError as error:
        raise ConfigError(f"cannot write to the output folder {folder}: {error.strerror}") from error
    with lock:
        yield


def _acquired(folder: Path) -> AbstractContextManager[object]:
    from filelock import FileLock, Timeout  # 25 ms, which `fluxrun plan` has no use for

    try:
        return FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(f"another sweep is running in {folder}: wait for it, or choose another folder") from error


def baseline_folder(folder: Path) -> Path:
    """Where the next such baseline goes."""
    names = [BASELINE, *(f"{BASELINE}-{number}" for number in range(2, len(list(folder.iterdir())) + 3))]
    return next(folder / name for name in names if not (folder / name).exists())


def arrange(folder: Path, hashes: Sequence[str]) -> dict[str, Path]:
    """Make a used sweep folder ready for jobs with these config hashes, in job order.

    Completed runs are moved to the number their job has now; everything unfinished goes to ``earlier/``. Returns the
    completed folders by config hash. A kill in between loses nothing: run again, it goes on from what it finds.
    """
    completed: dict[str, Path] = {}
    leftovers = [path for path in folder.iterdir() if path.is_dir() and path.name.isdigit()] if folder.is_dir() else []
    for path in run_folders(folder):
        record = _read(path)
        if record is not None and record.status == "completed" and record.config_hash not in completed:
            completed[record.config_hash] = path
        elif path not in leftovers:
            leftovers.append(path)
    for path in leftovers:
        if path not in completed.values():
            set_aside(path)
    return _renumber(folder, completed, hashes)


def _renumber(folder: Path, completed: dict[str, Path], hashes: Sequence[str]) -> dict[str, Path]:
    wanted = {config_hash: folder / str(number) for number, config_hash in reversed(list(enumerate(hashes)))}
    for config_hash, path in completed.items():
        if not is_baseline(path) and path != wanted.get(config_hash):
            completed[config_hash] = path.rename(folder / f"kept-{config_hash}")
    for config_hash, path in completed.items():
        if config_hash in wanted and not is_baseline(path):
            completed[config_hash] = path.rename(wanted[config_hash])
    return completed


def _read(path: Path) -> RunRecord | None:
    try:
        return read_record(path)
    except ConfigError:
        return None  # half-written by something else: not a completed run


def set_aside(path: Path) -> None:
    """Move what an unfinished attempt has left, if anything, to ``earlier/``; an empty folder is removed."""
    if not path.exists():
        return
    if not any(path.iterdir()):
        path.rmdir()
        return
    target = path.parent / EARLIER
    target.mkdir(exist_ok=True)
    number = 1
    while (target / f"{path.name}-{number}").exists():
        number += 1
    shutil.move(path, target / f"{path.name}-{number}")
