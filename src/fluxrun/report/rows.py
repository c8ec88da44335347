"""What a sweep found: one row per job from its run.json, and the figures that compare jobs with the baseline."""

from __future__ import annotations

import csv
import io
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from fluxrun.config.catalog import is_neutral_option
from fluxrun.config.composition import shown
from fluxrun.errors import ConfigError
from fluxrun.reading import Unreadable, parse_yaml, read_text
from fluxrun.record.folder import read_record
from fluxrun.record.schema import Chosen, Fallback, ImageRecord, RunRecord, SavedImage, SpanRecord, Status
from fluxrun.types import JsonObject


@dataclass(frozen=True)
class GridJob:
    """One job as it will be composed: its overrides, the config as plain data, and that config's hash."""

    number: int
    overrides: tuple[str, ...]
    data: JsonObject
    config_hash: str
    for_hydra: tuple[str, ...] = ()
    """What Hydra composes it with; ``overrides`` are those among them that say what the job is."""


NOT_IN_A_ROW = {"path", *(ImageRecord.model_fields.keys() - SavedImage.model_fields.keys())}
"""What a record says of a picture and a table does not."""

BASELINE = "baseline"
"""The folder of a baseline that the sweep draws by itself; those of further prompts and seeds are ``baseline-2``, …"""

BASELINE_ELSEWHERE = "baseline run"
"""The name, in a sweep's table, of a run that is no job of it but its baseline (``sweep.baseline=FOLDER``)."""


class ResultModel(BaseModel):
    """What all parts of a sweep's result share; an infinite PSNR is written as the text ``Infinity``."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")


class Picture(SavedImage):
    """One saved image of a job; the path is relative to the sweep's folder."""

    model_config = ResultModel.model_config

    psnr_db: float | None = None
    """Against the baseline's picture of the same prompt and seed."""
    ssim: float | None = None
    shows_prompt: bool | None = None
    """On model=shapes: whether the picture shows all that was asked for."""


class Row(ResultModel):
    """One job. Times in seconds, memory in bytes."""

    job: str
    """Name of its folder inside the sweep's."""
    folder: str
    """The folder, relative to where the table is written."""
    status: Status | str
    """The run's status, ``pending`` for a job that has not begun."""
    reason: str | None = None
    """What ended a job that did not complete."""
    overrides: list[str] = []
    config_hash: str = ""
    config: dict[str, Any] = {}
    model: str = ""
    options: dict[str, Chosen] = {}
    steps: int | None = None
    size: list[int] = []
    """Height and width in pixels."""
    device: str = ""
    machine: str = ""
    load_s: float | None = None
    apply_s: float | None = None
    compile_s: float | None = None
    first_call_s: float | None = None
    """The first denoising step, compiling included."""
    step_s: float | None = None
    """Median of the steady steps: all but the first one after a build."""
    steps_measured: int = 0
    first_image_s: float | None = None
    """Denoising and decoding of the first image, compiling included."""
    image_s: float | None = None
    """Denoising and decoding of one image once everything is warm: the median."""
    fastest_image_s: float | None = None
    """The same, the fastest: what the machine does when nothing else disturbs it."""
    total_s: float | None = None
    peak_memory_bytes: int | None = None
    start_memory_bytes: int | None = None
    """Memory in use when the built pipeline began to draw: the weights, all that the sweep keeps among them."""
    spans: list[SpanRecord] = []
    """When each part began and ended, in seconds since its process began."""
    continued: bool = False
    """Drawn with the pipeline of the job before: nothing was built or compiled."""
    images: list[Picture] = []
    notes: list[str] = []
    is_baseline: bool = False
    speedup: float | None = None
    """Baseline's seconds per image over this job's."""
    psnr_db: float | None = None
    """The worst of its pictures."""
    ssim: float | None = None
    accuracy: float | None = None
    """Share of pictures that show their prompt (model=shapes)."""
    pays_after: int | None = None
    """Break-even: from how many images on they take no longer than with the baseline, the slower first one included."""

    def neutral(self, but: str = "") -> bool:
        """Whether only neutral options ran, and none of them as a fallback; the group ``but`` is not looked at."""
        groups = {group: chosen for group, chosen in self.options.items() if group not in ("model", but)}
        return bool(groups) and all(is_neutral_option(g, c.effective) and not c.fell_back for g, c in groups.items())

    @property
    def fallbacks(self) -> list[tuple[str, Fallback]]:
        """Every fallback with its group."""
        return [(group, fallback) for group, chosen in self.options.items() for fallback in chosen.fallbacks]


