"""Tasks that a worker's process can import: one that works, one whose process dies, one that never answers."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any


def works(job: Any) -> Iterator[dict[str, Any]]:
    """Two turns, and what a later answer must not change."""
    yield {"pid": os.getpid()}
    yield {"first_call_s": 1.0, "options": {"compile": "asked"}}
    yield {"samples": {"step_ms": [1.0, 2.0]}, "options": {"compile": "counted"}}
    yield {"samples": {"step_ms": [3.0]}, "first_call_s": 9.0}


def dies(job: Any) -> Iterator[dict[str, Any]]:
    """As a library's crash ends a process."""
    yield {}
    os._exit(3)


def hangs(job: Any) -> Iterator[dict[str, Any]]:
    """Longer than anyone waits."""
    yield {"pid": os.getpid()}
    time.sleep(600)
    yield {}
