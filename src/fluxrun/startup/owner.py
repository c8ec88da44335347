"""Whose process this is: only one of the command line's own may be started lean."""

from __future__ import annotations

_own = False


def own_process() -> None:
    """Say that this process is fluxrun's: called by what is run as a program, never by what is imported."""
    global _own  # noqa: PLW0603
    _own = True


def is_own() -> bool:
    """Whether somebody has said so."""
    return _own
