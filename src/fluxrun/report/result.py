"""The end of a sweep, and every moment before it: sweep.json, sweep.csv, report.html and the table on the screen."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fluxrun.atomic import write_atomically
from fluxrun.errors import ConfigError, FluxrunError, one_line
from fluxrun.reading import Unreadable, first_problem, read_text
from fluxrun.record.folder import read_record
from fluxrun.report.comparison import compare, settings
from fluxrun.report.rows import (
    BASELINE_ELSEWHERE,
    Result,
    Row,
    Totals,
    baseline_elsewhere,
    by_speed,
    read_row,
    read_rows,
    run_folders,
    to_csv,
)
from fluxrun.report.table import show_result

log = logging.getLogger("fluxrun.sweep")


@dataclass
class SweepProgress:
    """What only the running sweep knows, and its job folders do not."""

    status: str
    command: list[str]
    started_at: str
    wall_s: float
    order: list[str]
    pending: list[Row] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)

    def write(self, folder: Path, rows: Sequence[Row]) -> None:
        """sweep.json as it stands in the middle of a sweep: cheap, and enough to rebuild everything from."""
        _write(folder, self.result(folder, [*rows, *self.pending]))

    def result(self, folder: Path, rows: list[Row]) -> Result:
        """The result without what needs comparing; an earlier run that is the baseline took none of the time."""
        done = [row for row in rows if row.status == "completed" and row.job != BASELINE_ELSEWHERE]
        totals = Totals(
            wall_s=self.wall_s,
            loads=sum(bool(row.load_s) for row in done),
            load_s=sum(row.load_s or 0.0 for row in done),
            jobs_s=sum((row.total_s or 0.0) - (row.load_s or 0.0) for row in done),
        )
        return Result(
            status=self.status, command=self.command, started_at=self.started_at, written_at=_now(), order=self.order,
            totals=totals, loads=self.loads, jobs=rows,
        )  # fmt: skip


def finish(folder: Path, progress: SweepProgress, baseline: str) -> Result:
    """Compare all jobs of a sweep's folder, write its files, show its table."""
    waits = progress.status != "interrupted"  # who has pressed Ctrl+C does not wait for pictures and matplotlib
    rows = _all_rows(folder, progress.pending, baseline)
    result = complete(progress.result(folder, rows), folder, baseline, pictures=waits)
    try:
        write_files(folder, result, folder, page=waits)
    finally:  # the screen has the table, whatever the disk takes
        show_result(result, folder)
    return result


def rebuild(folders: Sequence[Path], root: Path) -> Result:
    """The result of sweeps (or single runs) that are over, read from their folders; paths become relative to ``root``.

    Raises ConfigError for a folder that holds no run.
    """
    folders = list({folder.resolve(): folder for folder in folders}.values())
    parts = [_earlier(folder) for folder in folders]
    rows = []
    for folder, part, prefix in zip(folders, parts, _prefixes(folders), strict=True):
        rows += [r.model_copy(update={"job": prefix + r.job}) for r in _rows_of(folder, root, part)]
    one = parts[0] if len(parts) == 1 else None
    progress = SweepProgress(
        status=one.status if one else "completed",
        command=one.command if one else [],
        started_at=min(part.started_at for part in parts),
        wall_s=sum(part.totals.wall_s for part in parts),
        order=one.order if one else [],
        loads=one.loads if one else [],
    )
    return complete(progress.result(root, rows), root, one.baseline if one else "auto")


def _prefixes(folders: Sequence[Path]) -> list[str]:
    """What tells the jobs of several sweeps apart: the shortest end of each folder's path that is its own."""
    if len(folders) == 1:
        return [""]
    parts = [folder.resolve().parts for folder in folders]
    depth = next(n for n in range(1, 1 + max(map(len, parts))) if len({p[-n:] for p in parts}) == len(parts))
    return ["/".join(p[-depth:]) + "/" for p in parts]


def complete(result: Result, root: Path, baseline: str, *, pictures: bool = True) -> Result:
    """Add comparisons, settings and environments; jobs sorted by speed."""
    result.baseline = baseline
    result.problems = compare(result.jobs, root, baseline, pictures=pictures)
    result.settings = settings(result.jobs)
    result.jobs = by_speed(result.jobs)
    result.environments = _environments(result.jobs, root)
    if result.status == "completed" and any(row.status != "completed" for row in result.jobs):
        result.status = "failed"
    return result


def write_files(folder: Path, result: Result, root: Path, *, page: bool = True) -> None:
    """sweep.json and sweep.csv always; with ``page`` report.html, where its libraries are.

    Raises FluxrunError naming what could not be written, when all that can be is.
    """
    problems = _attempt(folder / "sweep.json", lambda: _write(folder, result))
    problems += _attempt(folder / "sweep.csv", lambda: write_atomically(folder / "sweep.csv", to_csv(result.jobs)))
    if not page:
        log.info("report.html is left out: fluxrun report %s makes it", folder)
    elif reason := missing_libraries():
        log.warning("no report.html: %s (pip install 'fluxrun[report]')", reason)
    else:
        from fluxrun.report.page import write_report

        path = folder / "report.html"
        problems += _attempt(path, lambda: write_report(result, root, path))
    if problems:
        raise FluxrunError(problems[0])


def _attempt(path: Path, write: Callable[[], None]) -> list[str]:
    """What went wrong with writing a file, said at once: another one may still fit on the disk."""
    try:
        write()
    except OSError as error:
        log.error("cannot write %s: %s", path, one_line(error))
        return [f"cannot write {path}: {one_line(error)}"]
    return []


def missing_libraries() -> str | None:
    """Why there can be no report.html here, or None."""
    try:
        import_module("fluxrun.report.page")
    except ImportError as error:
        return one_line(error)
    return None


def _write(folder: Path, result: Result) -> None:
    write_atomically(folder / "sweep.json", result.model_dump_json(indent=1))


def _all_rows(folder: Path, pending: Sequence[Row], baseline: str) -> list[Row]:
    rows = read_rows(folder, folder) + baseline_elsewhere(baseline, folder)
    known = {row.config_hash for row in rows}
    return rows + [row for row in pending if row.config_hash not in known]


def _rows_of(folder: Path, root: Path, earlier: Result) -> list[Row]:
    """A sweep's rows, or the one row of a run folder."""
    if (folder / "run.json").is_file():
        return [read_row(folder, root)]
    if not run_folders(folder):
        raise ConfigError(f"{folder} holds no run and no sweep of fluxrun's (no run.json in it or one level below)")
    rows = read_rows(folder, root) + baseline_elsewhere(earlier.baseline, root)
    known = {row.config_hash for row in rows}
    return rows + [row for row in earlier.jobs if row.status == "pending" and row.config_hash not in known]


def _earlier(folder: Path) -> Result:
    """What sweep.json says, for what the job folders do not; an empty one where there is none."""
    path = folder / "sweep.json"
    try:
        return Result.model_validate_json(read_text(path))
    except FileNotFoundError:
        return Result(status="completed")
    except Unreadable as error:
        raise ConfigError(f"{path} {error}") from error
    except ValidationError as error:
        raise ConfigError(f"{path} is no result of a sweep: {first_problem(error)}") from error


def _environments(rows: Sequence[Row], root: Path) -> list[dict[str, Any]]:
    """The different machines and versions of all jobs; a commit made meanwhile is no other machine."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if not (root / row.folder / "run.json").is_file() or not row.config:  # not begun, never recorded, or unreadable
            continue
        environment = read_record(root / row.folder).environment
        if environment:
            found.setdefault(repr({**environment, "git_commit": None}), environment)
    return list(found.values())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
