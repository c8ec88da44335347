"""``/api``: runs in the command line's words, their events, files and history."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

import psutil
from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import FileResponse, StreamingResponse

from fluxrun.serving.guard import Refusal
from fluxrun.serving.messages import History, Login, Refused, RunRequest, RunStatus, Uploaded
from fluxrun.serving.runs import Run
from fluxrun.serving.service import NoSuchThing, Service, service_of
from fluxrun.version import __version__

HEARTBEAT_S = 15.0

Found = Annotated[Service, Depends(service_of)]

REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": Refused, "description": "What was asked cannot be"},
    401: {"model": Refused, "description": "A token is needed"},
    403: {"model": Refused, "description": "A request may not ask for that"},
    404: {"model": Refused, "description": "Nothing of that name"},
    413: {"model": Refused, "description": "Too large"},
    415: {"model": Refused, "description": "Not JSON"},
    421: {"model": Refused, "description": "A foreign Host"},
    422: {"model": Refused, "description": "Not of the right form"},
    429: {"model": Refused, "description": "Too many requests are waiting (Retry-After)"},
}

router = APIRouter(prefix="/api", responses=REFUSALS)


@router.get("/status")
def status(service: Found) -> dict[str, Any]:
    """The server: what it draws with, what waits, and its worker process."""
    runs = service.runs
    return {
        "version": __version__,
        "models": list(service.settings.models),
        "waiting": runs.waiting,
        "drawing": runs.current.id if runs.current else None,
        "worker": {
            "pid": runs.child.pid,
            "starts": runs.child.starts,
            "rss_bytes": _resident(runs.child.pid),
        },
    }


def _resident(pid: int | None) -> int | None:
    try:
        return int(psutil.Process(pid).memory_info().rss) if pid else None
    except psutil.Error:
        return None


@router.post("/login", status_code=204)
def login(service: Found, given: Login, response: Response) -> None:
    """Change the token for a cookie that no script can read and no other site's page can send."""
    access = service.settings.access
    if access.token is None:
        return
    if not access.knows(given.token):
        raise Refusal(401, "that is not the token")
    response.set_cookie(access.cookie, given.token, httponly=True, samesite="strict", path="/")


@router.get("/options")
def options(service: Found) -> dict[str, Any]:
    """Every option with what it is for, what it falls back to, and whether this machine can use it."""
    return service.options


@router.post("/plan")
async def plan(service: Found, asked: RunRequest) -> dict[str, Any]:
    """What would run here, and why not the rest; nothing is loaded."""
    accepted = await asyncio.to_thread(service.rules.check, asked.overrides)
    return await asyncio.to_thread(service.plan, accepted)


@router.post("/files", status_code=201, openapi_extra={"requestBody": {"content": {"application/octet-stream": {}}}})
async def upload(service: Found, request: Request, ending: Annotated[str, Query(max_length=20)]) -> Uploaded:
    """Take a picture, a mask, a LoRA or a list of prompts as bytes; a request names it by what this answers."""
    return Uploaded(name=await service.uploads.take(ending, request.stream()))


# --- runs -----------------------------------------------------------------------------------------------------------


@router.post("/runs", status_code=202)
async def add(service: Found, asked: RunRequest) -> RunStatus:
    """Put a run into the queue."""
    run = await service.runs.add(asked.overrides)
    return service.status(run.id)


@router.get("/runs")
def history(
    service: Found,
    search: Annotated[str, Query(max_length=200)] = "",
    offset: Annotated[int, Query(ge=0, lt=2**31)] = 0,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> History:
    """Runs of the output folder, the newest first."""
    found = service.history.search(search)
    return History(runs=found[offset : offset + limit], total=len(found))


@router.get("/runs/{run_id}")
def one(service: Found, run_id: str) -> RunStatus:
    """A run, with its record as far as it is."""
    return service.status(run_id)


@router.delete("/runs/{run_id}", status_code=202)
async def stop(service: Found, run_id: str) -> RunStatus:
    """Stop a run at its next step, while loading or compiling at once; asked again, at once in any case."""
    run = service.run(run_id)
    service.runs.cancel(run)
    return service.status(run_id)


@router.get("/runs/{run_id}/events", response_class=StreamingResponse)
async def events(service: Found, request: Request, run_id: str) -> StreamingResponse:
    """Server-sent events: state, stage, steps, step, line, picture. From its beginning, or after Last-Event-ID."""
    run = service.run(run_id)
    last = request.headers.get("last-event-id", "0")
    after = int(last) if last.isdecimal() and len(last) < 10 else 0
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_stream(run, after), media_type="text/event-stream", headers=headers)


async def _stream(run: Run, after: int) -> AsyncIterator[str]:
    """A run's events as text, with a comment now and then, by which a dead connection shows."""
    following = run.follow(after)
    while True:
        coming = asyncio.ensure_future(anext(following, None))
        try:
            while not (await asyncio.wait({coming}, timeout=HEARTBEAT_S))[0]:
                yield ": still there\n\n"
        finally:
            if not coming.done():
                coming.cancel()
        if (found := coming.result()) is None:
            return
        number, event = found
        yield f"id: {number}\nevent: {event['event']}\ndata: {json.dumps(event)}\n\n"


@router.get("/runs/{run_id}/files/{name:path}", response_class=FileResponse)
def file(service: Found, run_id: str, name: str) -> FileResponse:
    """A file of a run's folder: run.json, fluxrun.log, images/…"""
    path = service.history.file(run_id, name)
    if path is None:
        raise NoSuchThing("no such file in a run's folder")
    return FileResponse(path, headers={"Cache-Control": "no-cache"})
