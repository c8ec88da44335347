"""The server's process: sockets, signals and the state file around the application."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import psutil
import uvicorn

from fluxrun.errors import ConfigError
from fluxrun.process.console import ConsoleHandler, LogFile, LogFormatter
from fluxrun.process.signals import EXIT_CODES
from fluxrun.serving.app import make_app
from fluxrun.serving.runs import Runs
from fluxrun.serving.service import Settings
from fluxrun.serving.state import ServerState, remove_state, write_state
from fluxrun.trust import TRUST_VARIABLE

log = logging.getLogger("fluxrun.serve")

BACKLOG = 128

GOODBYE_S = 5
"""What open connections have for being answered once the worker has ended."""


class Server(uvicorn.Server):
    """uvicorn's, but for signals: the first one finishes the step and its record, the second one does not wait."""

    def __init__(self, config: uvicorn.Config, runs: Runs) -> None:
        super().__init__(config)
        self._runs = runs

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take the signals that end a run, and do not raise them again afterwards."""
        taken = [number for number in EXIT_CODES if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self.handle_exit) for number in taken}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop: what is being drawn ends at its next step."""
        if self.should_exit:
            self._runs.stop_at_once()
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Runs first: whoever waits for one is answered."""
        log.info("stopping: the step that is being drawn is finished; Ctrl+C again ends at once")
        await self._runs.stop()
        await super().shutdown(sockets)


def serve(settings: Settings, path: Path | None) -> None:
    """Serve until a signal comes; ``path`` is a UNIX socket's, used instead of host and port."""
    os.environ.pop(TRUST_VARIABLE, None)  # a request is a stranger's, however the server was started
    settings.output.mkdir(parents=True, exist_ok=True)
    _log_to(settings.output)
    with _listening(settings, path) as (listener, state):
        app = make_app(settings)
        config = uvicorn.Config(
            app, log_config=None, access_log=False, server_header=False, lifespan="on", ws="none",
            timeout_graceful_shutdown=GOODBYE_S,
        )  # fmt: skip
        server = Server(config, app.state.service.runs)
        write_state(state)
        try:
            _say(settings, state)
            asyncio.run(server.serve(sockets=[listener]))
        finally:
            remove_state(state.pid)
    log.info("stopped")


@contextlib.contextmanager
def _listening(settings: Settings, path: Path | None) -> Iterator[tuple[socket.socket, ServerState]]:
    access = settings.access
    listener = _unix_socket(path) if path else _tcp_socket(access.host, access.port)
    name = f"[{access.host}]" if ":" in access.host else access.host
    url = "http://localhost" if path else f"http://{name}:{listener.getsockname()[1]}"
    state = ServerState(
        pid=os.getpid(),
        created=psutil.Process().create_time(),
        url=url,
        socket=str(path) if path else None,
        token=access.token,
        output=str(settings.output),
    )
    try:
        yield listener, state
    finally:
        listener.close()
        if path:
            path.unlink(missing_ok=True)


def _tcp_socket(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}, port {port}: {error.strerror}; --port takes another one"
        ) from error


def _unix_socket(path: Path) -> socket.socket:
    """A socket that only its user can connect to, from the moment on that it is there."""
    listener = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)
    try:
        if path.is_socket():
            _remove_dead(path)
        listener.bind(str(path))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {path}: {error.strerror or error}") from error
    finally:
        os.umask(before)
    return listener


def _remove_dead(path: Path) -> None:
    """Remove a socket on which nobody listens any more."""
    with socket.socket(socket.AF_UNIX) as trial:
        try:
            trial.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()


def _say(settings: Settings, state: ServerState) -> None:
    where = state.socket or f"{state.url}/"
    log.info("%s draws with %s; runs go to %s", where, ", ".join(settings.models), settings.output)
    if state.token:
        log.info("requests need the token, which is in the state file (fluxrun serve --status names it)")
    log.info("Ctrl+C, or fluxrun serve --stop, ends it")


def _log_to(folder: Path) -> None:
    file = LogFile(folder / "serve.log")
    file.setFormatter(LogFormatter("[%(asctime)s][%(name)s][%(levelname)s] %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[ConsoleHandler(), file], force=True)
    for name in ("uvicorn", "asyncio"):
        logging.getLogger(name).setLevel(logging.WARNING)
