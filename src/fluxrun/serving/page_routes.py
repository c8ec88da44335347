"""The page at ``/``, and what only it asks for: two pictures compared, sweeps."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import FileResponse

from fluxrun.formatting import shorten
from fluxrun.paths import PACKAGE
from fluxrun.report.fidelity import distance, missing
from fluxrun.serving.messages import Comparison, SweepRequest, SweepStatus
from fluxrun.serving.routes import REFUSALS, Found
from fluxrun.serving.service import NoSuchThing, Service
from fluxrun.serving.sweeps import Sweep

PAGE = PACKAGE / "serving" / "page"

REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'self'"
"""A report holds all that it shows; it may load nothing and run nothing."""

router = APIRouter(responses=REFUSALS)


@router.get("/", include_in_schema=False)
def page() -> FileResponse:
    """The page."""
    return FileResponse(PAGE / "index.html", headers={"Cache-Control": "no-cache"})


@router.get("/static/{name}", include_in_schema=False)
def static(name: str) -> FileResponse:
    """One of the page's files."""
    found = {path.name: path for path in PAGE.iterdir()}.get(name)
    if found is None:
        raise NoSuchThing("no such file of the page's")
    return FileResponse(found, headers={"Cache-Control": "no-cache"})


@router.get("/api/compare")
async def compare(
    service: Found, a: Annotated[str, Query(max_length=200)], b: Annotated[str, Query(max_length=200)]
) -> Comparison:
    """How far two pictures, each ``RUN/images/FILE``, are apart."""
    paths = [_picture(service, name) for name in (a, b)]
    if reason := missing():
        return Comparison(reason=reason)
    found = await asyncio.to_thread(distance, *paths)
    if found is None:
        return Comparison(reason="they differ in size")
    equal = math.isinf(found.psnr_db)
    return Comparison(psnr_db=None if equal else found.psnr_db, ssim=found.ssim, equal=equal)


def _picture(service: Service, name: str) -> Path:
    run, _, file = name.partition("/")
    path = service.history.file(run, file)
    if path is None or not file.startswith("images/"):
        raise NoSuchThing(f"no picture {shorten(name, 40)!r}")
    return path


# --- sweeps ---------------------------------------------------------------------------------------------------------


def _sweep(service: Service, name: str) -> Sweep:
    found = service.sweeps.known.get(name)
    if found is None:
        raise NoSuchThing(f"no sweep {shorten(name, 40)!r} in this server's memory")
    return found


@router.post("/api/sweeps", status_code=202)
async def add(service: Found, asked: SweepRequest) -> SweepStatus:
    """Draw every combination of the axes, one after the other."""
    return (await service.sweeps.add(asked.overrides, asked.axes)).status()


@router.get("/api/sweeps")
def sweeps(service: Found) -> list[dict[str, Any]]:
    """This server's sweeps, the newest first."""
    found = [sweep.status() for sweep in reversed(service.sweeps.known.values())]
    return [{"id": one.id, "state": one.state, "jobs": len(one.jobs), "report": one.report} for one in found]


@router.get("/api/sweeps/{name}")
def sweep(service: Found, name: str) -> SweepStatus:
    """A sweep's jobs as they stand."""
    return _sweep(service, name).status()


@router.delete("/api/sweeps/{name}", status_code=202)
async def stop(service: Found, name: str) -> SweepStatus:
    """Stop the job that is being drawn, and begin no further one."""
    found = _sweep(service, name)
    service.sweeps.stop(found)
    return found.status()


@router.get("/api/sweeps/{name}/report", response_class=FileResponse)
def report(service: Found, name: str) -> FileResponse:
    """The sweep's report.html."""
    path = service.sweeps.report(name)
    if path is None:
        raise NoSuchThing("no report: the sweep is not done, or what reports need is not installed")
    return FileResponse(path, headers={"Content-Security-Policy": REPORT_POLICY})
