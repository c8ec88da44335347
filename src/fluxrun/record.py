"""run.json: what was asked, what ran, why the two differ, and what each part cost."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import statistics
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fluxrun.errors import ConfigError, FluxrunError, Interrupted, one_line
from fluxrun.picture import pixel_hash, save_image

if TYPE_CHECKING:
    from PIL.Image import Image

    from fluxrun.config import RunConfig
    from fluxrun.machine import Machine
    from fluxrun.plan import Plan

log = logging.getLogger("fluxrun.record")

PATIENCE_S = 2.0
"""What a second signal waits at most for the picture that is being written; as a rule a tenth of that."""
Status = Literal["running", "completed", "failed", "interrupted"]


class RecordModel(BaseModel):
    """What all parts of the record share."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class FallbackRecord(RecordModel):
    """An option that could not be used, or only a part of it."""

    option: str
    stage: Literal["requires", "apply", "first_call"]
    """When it showed: before loading, while it was applied, or at the first real call."""
    reason: str
    error_type: str | None = None


class OptionRecord(RecordModel):
    """One option group: asked for, used, why they differ, and what was counted."""

    requested: str
    effective: str
    fallbacks: list[FallbackRecord] = []
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


class MemoryRecord(RecordModel):
    """Peak memory in bytes: allocated on a GPU, resident set size on a CPU."""

    peak_allocated_bytes: int = 0
    by_stage: dict[str, int] = {}


class ErrorRecord(RecordModel):
    """What ended a run that was not completed; the traceback is in fluxrun.log."""

    type: str
    message: str
    stage: str


class ImageRecord(RecordModel):
    """One saved image; ``sha256`` is of its RGB pixels, so it does not change with the file's metadata."""

    path: str
    prompt: str
    seed: int
    width: int
    height: int
    sha256: str


class RunRecord(RecordModel):
    """A run folder's run.json."""

    schema_version: Literal[1] = 1
    run_id: str
    status: Status = "running"
    error: ErrorRecord | None = None
    command: list[str] = []
    cwd: str | None = None
    """Where the run was started: what relative paths in its config are relative to. Not in the images."""
    started_at: str
    finished_at: str | None = None
    config: dict[str, Any]
    config_hash: str
    options: dict[str, OptionRecord] = {}
    notes: list[str] = []
    timings: Timings = Field(default_factory=Timings)
    memory: MemoryRecord = Field(default_factory=MemoryRecord)
    environment: dict[str, Any] = {}
    images: list[ImageRecord] = []


class RunFolder:
    """A folder for one run: ``run.json``, ``images/``, ``fluxrun.log``; written after every image, atomically."""

    def __init__(self, path: Path, config: RunConfig, command: Sequence[str] = ()) -> None:
        """Claim ``path``. Raises ConfigError if it holds another run or cannot be written."""
        self.path = path
        self.record = RunRecord(
            run_id=uuid.uuid4().hex[:12],
            command=list(command),
            cwd=os.getcwd(),
            started_at=_now(),
            config=plain(config.source),
            config_hash=config_hash(config),
        )
        self._saving = threading.Lock()
        """Held while a picture is written and added to the record."""
        self._writing = threading.RLock()
        """Held while run.json is replaced: an older text must not come after a newer one."""
        self._closed = False
        self._claim()

    def _claim(self) -> None:
        try:
            # The folder for the images first: somebody else's is then refused before anything is written.
            (self.path / "images").mkdir(parents=True)
            with open(self.path / "run.json", "x", encoding="utf-8") as file:
                file.write(self.record.model_dump_json(indent=1))
        except FileExistsError as error:
            raise ConfigError(f"{self.path} already holds a run: choose another hydra.run.dir, or remove it") from error
        except OSError as error:
            raise ConfigError(f"cannot write to the output folder {self.path}: {error.strerror or error}") from error

    def write(self) -> None:
        """Write run.json as it stands."""
        with self._writing:
            write_atomically(self.path / "run.json", self.record.model_dump_json(indent=1))

    def plan(self, plan: Plan) -> None:
        """Take over the plan's choices: requested, effective, fallbacks, facts."""
        self.record.options = {
            group: OptionRecord(
                requested=choice.requested,
                effective=choice.effective,
                fallbacks=[FallbackRecord(**vars(f)) for f in choice.fallbacks],
                facts=plain(choice.facts),
            )
            for group, choice in plan.choices.items()
        }
        self.record.notes = list(plan.notes)

    def save(self, number: int, image: Image, prompt: str, seed: int, output_format: str) -> Path:
        """Save the run's picture ``number`` with its metadata, and add it to the record; returns its path.

        Not on the main thread: there a signal's ``abandon`` waits for the picture that is being written.
        """
        with self._saving:
            if self._closed:
                raise Interrupted("the run has ended")
            started = time.perf_counter()
            path, saved = self._save(number, image, prompt, seed, output_format)
            self.record.timings.save_s.append(time.perf_counter() - started)
            self.record.images.append(saved)
            self.write()
        return path

    def _save(self, number: int, image: Image, prompt: str, seed: int, output_format: str) -> tuple[Path, ImageRecord]:
        path = self.path / "images" / f"{number:03d}_seed{seed}.{'jpg' if output_format == 'jpeg' else output_format}"
        metadata = {
            "prompt": prompt,
            "seed": seed,
            "run_id": self.record.run_id,
            "config": self.record.config,
            "environment": self.record.environment,
        }
        save_image(image, path, metadata, output_format)
        return path, ImageRecord(
            path=str(path.relative_to(self.path)),
            prompt=prompt,
            seed=seed,
            width=image.width,
            height=image.height,
            sha256=pixel_hash(image),
        )

    def finish(self, status: Status, error: BaseException | None = None, stage: str = "") -> None:
        """Close the record with its status."""
        self.record.status = status
        self.record.finished_at = _now()
        if error is not None:
            self.record.error = ErrorRecord(type=type(error).__name__, message=one_line(error), stage=stage)
        self.write()

    def abandon(self, error: BaseException, stage: str) -> None:
        """Close the record from within a signal handler: the picture being written is finished, if that is soon."""
        self._closed = True
        self._saving.acquire(timeout=PATIENCE_S)  # and kept: nothing is saved any more
        self.finish("interrupted", error, stage)
        for unfinished in (*self.path.glob(".run.json.*"), *self.path.glob("images/.*.part")):
            unfinished.unlink(missing_ok=True)


