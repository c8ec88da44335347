"""Runs of the output folder: found, listed, searched, and their files served. Nothing outside of it is reached."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fluxrun.errors import ConfigError
from fluxrun.reading import Unreadable, parse_json, read_text
from fluxrun.record.folder import read_record
from fluxrun.record.journal import JOURNAL
from fluxrun.record.writing import RECORD
from fluxrun.serving.messages import RunSummary

ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{8}")

FILE = re.compile(r"run\.json|images\.jsonl|fluxrun\.log|images/[0-9A-Za-z_]+\.(png|jpg|webp)")
"""What of a run's folder is served."""


class History:
    """The runs in a folder, by their names there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[str, tuple[int, RunSummary]] = {}
        """Summaries by id, with the times of the files that they were made of."""

    def record(self, run: str) -> dict[str, Any] | None:
        """A run's record as it lies there, with the images that are listed beside it; None where there is none."""
        path = self.file(run, RECORD)
        if path is None:
            return None
        try:
            found = parse_json(read_text(path))
            if isinstance(found, dict) and found.get("images_file") and self.file(run, JOURNAL):
                found = read_record(path.parent).model_dump(mode="json")
        except (Unreadable, FileNotFoundError, ConfigError):
            return None
        return found if isinstance(found, dict) else None

    def file(self, run: str, name: str) -> Path | None:
        """One file of a run; None for anything else than what a run's folder holds."""
        if not ID.fullmatch(run) or not FILE.fullmatch(name):
            return None
        path = self.folder / run / name
        return path if path.is_file() and not path.is_symlink() else None

    def search(self, text: str) -> list[RunSummary]:
        """Runs whose prompt holds all of the words, the newest first."""
        words = text.casefold().split()
        return [found for found in self._all() if all(word in found.prompt.casefold() for word in words)]

    def _all(self) -> Iterator[RunSummary]:
        names = sorted((path.name for path in self.folder.glob("*") if ID.fullmatch(path.name)), reverse=True)
        for name in names:
            if summary := self._summary(name):
                yield summary

    def _summary(self, name: str) -> RunSummary | None:
        if self.file(name, RECORD) is None:
            return None
        stamp = sum(_changed_at(self.folder / name / file) for file in (RECORD, JOURNAL))
        if name not in self._known or self._known[name][0] != stamp:
            self._known[name] = stamp, summary_of(name, self.record(name) or {})
        return self._known[name][1]


def _changed_at(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def summary_of(name: str, record: dict[str, Any]) -> RunSummary:
    """A record in a few words."""
    config, images = record.get("config"), record.get("images")
    config = config if isinstance(config, dict) else {}
    pictures = (
        [str(image.get("path")) for image in images if isinstance(image, dict)] if isinstance(images, list) else []
    )
    seed = config.get("seed")
    return RunSummary(
        id=name,
        state=str(record.get("status", "unknown")),
        prompt=prompt_of(config),
        seed=seed if isinstance(seed, int) else None,
        images=pictures,
        started_at=str(record.get("started_at", "")),
    )


def prompt_of(config: dict[str, Any]) -> str:
    """A config's prompts as one text."""
    prompt = config.get("prompt")
    return " | ".join(map(str, prompt)) if isinstance(prompt, list) else "" if prompt is None else str(prompt)
