"""The way to a server, for programs on this side: plain HTTP over TCP or a UNIX socket; light to import."""

from __future__ import annotations

import http.client
import json
import os
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from fluxrun.errors import ConfigError, FluxrunError
from fluxrun.formatting import shorten
from fluxrun.serving.state import read_state, state_file

TOKEN_VARIABLE = "FLUXRUN_SERVER_TOKEN"

PLAIN = "run without --server"


class ServerError(FluxrunError):
    """The server's answer to a request, with the exit code that it gives it."""

    def __init__(self, message: str, status: int, exit_code: int = 1) -> None:
        super().__init__(message)
        self.status, self.exit_code = status, exit_code


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self._path)


class Server:
    """A server by its address: ``auto`` (this user's own), ``http://HOST:PORT`` or ``unix:PATH``."""

    def __init__(self, address: str) -> None:
        token = os.environ.get(TOKEN_VARIABLE)
        state = read_state()
        if address == "auto":
            if state is None:
                raise ConfigError(
                    f"no server of yours is running ({state_file()}): fluxrun serve starts one, or {PLAIN}"
                )
            address, token = (f"unix:{state.socket}" if state.socket else state.url), token or state.token
        elif state is not None and address.rstrip("/") in (state.url, f"unix:{state.socket}"):
            token = token or state.token
        self.address, self._token = address, token
        if not address.startswith(("unix:", "http://")):
            raise ConfigError(f"--server {shorten(address)}: must be auto, http://HOST:PORT or unix:PATH")

    def _connect(self) -> http.client.HTTPConnection:
        if self.address.startswith("unix:"):
            return _UnixConnection(self.address.removeprefix("unix:"))
        try:
            parts = urlsplit(self.address)
            return http.client.HTTPConnection(parts.hostname or "", parts.port or 80)
        except ValueError as error:
            raise ConfigError(f"--server {shorten(self.address)}: {error}") from error

    def open(self, method: str, path: str, body: Any = None, *, file: Any = None) -> http.client.HTTPResponse:
        """Ask; the answer, to be read. Raises ServerError for a refusal, ConfigError where nobody answers."""
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if file is not None:
            headers |= {
                "Content-Type": "application/octet-stream",
                "Content-Length": str(os.fstat(file.fileno()).st_size),
            }
        connection = self._connect()
        try:
            connection.request(method, path, file if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            why = getattr(error, "strerror", None) or type(error).__name__
            raise ConfigError(
                f"no server answers at {self.address} ({why}): fluxrun serve starts one, or {PLAIN}"
            ) from error
        if answer.status >= 400:
            raise _refusal(answer)
        return answer

    def ask(self, method: str, path: str, body: Any = None, *, file: Any = None) -> Any:
        """Ask for JSON."""
        with self.open(method, path, body, file=file) as answer:
            return json.loads(answer.read() or b"null")

    def events(self, path: str) -> Iterator[dict[str, Any]]:
        """Server-sent events, as they come."""
        with self.open("GET", path) as answer:
            for line in answer:
                if line.startswith(b"data: "):
                    yield json.loads(line[6:])


def _refusal(answer: http.client.HTTPResponse) -> ServerError:
    try:
        problem = json.loads(answer.read())["error"]
        message, code = str(problem["message"]), int(problem["exit_code"])
    except (ValueError, KeyError, TypeError):
        message, code = f"the server answers {answer.status} {answer.reason}", 1
    if answer.status == 429:
        message, code = f"{message}: try again in {answer.headers.get('Retry-After', 'some')} s", 1
    return ServerError(message, answer.status, code)