class Setting(ResultModel):
    """All jobs that differ in nothing but prompt and seed, as one: what a decision is about."""

    label: str
    jobs: list[str]
    status: str
    effective: dict[str, str]
    fell_back: list[str] = []
    step_s: float | None = None
    image_s: float | None = None
    first_image_s: float | None = None
    psnr_db: float | None = None
    ssim: float | None = None
    accuracy: float | None = None
    peak_memory_bytes: int | None = None
    speedup: float | None = None
    pays_after: int | None = None
    is_baseline: bool = False
    context: str = ""
    """What a fair comparison keeps equal: model, machine, size, steps, guidance."""
    on_front: bool = False
    """On the Pareto front: no other setting of this context is both faster and nearer to the baseline's pictures."""


class Totals(ResultModel):
    """Where the time went, in seconds."""

    wall_s: float = 0.0
    """From the sweep's start to its end, in the last process that worked on it."""
    loads: int = 0
    load_s: float = 0.0
    jobs_s: float = 0.0
    """All completed jobs, loading left out."""


class Result(ResultModel):
    """A sweep's sweep.json."""

    schema_version: Literal[1] = 1
    status: str
    """running, completed, failed (at least one job did), interrupted."""
    command: list[str] = []
    started_at: str = ""
    written_at: str = ""
    order: list[str] = []
    """Swept keys, the one that changes least often first."""
    baseline: str = "auto"
    totals: Totals = Totals()
    loads: list[str] = []
    """Why weights were loaded, in order."""
    problems: list[str] = []
    """What could not be compared or drawn, and why."""
    settings: list[Setting] = []
    jobs: list[Row] = []
    environments: list[dict[str, Any]] = []


# --- one job --------------------------------------------------------------------------------------------------------


def read_row(folder: Path, root: Path) -> Row:
    """The row of a run folder. Raises ConfigError where there is no readable record."""
    record = read_record(folder)
    timings = record.timings
    row = Row(
        job=folder.name,
        folder=_relative(folder, root),
        status=record.status,
        reason=f"{record.error.type}: {record.error.message}" if record.error else None,
        overrides=_overrides(folder),
        config_hash=record.config_hash,
        config=record.config,
        model=record.options["model"].effective if "model" in record.options else "",
        options={
            group: Chosen(requested=option.requested, effective=option.effective, fallbacks=option.fallbacks)
            for group, option in record.options.items()
        },
        steps=max(map(len, timings.step_s), default=0) or _count(record.config.get("steps")) or None,
        size=[record.images[0].height, record.images[0].width] if record.images else [],
        device=str(record.environment.get("device") or ""),
        machine=_machine(record),
        load_s=timings.load_s,
        apply_s=timings.apply_s,
        compile_s=timings.compile_s,
        first_call_s=timings.first_call_s,
        total_s=timings.total_s or None,
        peak_memory_bytes=record.memory.peak_allocated_bytes or None,
        start_memory_bytes=record.memory.start_bytes,
        spans=record.spans,
        continued=bool(timings.step_s) and timings.load_s == 0 and timings.apply_s == 0,
        notes=record.notes,
        images=[
            Picture(**i.model_dump(exclude=NOT_IN_A_ROW), path=_relative(folder / i.path, root)) for i in record.images
        ],
    )
    if all(image.finite for image in record.images):  # how soon a black picture comes is no speed
        _speeds(row, record)
    return row


def _speeds(row: Row, record: RunRecord) -> None:
    """Seconds per step and per image, first and steady; None where the job measured too little to tell."""
    timings, warmed = record.timings, _count(config_value(record.config, "measure.warmup")) > 0
    batch = max(1, min(_count(record.config.get("batch_size")), len(record.images)))
    calls = [(denoise + decode) / batch for denoise, decode in zip(timings.denoise_s, timings.decode_s, strict=False)]
    if not calls or row.steps is None:
        return
    steady = timings.steady_step_s
    row.step_s, row.steps_measured = (steady.median, steady.n) if steady else (None, 0)
    warm = calls if warmed or row.continued else calls[1:]
    decode = statistics.median(timings.decode_s)
    if warm:
        row.image_s, row.fastest_image_s = statistics.median(warm), min(warm)
    elif steady:
        row.image_s = row.fastest_image_s = (row.steps * steady.median + decode) / batch
    if not warmed:
        row.first_image_s = calls[0]
    elif timings.first_call_s is not None and steady:
        row.first_image_s = (timings.first_call_s + (row.steps - 1) * steady.median + decode) / batch


def _count(value: Any) -> int:
    """A number in a recorded config, 0 for anything else: the config is as it was asked for, and may be wrong."""
    return value if isinstance(value, int) else 0