def write_failure(folder: Path, data: dict[str, Any], error: BaseException) -> bool:
    """Record a run that failed before it had a record, or whose process died; returns whether there was need to.

    ``data`` is the config as far as it got: it may be what is wrong.
    """
    path = folder / "run.json"
    if path.exists():
        record = read_record(folder)
        if record.status != "running":
            return False
    else:
        folder.mkdir(parents=True, exist_ok=True)
        record = RunRecord(
            run_id=uuid.uuid4().hex[:12], started_at=_now(), config=plain(data), config_hash=data_hash(data)
        )
    record.status, record.finished_at = status_of(error), _now()
    record.error = ErrorRecord(type=type(error).__name__, message=one_line(error), stage="prepare")
    write_atomically(path, record.model_dump_json(indent=1))
    return True


def spread(values: Sequence[float]) -> Spread | None:
    """Median, minimum, maximum and count, or None for no values."""
    if not values:
        return None
    return Spread(median=statistics.median(values), min=min(values), max=max(values), n=len(values))


def write_atomically(path: Path, text: str) -> None:
    """Replace ``path`` in one step: a reader, or a kill, sees the old text or the new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_record(folder: Path) -> RunRecord:
    """The record of a run folder. Raises ConfigError if there is none or it does not follow the schema."""
    from pydantic import ValidationError

    path = folder / "run.json"
    try:
        return RunRecord.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{folder} is not a run folder: it has no run.json") from error
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as a fluxrun record: {one_line(error)}") from error


def config_hash(config: RunConfig) -> str:
    """Hash of the resolved config: equal for equal runs, whatever the command was."""
    return data_hash(config.source)


def data_hash(data: dict[str, Any]) -> str:
    """The same hash of a config that is plain data, and may be wrong."""
    return hashlib.sha256(json.dumps(plain(data), sort_keys=True).encode()).hexdigest()[:16]


def plain(value: Any) -> Any:
    """A value as JSON can hold it: paths and other objects as text, tuples as lists."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)


def environment(machine: Machine) -> dict[str, Any]:
    """Versions and hardware, as every record and image carries them."""
    from fluxrun import __version__

    gpu = machine.gpu
    return {
        "fluxrun": __version__,
        "git_commit": git_commit(),
        "python": machine.python,
        "platform": machine.platform,
        "device": machine.device,
        "cpu": machine.cpu,
        "cpu_count": machine.cpu_count,
        "ram_bytes": machine.ram_bytes,
        "gpu": gpu.name if gpu else None,
        "gpu_memory_bytes": gpu.memory_bytes if gpu else None,
        "driver": machine.driver,
        "cuda": machine.torch_cuda,
        **{name.replace("-", "_"): version for name, version in machine.packages.items()},
    }


def git_commit() -> str | None:
    """The commit of the source checkout fluxrun runs from, or None for an installed package."""
    from fluxrun.paths import PACKAGE

    root = PACKAGE.parents[1]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def status_of(error: BaseException) -> Status:
    """The record's status for what ended a run."""
    return "interrupted" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed"


def exit_code_of(error: BaseException) -> int:
    """The process's exit code for what ended a run."""
    return error.exit_code if isinstance(error, FluxrunError) else 130 if isinstance(error, KeyboardInterrupt) else 1


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
