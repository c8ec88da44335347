"""What a request to the server may ask for at most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from fluxrun.errors import ConfigError
from fluxrun.formatting import nearest


@dataclass(frozen=True)
class Limits:
    """Sizes in bytes, pictures in pixels."""

    queue: int = 32
    """Requests that wait while one draws."""
    body: int = 2**20
    """A JSON body."""
    upload: int = 2 * 2**30
    """One uploaded file."""
    uploads: int = 16 * 2**30
    """All of them; the one used longest ago makes room."""
    overrides: int = 100
    override_length: int = 2_000
    """Characters of an override that is no prompt."""
    prompt_length: int = 20_000
    images: int = 100
    """Pictures of one request, repeats and warm-up counted."""
    pixels: int = 4096 * 4096
    """Of one pipeline call: height times width times batch size."""
    steps: int = 500


def parse_limits(texts: Sequence[str]) -> Limits:
    """``--limit queue=8`` and others over the defaults; raises ConfigError in one line."""
    known, limits = [field.name for field in fields(Limits)], Limits()
    for text in texts:
        name, _, value = text.partition("=")
        if name not in known:
            raise ConfigError(f"--limit {text}: unknown limit {name!r}: {nearest(name, known)}")
        if not value.isdecimal() or not 0 < int(value) < 2**48:
            raise ConfigError(f"--limit {text}: must be a whole number of at least 1")
        limits = replace(limits, **{name: int(value)})
    return limits
