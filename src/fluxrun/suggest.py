"""Names a user may have meant: the nearest first, then what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def nearest(name: str, known: Sequence[str]) -> str:
    """``did you mean 'x'? allowed: …`` for a name that is not among ``known``."""
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {matches[0]!r}? " if matches else ""
    return f"{hint}allowed: {', '.join(known)}"
