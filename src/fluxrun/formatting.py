"""Words and numbers for people: sizes, times, shortened values, the nearest known name."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from typing import Any

GIB = 2**30

CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that steer a terminal, end a line, turn the direction of reading round, or are no text at all."""


def nearest(name: str, known: Sequence[str]) -> str:
    """``did you mean 'x'? allowed: …`` for a name that is not among ``known``."""
    matches = difflib.get_close_matches(name[:100], known, n=1, cutoff=0.5)
    hint = f"did you mean {matches[0]!r}? " if matches else ""
    return f"{hint}allowed: {', '.join(known)}"


def printable(text: str, keep: str = "") -> str:
    """``text`` with control characters written as escapes (``\\x1b``), but for those in ``keep``."""
    return CONTROL.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)


def shorten(value: Any, limit: int = 100) -> str:
    """A value for a message of one line."""
    text = printable(" ".join(str(value).split()))
    return text if len(text) <= limit else text[: limit - 1] + "…"


def as_message(text: str, limit: int = 800) -> str:
    """A text as one printable line; of one that is too long the middle is left out, as the remedy stands at the end."""
    text = printable(" ".join(line.strip() for line in text.splitlines() if line.strip()))
    return text if len(text) <= limit else f"{text[: limit // 2]} … {text[-limit // 2 + 3 :]}"


def gigabytes(count: int) -> str:
    """Decimal, as the hub and disk makers count: ``15.8 GB``, ``3.1 MB``."""
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:.{0 if count >= 100 * size else 1}f} {unit}"
    return f"{count / 1000:.1f} kB"


def seconds(value: float | None) -> str:
    """Seconds with three significant digits; milliseconds below a tenth."""
    if value is None:
        return "–"
    if value >= 100:
        return f"{value:.0f} s"
    return f"{value * 1e3:#.3g} ms".replace(". ", " ") if value < 0.1 else f"{value:#.3g} s".replace(". ", " ")


def decibels(value: float | None) -> str:
    """PSNR; equal pictures have no finite one."""
    return "–" if value is None else "equal" if math.isinf(value) else f"{value:.1f} dB"


def counted(number: int) -> str:
    """A whole number for people, also an absurd one."""
    return f"{number:,}" if number < 10**15 else "10^15 or more"


def utf8(text: str) -> str:
    """The text with what UTF-8 cannot hold (bytes of a path in another encoding) as escapes: ``\\udcff``."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
