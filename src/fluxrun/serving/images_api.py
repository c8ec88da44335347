"""``/v1``: OpenAI's shape of asking for pictures, so that existing clients work."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import time
from typing import Any

from fastapi import APIRouter, Request

from fluxrun.errors import ConfigError
from fluxrun.formatting import shorten
from fluxrun.serving.guard import Refusal
from fluxrun.serving.messages import ImageAnswer, ImagesAnswer, ImagesRequest, Refused
from fluxrun.serving.routes import REFUSALS, Found
from fluxrun.serving.runs import Run
from fluxrun.serving.service import Service

LOOK_S = 0.5
"""How often it is looked whether the client is still there."""

router = APIRouter(
    prefix="/v1",
    responses={
        **REFUSALS,
        409: {"model": Refused, "description": "The run was stopped"},
        503: {"model": Refused, "description": "The process that draws has died; it is started again"},
        507: {"model": Refused, "description": "Out of memory: the message says what would fit"},
    },
)


@router.get("/models")
def models(service: Found) -> dict[str, Any]:
    """The models that this server draws with."""
    found = [{"id": name, "object": "model", "created": 0, "owned_by": "fluxrun"} for name in service.settings.models]
    return {"object": "list", "data": found}


@router.post("/images/generations")
async def generate(service: Found, request: Request, asked: ImagesRequest) -> ImagesAnswer:
    """Draw pictures and wait for them; a client that goes away stops its run."""
    run = await service.runs.add(_overrides(asked, service.settings.models))
    await _wait(run, request, service)
    refuse_what_failed(run)
    record = service.history.record(run.id) or {}
    pictures = [str(image["path"]) for image in record.get("images", [])]
    as_url = asked.response_format == "url"
    data = [_address(request, run, path) if as_url else await _bytes(service, run, path) for path in pictures]
    return ImagesAnswer(created=int(time.time()), data=data)


def _overrides(asked: ImagesRequest, models: tuple[str, ...]) -> list[str]:
    """The request in the command line's words; the first model of the list is the one that is not named."""
    model = asked.model or models[0]
    if model not in models:
        raise ConfigError(f"model={shorten(model)}: this server draws with {', '.join(models)}")
    named = {
        "prompt": asked.prompt,
        "num_images": asked.n or 1,
        "output_format": asked.output_format,
        "seed": asked.seed,
    }
    if asked.size not in (None, "auto"):
        width, _, height = str(asked.size).partition("x")
        if not (width.isdecimal() and height.isdecimal()):
            raise ConfigError(f"size={shorten(asked.size)}: must be WIDTHxHEIGHT in pixels, or auto")
        named |= {"width": width, "height": height}
    return [f"model={model}", *asked.overrides, *(f"{k}={v}" for k, v in named.items() if v is not None)]


async def _wait(run: Run, request: Request, service: Service) -> None:
    """Until the run has ended, or the client has gone: then it is stopped."""
    waiting = asyncio.ensure_future(run.wait())
    try:
        while not (await asyncio.wait({waiting}, timeout=LOOK_S))[0]:
            if await request.is_disconnected():
                service.runs.cancel(run)
                return
    finally:
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting


def refuse_what_failed(run: Run) -> None:
    if run.state == "completed":
        return
    status = {"OutOfMemory": 507, "WorkerDied": 503, "Interrupted": 409}.get(run.error_type or "", 400)
    raise Refusal(409 if run.state == "cancelled" else status, run.error or f"the run was {run.state}")


async def _bytes(service: Service, run: Run, path: str) -> ImageAnswer:
    file = service.history.file(run.id, path)
    assert file is not None
    data = await asyncio.to_thread(file.read_bytes)
    return ImageAnswer(b64_json=base64.b64encode(data).decode())


def _address(request: Request, run: Run, path: str) -> ImageAnswer:
    return ImageAnswer(url=f"{request.base_url}api/runs/{run.id}/files/{path}")
