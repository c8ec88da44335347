"""run.json as types: what was asked, what ran, why the two differ, and what each part cost."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

Status = Literal["running", "completed", "failed", "interrupted"]
Stage = Literal["requires", "apply", "first_call"]


class RecordModel(BaseModel):
    """What all parts of the record share."""

    model_config = ConfigDict(extra="forbid")


class Fallback(RecordModel):
    """An option that could not be used, or only in part."""

    model_config = ConfigDict(frozen=True)

    option: str
    stage: Stage
    """When it showed: before loading, while it was applied, or at the first real call."""
    reason: str
    error_type: str | None = None


def replacement(fallback: Fallback, effective: str) -> str:
    """What an option fell back to, for people: it may have kept its name and lost a knob."""
    return "a part of it" if fallback.option == effective else effective


class Chosen(RecordModel):
    """One option group: asked for, used, and why they differ."""

    requested: str
    effective: str
    fallbacks: list[Fallback] = []

    @property
    def fell_back(self) -> bool:
        """Whether something else runs than what was asked for; a choice of ``auto`` is no fallback."""
        return bool(self.fallbacks)


class OptionRecord(Chosen):
    """One option group in a run's record: the choice, and what was counted."""

    facts: dict[str, Any] = {}


class Spread(RecordModel):
    """Statistics of repeated measurements, in seconds."""

    median: float
    min: float
    max: float
    n: int


class Timings(RecordModel):
    """Seconds. Lists have one entry per prompt (text_encode_s) or per image drawn."""

    import_s: float = 0.0
    """Importing torch, diffusers and transformers; next to nothing after the first run of a process."""
    load_s: float = 0.0
    apply_s: float = 0.0
    first_call_s: float | None = None
    """The very first denoising step, compiling included."""
    compile_s: float = 0.0
    text_encode_s: list[float] = []
    step_s: list[list[float]] = []
    denoise_s: list[float] = []
    decode_s: list[float] = []
    save_s: list[float] = []
    total_s: float = 0.0
    steady_step_s: Spread | None = None
    """All steps but the first one after a build."""

    def add(self, line: ImageLine) -> None:
        """Take over what a line of images.jsonl says."""
        self.save_s.append(line.save_s)
        self.text_encode_s += line.text_encode_s
        for call in line.calls:
            self.step_s.append(call.step_s)
            self.denoise_s.append(call.denoise_s)
            self.decode_s.append(call.decode_s)


class SpanRecord(RecordModel):
    """One part of a run, in seconds since its process began; parts may overlap.

    ``interpreter`` (Python's own start), ``compose`` (the config), ``import``, ``plan``, ``load`` (weights), ``apply``
    (options), ``noise`` (by the CPU, ahead), ``encode`` (prompts), ``first call`` (the first step of a pipeline),
    ``steps``, ``decode``, ``save``, ``close``. In a sweep they are in the record of the job that had to wait for them.
    """

    name: str
    start_s: float
    end_s: float


class MemoryRecord(RecordModel):
    """Memory in bytes: allocated on a GPU, resident set size on a CPU."""

    start_bytes: int | None = None
    """In use when the built pipeline begins to draw: the weights. What the peak is above it is working memory."""
    peak_allocated_bytes: int = 0
    by_stage: dict[str, int] = {}
    """The peak of each stage; on a CPU of everything up to its end."""
    by_rank_bytes: list[int] = []
    """The peak of each process, where several draw a picture together (parallel); the others are the first one's."""


class Asked(Protocol):
    """One image of those that a run is to have."""

    @property
    def prompt(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def line(self) -> int: ...
    @property
    def number(self) -> int: ...
    @property
    def index(self) -> int:
        """Its place among the run's images, which its file is named after."""


class ErrorRecord(RecordModel):
    """What ended a run that was not completed; the traceback is in fluxrun.log."""

    type: str
    message: str
    stage: str


class SavedImage(RecordModel):
    """One saved image; ``sha256`` is of its RGB pixels, so it does not change with the file's metadata."""

    path: str
    prompt: str
    seed: int
    sha256: str
    finite: bool = True
    """Whether its latents and pixels were numbers; where not (NaN, infinite), the run failed and nothing ranks it."""
    constant: bool = False
    """Whether all of its pixels have one colour."""


class ImageRecord(SavedImage):
    """One saved image of a run, with its size in pixels; the path is relative to the run's folder."""

    width: int
    height: int
    compressed_by: str | None = None
    """What wrote the file: ``isal`` or ``zlib`` (PNG), ``pillow`` (JPEG, WebP)."""
    file_bytes: int | None = None
    """The file's size."""
    line: int | None = None
    """Its prompt's line in the prompts file (of YAML, and of a list on the command line: its place), from 1."""
    number: int | None = None
    """Which picture of that prompt it is, from 1."""

    @property
    def identity(self) -> tuple[int, int] | None:
        """Which of the run's pictures it is: two equal lines are two pictures. None in a record of version 1."""
        return None if self.line is None or self.number is None else (self.line, self.number)


class Call(RecordModel):
    """One call of the pipeline, in seconds."""

    step_s: list[float]
    denoise_s: float
    decode_s: float


class ImageLine(ImageRecord):
    """A line of images.jsonl: one saved image, and what was measured since the line before it."""

    save_s: float
    calls: list[Call] = []
    """The calls of the pipeline; none for the further images of a batch."""
    text_encode_s: list[float] = []

    def image(self) -> ImageRecord:
        """The image alone, as run.json lists it."""
        return ImageRecord.model_construct(**{name: getattr(self, name) for name in ImageRecord.model_fields})


class InputRecord(RecordModel):
    """A picture that the run was given; ``sha256`` is of its RGB pixels."""

    key: str
    """The config key that names its file."""
    path: str
    sha256: str
    width: int
    height: int


class RunRecord(RecordModel):
    """A run folder's run.json.

    While a run draws, and where it has drawn more than 100 images, what grows with each of them is in images.jsonl.
    """

    schema_version: Literal[1, 2] = 2
    """1: all images are in ``images``, and the fields that came with 2 are missing."""
    run_id: str
    status: Status = "running"
    error: ErrorRecord | None = None
    command: list[str] = []
    cwd: str | None = None
    """Where the run was started: what relative paths in its config are relative to. Not in the images."""
    started_at: str
    finished_at: str | None = None
    resumed_at: list[str] = []
    """When it went on after an end (``resume=FOLDER``)."""
    config: dict[str, Any]
    config_hash: str
    signature: str | None = None
    """Of ``config`` and ``cwd``, by a key of this user's: ``fluxrun rerun`` knows its own records by it."""
    options: dict[str, OptionRecord] = {}
    notes: list[str] = []
    timings: Timings = Field(default_factory=Timings)
    spans: list[SpanRecord] = []
    """When each part began and ended, up to the last writing of this file."""
    memory: MemoryRecord = Field(default_factory=MemoryRecord)
    environment: dict[str, Any] = {}
    inputs: list[InputRecord] = []
    """The pictures that were edited, or looked at, as they were read."""
    images_asked: int | None = None
    """How many images the run is to have."""
    images_saved: int = 0
    """How many it had when this file was written."""
    images_file: Literal["images.jsonl"] | None = None
    """The file that lists the images, with the times that ``timings`` has lists of; null: this one does."""
    images: list[ImageRecord] = []


def spread(values: Sequence[float]) -> Spread | None:
    """Median, minimum, maximum and count, or None for no values."""
    if not values:
        return None
    return Spread(median=statistics.median(values), min=min(values), max=max(values), n=len(values))
