"""Folders of processes that draw a run's pictures and do not own its record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fluxrun.record.folder import RunFolder
from fluxrun.record.schema import Asked, ImageLine, OptionRecord, RunRecord, Spread, Status, spread
from fluxrun.types import JsonObject


@dataclass(frozen=True)
class Owner:
    """What the pictures of a run carry of it, whoever saves them."""

    path: Path
    run_id: str
    signature: str | None

    @classmethod
    def of(cls, folder: RunFolder) -> Owner:
        """What another process has to know of a run to save its pictures."""
        return cls(folder.path, folder.record.run_id, folder.signature)


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


class SharedFolder(UnwrittenFolder):
    """A run's folder in a process that draws a part of it: pictures are saved there, and told to the record's owner."""

    def __init__(self, owner: Owner, config: JsonObject, on_saved: Callable[[ImageLine], None]) -> None:
        super().__init__(owner.path, config)
        self.record.run_id, self.signature = owner.run_id, owner.signature
        self._on_saved = on_saved

    def _list(self, line: ImageLine) -> None:
        self._on_saved(line)


def take_over(folder: RunFolder, part: RunRecord, name: str) -> None:
    """Take over into a run's record what is known of a part of it, whose pictures are in it already.

    Options, environment and what was measured once are the first part's; where another one chose otherwise, a note says
    so by its ``name``.
    """
    record, times = folder.record, folder.record.timings
    if not record.options:
        record.options, record.environment, record.inputs = part.options, part.environment, part.inputs
        record.memory.start_bytes = part.memory.start_bytes
        for once in ("import_s", "load_s", "apply_s", "first_call_s", "compile_s"):
            setattr(times, once, getattr(part.timings, once))
    others = [f"{name}: {group}={o.effective}" for group, o in part.options.items() if _is_other(record, group, o)]
    record.notes += [note for note in (*part.notes, *others) if note not in record.notes]
    record.memory.peak_allocated_bytes = max(record.memory.peak_allocated_bytes, part.memory.peak_allocated_bytes)
    for stage, used in part.memory.by_stage.items():
        record.memory.by_stage[stage] = max(used, record.memory.by_stage.get(stage, 0))


def _is_other(record: RunRecord, group: str, option: OptionRecord) -> bool:
    return group not in record.options or record.options[group].effective != option.effective


def steady_steps(record: RunRecord) -> Spread | None:
    """Statistics of a run's steps that several processes made: without each picture's first one, which may compile."""
    return spread([seconds for call in record.timings.step_s for seconds in call[1:]])
