"""What goes over the wire: requests and answers as types, and with them the OpenAPI document."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Problem(BaseModel):
    """Why there is no other answer, in one line; ``exit_code`` is what the command line would end with."""

    message: str
    type: str
    exit_code: int


class Refused(BaseModel):
    """Any answer of 400 and above."""

    error: Problem


class RunRequest(BaseModel):
    """A run, in the command line's words."""

    model_config = ConfigDict(extra="forbid")

    overrides: list[str] = Field(examples=[["prompt=a red circle", "seed=3"]])
    """``key=value`` and ``group=option``; files are named ``upload:HASH.png``."""


class Login(BaseModel):
    """The token, which a browser gets back as a cookie that no script can read."""

    model_config = ConfigDict(extra="forbid")

    token: str


class RunStatus(BaseModel):
    """A run as it stands."""

    id: str
    state: Literal["queued", "drawing", "completed", "failed", "interrupted", "refused", "cancelled"]
    error: str | None = None
    exit_code: int | None = None
    """The command line's, once it has ended."""
    prompt: str = ""
    overrides: list[str] = []
    weights_loaded: int = 0
    """How often weights were loaded for it."""
    seconds: float | None = None
    """From its beginning to its end, waiting left out."""
    record: dict[str, Any] | None = None
    """run.json, as far as it is."""


class RunSummary(BaseModel):
    """A run of the past, for a list."""

    id: str
    state: str
    prompt: str
    seed: int | None
    images: list[str]
    started_at: str


class History(BaseModel):
    """Runs of the output folder, the newest first."""

    runs: list[RunSummary]
    total: int
    """How many fit the search."""


class Uploaded(BaseModel):
    """A file that was taken."""

    name: str
    """What a request writes in the place of a path."""


class ImagesRequest(BaseModel):
    """OpenAI's request for pictures; what fluxrun knows nothing of (quality, style, user) is ignored."""

    prompt: str
    model: str | None = None
    n: int | None = Field(1, ge=1, le=10)
    size: str | None = Field(None, examples=["256x256", "auto"])
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    seed: int | None = None
    """fluxrun's own, as are the overrides."""
    overrides: list[str] = []


class ImageAnswer(BaseModel):
    """One picture, as bytes or by its address."""

    b64_json: str | None = None
    url: str | None = None


class ImagesAnswer(BaseModel):
    """OpenAI's answer."""

    created: int
    data: list[ImageAnswer]
