"""Findings that hold for one machine and some versions, kept in the cache folder from one process to the next."""

from __future__ import annotations

import hashlib
import json
import logging
from typing import Any

from fluxrun.atomic import write_atomically
from fluxrun.paths import cache_dir
from fluxrun.reading import parse_json, read_text

log = logging.getLogger("fluxrun.hardware")


class Kept:
    """JSON values by a text, in one file for each machine. What cannot be read is not there."""

    def __init__(self, what: str, holds_for: dict[str, str | int | None]) -> None:
        """``what`` names the kind of findings; ``holds_for`` says on which machine, with which versions they hold."""
        self._holds_for = holds_for
        digest = hashlib.sha256(json.dumps(holds_for, sort_keys=True).encode()).hexdigest()[:16]
        self.file = cache_dir() / what / f"{digest}.json"

    def get(self, name: str) -> dict[str, Any] | None:
        """What was kept under this name."""
        found = self._found().get(name)
        return found if isinstance(found, dict) else None

    def keep(self, name: str, finding: dict[str, Any]) -> None:
        """Add it to the file; where that cannot be written it is said and found anew next time."""
        content = {"holds_for": self._holds_for, "found": {**self._found(), name: finding}}
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.file, json.dumps(content, indent=1) + "\n")
        except OSError as error:
            log.warning("%s cannot be written (%s): it is found out again next time", self.file, error.strerror)

    def _found(self) -> dict[str, Any]:
        try:
            content = parse_json(read_text(self.file))
        except OSError:  # no such file, or one that something else has written
            return {}
        found = content.get("found") if isinstance(content, dict) else None
        return found if isinstance(found, dict) else {}
