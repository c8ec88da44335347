"""Which server of this user is running, and where: a file that nobody else can read, since it holds the token."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from fluxrun.paths import data_dir


@dataclass(frozen=True)
class ServerState:
    """A running server: how it is reached, and whose process it is."""

    pid: int
    created: float
    """When the process began: its number may be another one's by now."""
    url: str
    socket: str | None
    token: str | None
    output: str


def state_file() -> Path:
    """Where a user's server says that it is there."""
    return data_dir() / "server.json"


def write_state(state: ServerState) -> None:
    """Say that this process is the user's server; only the user can read it."""
    path = state_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # 0600
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(asdict(state), file)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_state() -> ServerState | None:
    """What the last server has said; None where there was none, or what is there is no state. It may have died."""
    try:
        return ServerState(**json.loads(state_file().read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def running() -> ServerState | None:
    """The server that is running now, its process looked for."""
    import psutil

    state = read_state()
    if state is None:
        return None
    try:
        alive = abs(psutil.Process(state.pid).create_time() - state.created) < 1
    except psutil.Error:
        alive = False
    return state if alive else None


def remove_state(pid: int) -> None:
    """A server's last act; a file that another one has written stays."""
    state = read_state()
    if state is not None and state.pid == pid:
        with suppress(OSError):
            state_file().unlink()
