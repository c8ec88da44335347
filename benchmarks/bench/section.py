"""What a section of ``speed.py`` is: how it is measured, its rows of the summary, its tables of docs/performance.md."""

from __future__ import annotations

import json
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.results import Measured, Row, fallen_back
from bench.settings import MODELS, TINY_MODELS, Kept
from fluxrun.atomic import write_atomically
from fluxrun.hardware.detection import detect
from fluxrun.record.environment import git_commit

GPU_FIELDS = (
    "name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit",
    "temperature.gpu", "utilization.gpu", "memory.used", "memory.total", "clocks_event_reasons.active",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Section(ABC):
    """One section. A new one is a subclass, or a ``Timed`` with a task of its own, and a name in ``SECTIONS``."""

    name: str
    about: str
    seconds: float
    """After which it begins nothing new, unless ``--budget`` says otherwise."""
    label: str = "klein-4B"
    """The model, in the summary."""
    unit: str = "s"
    metric: str = ""

    @abstractmethod
    def measure(self, run: Run) -> None:
        """Measure, and give ``run`` each row as soon as there is something in it."""

    @abstractmethod
    def entries(self, one: Measured) -> Iterator[Row]:
        """A row's rows in the summary; ``one`` was measured."""

    @abstractmethod
    def tables(self, rows: Sequence[Measured]) -> dict[str, str]:
        """Markdown by the name of its marker."""


class Run:
    """One section being measured; its file is rewritten with every figure: what is cut off keeps what it has."""

    def __init__(
        self, section: Section, out: Path, work: Path, command: Sequence[str], *, keep: Kept, seconds: float, tiny: bool
    ) -> None:
        self.section, self.keep, self.tiny = section, keep, tiny
        self.models = TINY_MODELS if tiny else MODELS
        self.work, self.logs = work, out / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.rows: list[Row] = []
        self._file = out / f"{section.name}.json"
        self._started = time.monotonic()
        self._deadline = self._started + seconds
        machine = detect()
        versions = {"python": machine.python, "git_commit": git_commit(), **machine.packages}
        about = {"section": section.name, "command": list(command), "tiny": tiny, "versions": versions}
        self.content: Row = {**about, "before": gpu_state(), "between": [], "after": None, "rows": self.rows}

    @property
    def left(self) -> float:
        """Seconds until nothing new is begun."""
        return self._deadline - time.monotonic()

    def save(self) -> None:
        """Write everything as it stands."""
        self.content["seconds"] = round(time.monotonic() - self._started, 1)
        write_atomically(self._file, json.dumps(self.content, indent=1, default=str) + "\n")

    def note_state(self) -> None:
        """Note clocks and power while the device is still warm."""
        self.content["between"].append(gpu_state())
        self.save()

    def add(self, row: Row) -> Row:
        """One more row; returns it."""
        self.rows.append(row)
        self.save()
        return row

    def row(self, setting: str, group: int, about: Row) -> Row:
        """A setting's row within its group, which a later pass adds to."""
        same = (row for row in self.rows if (row["setting"], row["group"]) == (setting, group))
        unmeasured: Row = {"status": "not measured", "error": None, "samples": {}}
        return next(same, None) or self.add({"setting": setting, "group": group, **about, **unmeasured})

    def say(self, row: Row) -> None:
        """One line on the screen: a row's figures as the summary has them, or why there are none."""
        one = Measured(row, self.content)
        entries = list(self.section.entries(one)) if one.done else []
        parts = [f"{e['metric']} {e['value']} {e['unit']}".strip() for e in entries]
        if row.get("error"):
            parts.append(f"{row['status']}: {row['error']}")
        print(f"  {row.get('setting', '') + fallen_back(row):22} {', '.join(parts)}", flush=True)


def gpu_state() -> dict[str, Any]:
    """The first GPU's clocks, power and temperature now, read and never set; without one, only the time and why."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return {"at": now, **dict(zip(GPU_FIELDS, done.stdout.splitlines()[0].split(", "), strict=True))}
    except (OSError, subprocess.SubprocessError, LookupError, ValueError) as error:
        return {"at": now, "gpu": None, "why": f"{type(error).__name__}: {error}"[:200]}