def _overrides(folder: Path) -> list[str]:
    try:
        content = parse_yaml(read_text(folder / ".hydra" / "overrides.yaml"))
    except (FileNotFoundError, Unreadable):
        return []
    return shown([str(o) for o in content]) if isinstance(content, list) else []


def _machine(record: RunRecord) -> str:
    environment = record.environment
    return str(environment.get("gpu") or environment.get("cpu") or "")


def _relative(path: Path, root: Path) -> str:
    return Path(os.path.relpath(path.resolve(), root.resolve())).as_posix()


# --- labels ---------------------------------------------------------------------------------------------------------


def label(row: Row, rows: Sequence[Row]) -> str:
    """What tells this job from the others, as one text."""
    return " ".join(distinctive(row, rows)) or (ALL_THE_SAME if row.overrides else row.job)


ALL_THE_SAME = "all options as configured"


def distinctive(row: Row, rows: Sequence[Row]) -> list[str]:
    """Its overrides that not all jobs have in common, as ``key=value``; all of them when it is the only job."""
    others = [other for other in rows if other is not row and (other.config or other.overrides)]
    return [_readable(o, row) for o in row.overrides if not others or any(_differs(o, row, r) for r in others)]


def _differs(override: str, row: Row, other: Row) -> bool:
    """Whether what an override sets is something else in the other job; where no config tells, by its text."""
    key = _key(override)
    if key.partition(".")[0] not in row.config or not other.config:
        return override not in other.overrides
    return bool(config_value(row.config, key) != config_value(other.config, key))


def _readable(override: str, row: Row) -> str:
    """An override without Hydra's quoting: a text as it is, a list of texts with bars in between."""
    key = _key(override)
    text = isinstance(config_value(row.config, key), (str, list))
    return f"{key}={config_text(row.config, key)}" if text else override.lstrip("+")


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def config_text(config: JsonObject, key: str) -> str:
    """``config_value`` as text; nothing where there is no such key."""
    value = config_value(config, key)
    return " | ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)


def config_value(config: JsonObject, key: str) -> Any:
    """A config's value at a dotted key; of an option group, the option's name; None where there is no such key."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value.get("name", value) if isinstance(value, dict) else value


# --- the table ------------------------------------------------------------------------------------------------------


def by_speed(rows: Iterable[Row]) -> list[Row]:
    """Fastest first; jobs without a speed last."""
    return sorted(rows, key=lambda row: (row.status != "completed", row.image_s is None, row.image_s or 0.0))


def to_csv(rows: Sequence[Row]) -> str:
    """The table as CSV, one line per job, in the given order."""
    columns = [name for name in Row.model_fields if name not in ("config", "options", "images", "notes")]
    groups = sorted({group for row in rows for group in row.options})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    chosen_columns = [f"{group}_{what}" for group in groups for what in ("requested", "effective")]
    writer.writerow([*columns, "label", *chosen_columns, "fallbacks"])
    for row in rows:
        cells = [_cell(getattr(row, name)) for name in columns]
        chosen = [row.options.get(group) for group in groups]
        names = [name for c in chosen for name in ((c.requested, c.effective) if c else ("", ""))]
        reasons = "; ".join(f"{g}={f.option} ({f.stage}): {f.reason}" for g, f in row.fallbacks)
        writer.writerow([*cells, label(row, rows), *names, reasons])
    return text.getvalue()


def _cell(value: Any) -> Any:
    return "" if value is None else " ".join(map(str, value)) if isinstance(value, list) else value


def read_rows(folder: Path, root: Path) -> list[Row]:
    """The rows of every run folder inside a sweep's folder; a record that cannot be read becomes a failed row."""
    rows = []
    for path in run_folders(folder):
        try:
            rows.append(read_row(path, root))
        except ConfigError as error:
            rows.append(Row(job=path.name, folder=_relative(path, root), status="failed", reason=str(error)))
    return rows


def baseline_elsewhere(baseline: str, root: Path) -> list[Row]:
    """The row of ``sweep.baseline=FOLDER``; none where the baseline is something else."""
    folder = Path(baseline)
    if not os.path.isfile(folder / "run.json"):
        return []
    return [read_row(folder, root).model_copy(update={"job": BASELINE_ELSEWHERE})]


def is_baseline(path: Path) -> bool:
    """Whether a run folder is a baseline's that the sweep drew by itself."""
    return path.name.partition("-")[0] == BASELINE


def run_folders(folder: Path) -> list[Path]:
    """The folders of runs inside a sweep's folder, jobs in their order."""
    children = [path.parent for path in folder.glob("*/run.json")]
    return sorted(children, key=lambda path: (not path.name.isdigit(), path.name.zfill(9)))
