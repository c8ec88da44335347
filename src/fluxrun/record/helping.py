"""Folders of processes that draw a run's pictures and do not own its record."""

from __future__ import annotations

from collections.abc import Sequence

from fluxrun.record.folder import RunFolder
from fluxrun.record.schema import Asked, Status


class UnwrittenFolder(RunFolder):
    """What a process has that helps to draw another one's pictures: a record in memory, and nothing is written."""

    def _claim(self) -> None:
        return

    def _write_asked(self, jobs: Sequence[Asked]) -> None:
        return

    def write(self) -> None:
        return

    def finish(self, status: Status, error: BaseException | None = None, stage: str = "") -> None:
        self.record.status = status

    def abandon(self, error: BaseException, stage: str) -> None:
        return
