"""fluxrun with workers=N in processes of its own, to be killed on the way."""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from helpers import Child, start_fluxrun
from robustness.signals_campaign import TAG, tagged

from fluxrun.record.folder import read_record

PATIENCE_S = 300


class Started:
    """A command in a process of its own, whose own processes can be told from everybody else's."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder, self._tag = folder, uuid.uuid4().hex
        with (folder / "screen.txt").open("w") as stream:
            env = {TAG: self._tag, "COLUMNS": "300"}
            self.process: Child = start_fluxrun(
                *arguments, cwd=folder, stdout=stream, stderr=stream, env=env, fresh=True
            )

    def others(self) -> list[psutil.Process]:
        return [other for other in tagged(self._tag) if other.pid != self.process.pid]

    def drawing(self) -> list[psutil.Process]:
        """The actors that have a job."""
        found = []
        for other in self.others():
            with contextlib.suppress(psutil.Error):
                found += (
                    [other] if other.name() == "ray::Worker.dra" or "Worker.draw" in " ".join(other.cmdline()) else []
                )
        return found

    def until(self, what: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not what():
            assert self.process.poll() is None, self.screen()
            assert time.monotonic() < deadline, self.screen()
            time.sleep(0.05)

    def screen(self) -> str:
        return (self.folder / "screen.txt").read_text()

    def close(self) -> None:
        """End all of it."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(PATIENCE_S)
        for other in self.others():
            with contextlib.suppress(psutil.Error):
                other.kill()

    def rows(self) -> dict[str, dict[str, Any]]:
        return {row["job"]: row for row in json.loads((self.folder / "sweep" / "sweep.json").read_text())["jobs"]}

    def completed(self) -> list[Path]:
        return [folder for folder in (self.folder / "sweep").glob("[0-9]*") if _is_completed(folder)]


def _is_completed(folder: Path) -> bool:
    return (folder / "run.json").exists() and read_record(folder).status == "completed"


def gone(processes: list[psutil.Process]) -> bool:
    """Whether they end; a process that was killed takes a moment."""
    return not psutil.wait_procs(processes, timeout=20)[1]
