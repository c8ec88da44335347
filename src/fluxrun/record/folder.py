"""run.json: what was asked, what ran, why the two differ, and what each part cost."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic_core import PydanticSerializationError

from fluxrun.atomic import Reserve, write_atomically
from fluxrun.errors import ConfigError, Interrupted, one_line
from fluxrun.formatting import utf8
from fluxrun.reading import Unreadable, first_problem, read_text
from fluxrun.record.picture import pixel_hash, save_image
from fluxrun.record.schema import ErrorRecord, ImageRecord, OptionRecord, RecordModel, RunRecord, SpanRecord, Status
from fluxrun.record.signature import sign
from fluxrun.types import JsonObject

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger("fluxrun.record")

RESERVE = ".reserve"
"""The file that keeps room for the last record; its size grows with the record's."""

SPARE_BYTES = 8 * 1024
"""What the last record may be longer than the one before it: its error, and the picture that was added."""

LOCK = ".lock"

USED = "{} already holds a run: choose another hydra.run.dir, or remove it"

PATIENCE_S = 2.0
"""What a second signal waits at most for the picture that is being written; as a rule a tenth of that."""


class RunFolder:
    """A folder for one run: ``run.json``, ``images/``, ``fluxrun.log``; written after every image, atomically."""

    def __init__(self, path: Path, config: JsonObject, command: Sequence[str] = ()) -> None:
        """Claim ``path`` for a run of this resolved config.

        Raises ConfigError if it holds another run or cannot be written.
        """
        self.path = path
        data, cwd = plain(config), os.getcwd()
        self.record = RunRecord(
            run_id=uuid.uuid4().hex[:12],
            command=list(command),
            cwd=cwd,
            started_at=_now(),
            config=data,
            config_hash=data_hash(config),
            signature=sign(data, cwd),
        )
        self._signature = sign(data)
        """What pictures carry: where the run was started is nobody's business there."""
        self._saving = threading.Lock()
        """Held while a picture is written and added to the record."""
        self._writing = threading.RLock()
        """Held while run.json is replaced: an older text must not come after a newer one."""
        self._closed = False
        """Whether nothing more is saved."""
        self._finished = False
        """Whether the record on the disk says how the run ended."""
        self._reserve = Reserve(path / RESERVE)
        self._claim()

    def _claim(self) -> None:
        images = self.path / "images"
        try:
            # Only one process can make the folder for the images; somebody else's is refused, with nothing written.
            images.mkdir(parents=True)
            try:
                refuse_used(self.path)
                # Without room for the record that says how it ended, it does not begin.
                self._reserve.hold(len(json_text(self.record)) + SPARE_BYTES)
                self.write()
            except BaseException:
                self._reserve.give_up()
                images.rmdir()
                raise
        except FileExistsError as error:
            raise ConfigError(USED.format(self.path)) from error
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def write(self) -> None:
        """Write run.json as it stands, and keep room for as much again."""
        with self._writing:
            text = json_text(self.record)
            write_atomically(self.path / "run.json", text)
            with suppress(OSError):  # it is large enough for this record, and the next picture will not fit either
                self._reserve.hold(len(text) + SPARE_BYTES)

    def note_options(self, options: dict[str, OptionRecord], notes: Sequence[str]) -> None:
        """Take over what became of each option group, and what the user was told."""
        self.record.options = {
            group: option.model_copy(update={"facts": plain(option.facts)}) for group, option in options.items()
        }
        self.record.notes = list(notes)

    def note_spans(self, spans: Sequence[tuple[str, float, float]]) -> None:
        """Take over when each part of the run began and ended: name, start and end in seconds."""
        self.record.spans = [SpanRecord(name=n, start_s=round(a, 4), end_s=round(b, 4)) for n, a, b in spans]

    def save(
        self, number: int, image: Image, prompt: str, seed: int, output_format: str, *, finite: bool, constant: bool
    ) -> Path:
        """Save the run's picture ``number`` with its metadata, and add it to the record; returns its path.

        Not on the main thread: there a signal's ``abandon`` waits for the picture that is being written.
        """
        with self._saving:
            if self._closed:
                raise Interrupted("the run has ended")
            started = time.perf_counter()
            path, saved = self._save(number, image, prompt, seed, output_format, {} if finite else {"finite": False})
            saved.finite, saved.constant = finite, constant
            self.record.timings.save_s.append(time.perf_counter() - started)
            self.record.images.append(saved)
            self.write()
        return path

    def _save(
        self, number: int, image: Image, prompt: str, seed: int, output_format: str, marks: dict[str, bool]
    ) -> tuple[Path, ImageRecord]:
        path = self.path / "images" / f"{number:03d}_seed{seed}.{'jpg' if output_format == 'jpeg' else output_format}"
        metadata = {
            "prompt": prompt,
            "seed": seed,
            "run_id": self.record.run_id,
            "config": self.record.config,
            "signature": self._signature,
            "environment": self.record.environment,
            **({"inputs": [given.model_dump() for given in self.record.inputs]} if self.record.inputs else {}),
            **marks,
        }
        compressed_by = save_image(image, path, metadata, output_format)
        return path, ImageRecord(
            path=str(path.relative_to(self.path)),
            prompt=prompt,
            seed=seed,
            width=image.width,
            height=image.height,
            sha256=pixel_hash(image),
            compressed_by=compressed_by,
        )

    def finish(self, status: Status, error: BaseException | None = None, stage: str = "") -> None:
        """Close the record with its status."""
        with self._writing:
            self.record.status = status
            self.record.finished_at = _now()
            if error is not None:
                self.record.error = ErrorRecord(type=type(error).__name__, message=one_line(error), stage=stage)
            _write_last(self.path, self.record, self._reserve)
            self._finished = True

    def abandon(self, error: BaseException, stage: str) -> None:
        """Close the record before the process ends at once: the picture being written is finished, if that is soon.

        From a signal handler or another thread than the run's, which may have closed it already: then it stays.
        """
        self._closed = True
        if self._saving.acquire(timeout=PATIENCE_S):
            self._saving.release()
        with self._writing:
            if self._finished:
                return
            self.finish("interrupted", error, stage)
        remove_unfinished(self.path)


