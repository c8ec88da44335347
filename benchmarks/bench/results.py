"""Measured rows: read from the sections' files, and what the summary and the tables count of them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.settings import REFERENCE
from fluxrun.record.schema import Timings

Row = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """One row of one section's file, measured or not."""

    row: Row
    content: Row

    @property
    def done(self) -> bool:
        """Whether there is anything to report but why not."""
        return self.row.get("status") == "measured" or "what" in self.row

    @property
    def name(self) -> str:
        """What the row is about, within its section."""
        which = self.row.get("state") or self.row.get("budget_gb", "")
        return str(self.row.get("what") or f"{self.row['setting']} {which}".strip())

    @property
    def shown(self) -> str:
        """The setting's name in a table."""
        return f"`{self.row['setting']}`{fallen_back(self.row)}"

    @property
    def timings(self) -> Timings:
        """The record's, where the row is one run."""
        return Timings.model_validate(self.row["timings"])

    def plain(self) -> Measured | None:
        """Plain diffusers in the same run, side by side where that was so."""
        every = [Measured(row, self.content) for row in self.content["rows"] if row.get("setting") == REFERENCE]
        found = [one for one in every if one.done]
        beside = [one for one in found if one.row.get("group") == self.row.get("group")]
        return next(iter(beside or found), None)

    def samples(self, key: str) -> list[float]:
        """All samples of a key, turn after turn."""
        return [value for turn in self.row.get("samples", {}).get(key, []) for value in turn]

    def entry(self, label: str, metric: str, unit: str, value: float | None, plain: float | None = None) -> Row:
        """A row of the summary."""
        about = {"model": label, "setting": self.row.get("setting", "") + fallen_back(self.row), "metric": metric}
        figures = {"unit": unit, "value": value, "plain_diffusers": plain, "target": None, "met": None}
        return {**about, **figures, "command": " ".join(self.content["command"])}


def read(folders: Iterable[Path], tiny: bool = False) -> list[Measured]:
    """Every row of every section, the newest first; dry runs (``tiny``) only when they are asked for."""
    files = (file for folder in folders for file in sorted(folder.glob("*.json")))
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    found = [c for c in found if isinstance(c, dict) and "section" in c and (tiny or not c["tiny"])]
    found.sort(key=lambda content: content["before"]["at"], reverse=True)
    return [Measured(row, content) for content in found for row in content["rows"]]


def newest(rows: Iterable[Measured], section: str, *, failed: bool = False) -> dict[str, Measured]:
    """By setting, the newest measured row of a section; with ``failed``, those never measured behind them."""
    mine = [one for one in rows if one.content["section"] == section]
    found: dict[str, Measured] = {}
    for one in [*(one for one in mine if one.done), *(mine if failed else ())]:
        found.setdefault(one.name, one)
    return found


def median(values: Sequence[float], scale: float = 1.0) -> float | None:
    """The median to four significant digits, or None for no values."""
    return float(f"{statistics.median(values) * scale:.4g}") if values else None


def fallen_back(row: Row) -> str:
    """`` (compile: cudagraphs → regional)`` for a setting that is not what it was asked to be; else nothing."""
    options = {g: o for g, o in (row.get("options") or {}).items() if o.get("fallbacks")}
    parts = [
        f"{g}: {o['requested']} → {o['effective'] if o['effective'] != o['requested'] else 'a part of it'}"
        for g, o in options.items()
    ]
    return f" ({', '.join(parts)})" if parts else ""


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, or that nothing was measured."""
    body = [f"| {' | '.join(row)} |" for row in rows]
    head = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    return "\n".join([*head, *body]) if body else "*Not measured yet.*"
