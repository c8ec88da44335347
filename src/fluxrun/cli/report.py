"""``fluxrun report``: table and page of a sweep, or of several as one, rebuilt from their folders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fluxrun.cli.arguments import one_line_parser
from fluxrun.errors import ConfigError
from fluxrun.report.result import missing_libraries, rebuild, write_files
from fluxrun.report.table import show_result


def command(arguments: Sequence[str]) -> int:
    """``fluxrun report FOLDER… [--output FOLDER]``: rebuild table and page of a sweep, or of several as one."""
    parser = one_line_parser("report", command.__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a sweep's folder, or a run's")
    parser.add_argument("--output", type=Path, help="where to write (one sweep: its own folder; several: ./report)")
    given = parser.parse_args(list(arguments))
    if reason := missing_libraries():
        raise ConfigError(f"{reason}: a report needs more (pip install 'fluxrun[report]')")
    report(given.folders, given.output)
    return 0


def report(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Rebuild table and page from the job folders of one sweep, or of several; returns the page's path.

    For one sweep the files are written beside its jobs, for several into ``output``. Raises ConfigError for a folder
    without runs.
    """
    for folder in folders:
        if not os.path.isdir(folder):
            raise ConfigError(f"{folder}: no such folder")
    target = output or (folders[0] if len(folders) == 1 else Path("report"))
    if os.path.isfile(target / "run.json"):
        raise ConfigError(f"{target} is a single run: name where the report goes with --output FOLDER")
    _make(target)
    result = rebuild(folders, target)
    write_files(target, result, target)
    show_result(result, target)
    return target / "report.html"


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {folder}: cannot write there: {error.strerror}") from error
