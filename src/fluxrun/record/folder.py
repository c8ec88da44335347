"""run.json: what was asked, what ran, why the two differ, and what each part cost."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxrun.atomic import write_atomically
from fluxrun.errors import ConfigError, Interrupted, one_line
from fluxrun.reading import Unreadable, first_problem, read_text
from fluxrun.record.picture import pixel_hash, save_image
from fluxrun.record.schema import ErrorRecord, ImageRecord, OptionRecord, RunRecord, Status

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger("fluxrun.record")

PATIENCE_S = 2.0
"""What a second signal waits at most for the picture that is being written; as a rule a tenth of that."""


class RunFolder:
    """A folder for one run: ``run.json``, ``images/``, ``fluxrun.log``; written after every image, atomically."""

    def __init__(self, path: Path, config: dict[str, Any], command: Sequence[str] = ()) -> None:
        """Claim ``path`` for a run of this resolved config.

        Raises ConfigError if it holds another run or cannot be written.
        """
        self.path = path
        self.record = RunRecord(
            run_id=uuid.uuid4().hex[:12],
            command=list(command),
            cwd=os.getcwd(),
            started_at=_now(),
            config=plain(config),
            config_hash=data_hash(config),
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

    def note_options(self, options: dict[str, OptionRecord], notes: Sequence[str]) -> None:
        """Take over what became of each option group, and what the user was told."""
        self.record.options = {
            group: option.model_copy(update={"facts": plain(option.facts)}) for group, option in options.items()
        }
        self.record.notes = list(notes)

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


def read_record(folder: Path) -> RunRecord:
    """The record of a run folder. Raises ConfigError if there is none or it does not follow the schema."""
    from pydantic import ValidationError

    path = folder / "run.json"
    try:
        return RunRecord.model_validate_json(read_text(path))
    except FileNotFoundError as error:
        raise ConfigError(f"{folder} is not a run folder: it has no run.json") from error
    except Unreadable as error:
        raise ConfigError(f"{path} {error}") from error
    except ValidationError as error:
        raise ConfigError(f"{path} is no record of fluxrun's: {first_problem(error)}") from error


def data_hash(data: dict[str, Any]) -> str:
    """Hash of a resolved config: equal for equal runs, whatever the command was. The config may be wrong."""
    return hashlib.sha256(json.dumps(plain(data), sort_keys=True).encode()).hexdigest()[:16]


def plain(value: Any) -> Any:
    """A value as JSON can hold it: paths and other objects as text, tuples as lists."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)


def status_of(error: BaseException) -> Status:
    """The record's status for what ended a run."""
    return "interrupted" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
