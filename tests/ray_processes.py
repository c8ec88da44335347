"""fluxrun with workers=N in processes of its own, to be killed on the way."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import psutil
from tagged_processes import Tagged

from fluxrun.record.folder import read_record


class Started(Tagged):
    """A command that has Ray draw."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        super().__init__(folder, *arguments, environment={"COLUMNS": "300"}, fresh=True)

    def drawing(self) -> list[psutil.Process]:
        """The actors that have a job."""
        found = []
        for other in self.others():
            with contextlib.suppress(psutil.Error):
                if other.name() == "ray::Worker.dra" or "Worker.draw" in " ".join(other.cmdline()):
                    found.append(other)
        return found

    def rows(self) -> dict[str, dict[str, Any]]:
        return {row["job"]: row for row in json.loads((self.folder / "sweep" / "sweep.json").read_text())["jobs"]}

    def completed(self) -> list[Path]:
        return [folder for folder in (self.folder / "sweep").glob("[0-9]*") if _is_completed(folder)]


def _is_completed(folder: Path) -> bool:
    return (folder / "run.json").exists() and read_record(folder).status == "completed"
