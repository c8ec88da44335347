"""Text, YAML and JSON from files that anyone may have written: plain ones only, of a bounded size, depth and growth."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from fluxrun.errors import one_line, python_reason
from fluxrun.formatting import gigabytes, shorten
from fluxrun.types import Json

MOST_BYTES = 64 * 2**20
"""A text file may be so long: some hundred thousand prompts, or a record of as many pictures."""

MOST_DEPTH = 100
"""Lists and mappings inside each other; a tenth of what Python recurses."""

MOST_NODES = 1_000_000
"""Values in a YAML file, with its aliases written out: a few lines of them can stand for more than any memory holds."""


class Unreadable(OSError, ValueError):
    """A file that is not read, or that does not hold what it should; its text is one line, without the path."""


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """The UTF-8 text of a plain file (a byte-order mark is dropped). Raises FileNotFoundError or Unreadable."""
    return decoded(read_bytes(path, most))


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """All of a plain file. Raises FileNotFoundError or Unreadable.

    A pipe or a device is refused at once: one may never end, the other never begin.
    """
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise Unreadable("is no plain file but a pipe or a device")
            data = file.read(most + 1)
    except (Unreadable, FileNotFoundError):
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise Unreadable(f"cannot be read: {getattr(error, 'strerror', None) or one_line(error)}") from error
    if len(data) > most:
        raise Unreadable(f"is larger than {gigabytes(most)}")
    return data


def decoded(data: bytes) -> str:
    """A file's bytes as text. Raises Unreadable where they are no UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unreadable(f"is not UTF-8 text: {error.reason} at byte {error.start}") from error


def check_plain(path: Path) -> None:
    """Raise Unreadable for a pipe or a device, FileNotFoundError where nothing is."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise Unreadable("is no plain file but a folder, a pipe or a device")


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises Unreadable: also for numbers and depths that Python does not read."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"is not JSON: {_reason(error)}") from error
    if text.count("[") + text.count("{") > MOST_DEPTH and _depth(value) > MOST_DEPTH:
        raise Unreadable(f"is nested more than {MOST_DEPTH} levels deep")
    return value


def _depth(value: Json) -> int:
    """How many lists and mappings lie inside each other; no deeper than is asked about."""
    level, depth = [value], 0
    while (level := [item for item in level if isinstance(item, (list, dict))]) and depth <= MOST_DEPTH:
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
        depth += 1
    return depth


def parse_yaml(text: str) -> Any:
    """The value of a YAML text. Raises Unreadable: also for depths and aliases that would take all memory or time."""
    check_yaml(text)
    try:
        return yaml.safe_load(text)
    # PyYAML's constructors raise these for a value that its tag does not allow, as in "!!timestamp x" or "!!int ''".
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
        raise Unreadable(f"is not valid YAML: {_reason(error)}") from error


def check_yaml(text: str) -> None:
    """Raise Unreadable for YAML that is nested too deep or grows too large; a parser sees it, nothing is built."""
    try:
        _Measured().see_all(yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
    except yaml.YAMLError as error:
        raise Unreadable(f"is not valid YAML: {_reason(error)}") from error


class _Measured:
    """Depth and size of a YAML text, from its events: an alias counts as much as what it stands for."""

    def __init__(self) -> None:
        self.open: list[tuple[str | None, int]] = []
        """The collections that are open: their anchor, and how many nodes there were before them."""
        self.sizes: dict[str, int] = {}
        self.nodes = 0

    def see_all(self, events: Any) -> None:
        """Go through all events; raises Unreadable."""
        for event in events:
            self._see(event)
            if len(self.open) > MOST_DEPTH:
                raise Unreadable(f"is nested more than {MOST_DEPTH} levels deep")
            if self.nodes > MOST_NODES:
                raise Unreadable(f"stands for more than {MOST_NODES:,} values, its aliases written out")

    def _see(self, event: Any) -> None:
        if isinstance(event, yaml.CollectionStartEvent):
            self.open.append((event.anchor, self.nodes))
            self.nodes += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = self.open.pop()
            if anchor is not None:
                self.sizes[anchor] = self.nodes - before
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in self.open):
                raise Unreadable(f"holds an alias, *{event.anchor}, inside of what it stands for")
            self.nodes += self.sizes.get(str(event.anchor), 1)
        elif isinstance(event, yaml.ScalarEvent):
            self.nodes += 1


def first_problem(error: ValidationError) -> str:
    """The first thing that is wrong with a file's data, for one line: where, what, and what was got."""
    problem = error.errors(include_url=False)[0]
    where = ".".join(map(str, problem["loc"]))
    got = problem.get("input")
    return f"{shorten(where) or 'it'}: {problem['msg'].lower()}, got {shorten(repr(got), 60)} ({type(got).__name__})"


def _reason(error: BaseException) -> str:
    """What a parser did not like, without Python's advice on how to allow it."""
    mark = getattr(error, "problem_mark", None)
    where = f" in line {mark.line + 1}" if mark else ""
    return f"{getattr(error, 'problem', None) or getattr(error, 'msg', None) or python_reason(error)}{where}"
