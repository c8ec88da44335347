"""What stands beside what, as Markdown: a row an option, a column another group's, the reasons numbered below."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import NamedTuple

from fluxrun.config.schema import GROUPS


class Pair(NamedTuple):
    """Two options of two groups."""

    group: str
    name: str
    other: str
    other_name: str

    def __str__(self) -> str:
        return f"{self.group}={self.name} {self.other}={self.other_name}"


class Outcome(NamedTuple):
    """What runs of a pair, and why where that is something else."""

    effective: str
    other: str
    reasons: tuple[str, ...]


def section(outcomes: Mapping[Pair, Outcome]) -> list[str]:
    """The tables of one machine; groups of which all options stand beside each other are a line."""
    unusable = _unusable(outcomes)
    names = ", ".join(f"`{option}`" for option in sorted(unusable)) or "none"
    lines, reasons = [f"Not usable here at all: {names}.\n"], dict[str, int]()
    groups = [group for group in GROUPS if group != "model"]
    for a, b in itertools.combinations(groups, 2):
        pairs = [p for p in outcomes if (p.group, p.other) == (a, b)]
        pairs = [p for p in pairs if f"{a}={p.name}" not in unusable and f"{b}={p.other_name}" not in unusable]
        if all(_cell(pair, outcomes[pair], {}) == "✓" for pair in pairs):
            lines.append(f"`{a}` × `{b}`: all {len(pairs)} pairs run.\n")
            continue
        columns = list(dict.fromkeys(pair.other_name for pair in pairs))
        lines += [f"\n| `{a}` × `{b}` | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for name in dict.fromkeys(pair.name for pair in pairs):
            row = [_cell(pair, outcomes[pair], reasons) for pair in pairs if pair.name == name]
            lines.append(f"| {name} | {' | '.join(row)} |")
        lines.append("")
    return [*lines, *(f"{number}. {reason}" for reason, number in reasons.items())]


def _unusable(outcomes: Mapping[Pair, Outcome]) -> set[str]:
    """Options that give way in every pair, whatever they stand beside."""
    runs: dict[str, bool] = {}
    for pair, found in outcomes.items():
        for option, name, effective in (
            (f"{pair.group}={pair.name}", pair.name, found.effective),
            (f"{pair.other}={pair.other_name}", pair.other_name, found.other),
        ):
            runs[option] = runs.get(option, False) or name in (effective, "auto")
    return {option for option, ran in runs.items() if not ran}


def _cell(pair: Pair, found: Outcome, reasons: dict[str, int]) -> str:
    ways = [
        f"{group} → {effective}"
        for group, name, effective in (
            (pair.group, pair.name, found.effective), (pair.other, pair.other_name, found.other),
        )
        if name not in (effective, "auto")
    ]  # fmt: skip
    marks = [str(reasons.setdefault(_general(reason), len(reasons) + 1)) for reason in found.reasons]
    return "; ".join(ways) + f" ({', '.join(dict.fromkeys(marks))})" if ways else "✓"


def _general(reason: str) -> str:
    return " ".join(reason.split())