class UnwrittenFolder(RunFolder):
    """What a process has that helps to draw another one's pictures: a record in memory, and nothing is written."""

    def _claim(self) -> None:
        return

    def write(self) -> None:
        return

    def finish(self, status: Status, error: BaseException | None = None, stage: str = "") -> None:
        self.record.status = status

    def abandon(self, error: BaseException, stage: str) -> None:
        return


def write_failure(folder: Path, data: JsonObject, error: BaseException, *, overrule: bool = False) -> bool:
    """Record a run that failed before it had a record, or whose process died; returns whether there was need to.

    ``data`` is the config as far as it got: it may be what is wrong. ``overrule``: this is why it did not complete,
    whatever else its record says.
    """
    path = folder / "run.json"
    if path.exists():
        record = read_record(folder)
        if record.status != "running" and not (overrule and record.status != "completed"):
            return False
        if overrule:
            remove_unfinished(folder)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        record = RunRecord(
            run_id=uuid.uuid4().hex[:12], started_at=_now(), config=plain(data), config_hash=data_hash(data)
        )
    record.status, record.finished_at = status_of(error), _now()
    stage = record.error.stage if record.error else "denoise" if record.images else "prepare"
    record.error = ErrorRecord(type=type(error).__name__, message=one_line(error), stage=stage)
    _write_last(folder, record, Reserve(folder / RESERVE))
    return True


def remove_unfinished(folder: Path) -> None:
    """Remove what a run that ended in the middle of writing has left."""
    for unfinished in (*folder.glob(".run.json.*"), *folder.glob("images/.*.part"), folder / LOCK):
        unfinished.unlink(missing_ok=True)


def is_running(folder: Path) -> bool:
    """Whether a run folder's record is not closed; one that cannot be read is nobody's."""
    try:
        return read_record(folder).status == "running"
    except ConfigError:
        return False


def _write_last(folder: Path, record: RunRecord, reserve: Reserve) -> None:
    """The record as it stays. On a full disk the reserve makes room for it; in any case it is not needed any more."""
    text = json_text(record)
    try:
        write_atomically(folder / "run.json", text)
    except OSError:
        reserve.give_up()
        write_atomically(folder / "run.json", text)
    finally:
        reserve.give_up()


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep a folder for one run of this process, from before anything is written there: log, config, record.

    However the process ends, the system lets go of it. Raises ConfigError when it holds a run, or is kept by another.
    """
    from filelock import FileLock, Timeout  # 25 ms, which `fluxrun plan` has no use for

    refuse_used(folder)
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(f"another run is being drawn into {folder}: choose another hydra.run.dir") from error
    except OSError as error:
        raise _cannot_write(folder, error) from error
    try:
        refuse_used(folder)  # by one that has ended since
        yield
    finally:
        with suppress(OSError):  # who comes next finds run.json
            (folder / LOCK).unlink(missing_ok=True)
        lock.release()


def refuse_used(folder: Path) -> None:
    """Raise ConfigError when a folder holds a run."""
    if os.path.exists(folder / "run.json"):  # not path.exists(), which raises for a name that is too long
        raise ConfigError(USED.format(folder))


def _cannot_write(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"cannot write to the output folder {folder}: {error.strerror or error}")


def json_text(record: RecordModel) -> str:
    """A record as JSON. What is no UTF-8 (a link that leads to such a path) is written as ``\\udcff``."""
    try:
        return record.model_dump_json(indent=1)
    except PydanticSerializationError:
        return type(record).model_validate(plain(record.model_dump())).model_dump_json(indent=1)


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


def data_hash(data: JsonObject) -> str:
    """Hash of a resolved config: equal for equal runs, whatever the command was. The config may be wrong."""
    return plain_hash(plain(data))


def plain_hash(data: JsonObject) -> str:
    """The same of what ``plain`` has made."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def plain(value: Any) -> Any:
    """A value as JSON can hold it: paths and other objects as text (in UTF-8), tuples as lists."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (int, float, bool)) or value is None:
        return value
    return utf8(str(value))


def status_of(error: BaseException) -> Status:
    """The record's status for what ended a run."""
    return "interrupted" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
