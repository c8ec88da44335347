"""What ``fluxrun tune`` tried: one option each, with what came of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fluxrun.report.rows import Row


@dataclass
class Trial:
    """One option that was tried, or left out: what came of it, in words for the preset."""

    group: str
    name: str
    verdict: str
    row: Row | None = None
    taken: bool = False


def together(trials: Iterator[Trial] | Sequence[Trial]) -> dict[str, list[str]]:
    """The names of options by what is said of them."""
    found: dict[str, list[str]] = {}
    for trial in trials:
        found.setdefault(trial.verdict, []).append(trial.name)
    return found
