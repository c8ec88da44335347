"""``fluxrun serve``: a warm worker behind HTTP; ``--stop`` and ``--status`` reach the one that is running."""

from __future__ import annotations

import os
import secrets
import signal
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from fluxrun.cli.arguments import one_line_parser
from fluxrun.errors import ConfigError, FluxrunError
from fluxrun.paths import expanded
from fluxrun.process.console import console
from fluxrun.serving.connection import Server
from fluxrun.serving.limits import parse_limits
from fluxrun.serving.state import ServerState, running, state_file

PORT = 8484

STOP_S = 60.0
"""How long ``--stop`` waits for the server's end: a step of a large picture takes a while."""


def command(arguments: Sequence[str]) -> int:
    """``fluxrun serve``: keep a pipeline warm and draw what is asked over HTTP. See docs/serving.md."""
    options = _parse(arguments)
    if options.stop or options.status:
        state = running()
        if state is None:
            raise FluxrunError(f"no server of yours is running ({state_file()})")
        return _stop(state) if options.stop else _status(state)
    if (state := running()) is not None:
        raise ConfigError(f"a server of yours is running already (process {state.pid}): fluxrun serve --stop ends it")
    return _serve(options)


def _parse(arguments: Sequence[str]) -> Namespace:
    parser = one_line_parser("serve", command.__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; others than loopback need a token")
    parser.add_argument("--port", type=int, default=PORT, help=f"default {PORT}; 0: any free one")
    parser.add_argument("--socket", help="a UNIX socket (0600) instead of host and port")
    parser.add_argument("--name", action="append", default=[], help="a further host name that it is reached by")
    parser.add_argument("--token", action="store_true", help="ask for a token on loopback, too")
    parser.add_argument("--output", default="outputs/serve", help="the folder of runs, uploads and serve.log")
    parser.add_argument(
        "--models",
        nargs="+",
        default=["shapes", "tiny"],
        help="model options, folders and hub ids that may be drawn with",
    )
    parser.add_argument("--limit", action="append", default=[], metavar="NAME=VALUE", help="for example queue=8")
    parser.add_argument("--idle-minutes", type=float, help="end the worker after so long without a request")
    parser.add_argument("--stop", action="store_true", help="end the server that is running")
    parser.add_argument("--status", action="store_true", help="say what the server that is running does")
    return parser.parse_args(list(arguments))


def _serve(options: Namespace) -> int:
    if missing := _missing():
        raise ConfigError(f"fluxrun serve needs {missing}: pip install 'fluxrun[serve]'")
    from fluxrun.serving.guard import Access, is_loopback
    from fluxrun.serving.server import serve
    from fluxrun.serving.service import Settings

    if not 0 <= options.port < 65536:
        raise ConfigError(f"--port {options.port}: must be 0 to 65535")
    if options.idle_minutes is not None and not options.idle_minutes > 0:
        raise ConfigError(f"--idle-minutes {options.idle_minutes}: must be more than 0")
    needs_token = options.token or not (options.socket or is_loopback(options.host))
    token = secrets.token_urlsafe(32) if needs_token else None
    host = "localhost" if options.socket else options.host
    settings = Settings(
        access=Access(host, options.port, token, tuple(options.name)),
        output=Path(os.path.realpath(expanded(options.output))),
        models=tuple(options.models),
        limits=parse_limits(options.limit),
        idle_s=options.idle_minutes and options.idle_minutes * 60,
    )
    serve(settings, Path(os.path.realpath(expanded(options.socket))) if options.socket else None)
    return 0


def _missing() -> str | None:
    from importlib.util import find_spec

    return next((name for name in ("fastapi", "uvicorn") if find_spec(name) is None), None)


def _stop(state: ServerState) -> int:
    os.kill(state.pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_S
    while running() is not None:
        if time.monotonic() > deadline:
            raise FluxrunError(f"process {state.pid} has not ended after {STOP_S:.0f} s")
        time.sleep(0.05)
    _say(f"stopped (process {state.pid})")
    return 0


def _status(state: ServerState) -> int:
    status = Server("auto").ask("GET", "/api/status")
    worker = status["worker"]
    _say(f"{state.socket or state.url}: process {state.pid}, fluxrun {status['version']}")
    _say(f"draws with {', '.join(status['models'])}; runs go to {state.output}")
    _say(f"waiting: {status['waiting']}, drawing: {status['drawing'] or 'nothing'}")
    memory = (
        "not running" if worker["pid"] is None else f"process {worker['pid']}, {worker['rss_bytes'] / 2**20:.0f} MB"
    )
    _say(f"worker: {memory}")
    if state.token:
        _say(f"requests need the token in {state_file()}")
    return 0


def _say(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
