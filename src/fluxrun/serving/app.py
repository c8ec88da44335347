"""The HTTP application: routes, what is said of errors, and the guard before all of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from fluxrun.errors import FluxrunError, OptionUnavailable, TrustError, one_line
from fluxrun.formatting import shorten
from fluxrun.serving import images_api, routes
from fluxrun.serving.guard import Guard, Refusal
from fluxrun.serving.runs import QueueFull
from fluxrun.serving.service import NoSuchThing, Service, Settings
from fluxrun.serving.uploads import TooLarge
from fluxrun.version import __version__

log = logging.getLogger("fluxrun.serve")


def make_app(settings: Settings) -> FastAPI:
    """The application of one server; its service is ``app.state.service``."""
    service = Service(settings)
    app = FastAPI(
        title="fluxrun",
        version=__version__,
        description="A warm worker for FLUX.2: see docs/serving.md.",
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
        lifespan=_lifespan,
    )
    app.state.service = service
    app.include_router(routes.router)
    app.include_router(images_api.router)
    for kind in (FluxrunError, NoSuchThing, Refusal, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _explain)
    app.add_middleware(Guard, access=settings.access, body_limit=settings.limits.body)
    return app


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """While the server is there its queue is worked on; at its end no child is left."""
    runs = app.state.service.runs
    working = asyncio.create_task(runs.work())
    try:
        yield
    finally:
        await runs.stop()
        working.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await working


async def _explain(request: Request, error: Exception) -> JSONResponse:
    """One line for every error, in one shape; nothing of what only the server's log should say."""
    status, kind, message = _answer_of(error)
    headers = {}
    if isinstance(error, QueueFull):
        headers["Retry-After"] = str(request.app.state.service.runs.retry_after_s())
    elif isinstance(error, HTTPException) and error.headers:
        headers = dict(error.headers)
    problem = {"message": message, "type": kind, "exit_code": getattr(error, "exit_code", 2)}
    return JSONResponse({"error": problem}, status, headers)


def _answer_of(error: Exception) -> tuple[int, str, str]:
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:]) or "the body"
        return 422, "invalid", shorten(f"{where}: {first['msg']}", 300)
    if isinstance(error, HTTPException):
        return error.status_code, "refused", str(error.detail)
    if isinstance(error, Refusal):
        return error.status, "refused", str(error)
    if isinstance(error, NoSuchThing):
        return 404, "not_found", str(error)
    statuses = {QueueFull: 429, TooLarge: 413, TrustError: 403, OptionUnavailable: 400}
    return statuses.get(type(error), 400), type(error).__name__, one_line(error)
