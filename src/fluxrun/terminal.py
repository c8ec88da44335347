"""Consoles that pass no control characters on: what is printed may come from a stranger's file."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderableType, RenderHook
from rich.segment import Segment

from fluxrun.formatting import printable
from fluxrun.streams import LastingConsole


def make_console(*, stderr: bool = False) -> Console:
    """A rich console of this process's output that escapes control characters in all it prints.

    On standard error it takes every line, also after nobody reads them any more.
    """
    for name in ("COLUMNS", "LINES"):
        if not re.fullmatch(r"[1-9][0-9]{0,4}", os.environ.get(name, "80")):
            del os.environ[name]  # no size: rich would print nothing in no columns, or fail
    console = LastingConsole() if stderr else Console()
    console.push_render_hook(_Cleaning())
    return console


class _Cleaning(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Clean(renderable) for renderable in renderables]


class _Clean:
    """Something printable without control characters; what rich itself says to the terminal stays."""

    def __init__(self, inner: RenderableType) -> None:
        self.inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[Any]:
        for segment in console.render(self.inner, options):
            yield segment if segment.is_control else Segment(printable(segment.text, keep="\n\t"), segment.style)
