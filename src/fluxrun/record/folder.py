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
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxrun.atomic import Reserve, write_atomically
from fluxrun.errors import ConfigError, Interrupted, one_line
from fluxrun.reading import Unreadable, first_problem, read_text
from fluxrun.record import asked as asked_for
from fluxrun.record import journal
from fluxrun.record.claiming import LOCK, USED, cannot_write, refuse_used
from fluxrun.record.picture import pixel_hash, save_image
from fluxrun.record.schema import Asked, ErrorRecord, ImageLine, OptionRecord, RunRecord, SpanRecord, Status
from fluxrun.record.signature import sign
from fluxrun.record.writing import MOST_LISTED, RECORD, plain, short_text, write_last
from fluxrun.types import JsonObject

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger("fluxrun.record")

AGAIN_S = 10.0
"""How long run.json is not written again while images are drawn: what each of them adds is in its line."""

RESERVE = ".reserve"
"""The file that keeps room for the last record; its size grows with run.json's."""

SPARE_BYTES = 8 * 1024
"""What the last record may be longer than the one before it: its error, and the picture that was added."""

PATIENCE_S = 2.0
"""What a second signal waits at most for the picture that is being written; as a rule a tenth of that."""


class RunFolder:
    """A folder for one run: ``run.json``, ``images/`` with a line in ``images.jsonl`` each, ``fluxrun.log``."""

    def __init__(
        self, path: Path, config: JsonObject, command: Sequence[str] = (), *, earlier: RunRecord | None = None
    ) -> None:
        """Claim ``path`` for a run of this resolved config, or go on with the one there, whose record is ``earlier``.

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
            images_file=journal.JOURNAL,
        )
        if earlier is not None:
            self.record = _continued(earlier, self.record)
        self.signature = sign(data)
        """What pictures carry: where the run was started is nobody's business there."""
        self._saving = threading.Lock()
        """Held while a picture is written and added to the record."""
        self._calls, self._encoded = len(self.record.timings.decode_s), len(self.record.timings.text_encode_s)
        """How many of the pipeline's calls and of the encoded texts are in a line."""
        self._known = {image.identity for image in self.record.images}
        self._unwritten: list[ImageLine] = []
        """Lines that the disk did not take."""
        self._next_write = 0.0
        self._writing = threading.RLock()
        """Held while run.json is replaced: an older text must not come after a newer one."""
        self._closed = False
        """Whether nothing more is saved."""
        self._finished = False
        """Whether the record on the disk says how the run ended."""
        self._reserve = Reserve(path / RESERVE)
        self._spare = SPARE_BYTES
        if earlier is None:
            self._claim()
        else:
            self._go_on()

    def _claim(self) -> None:
        images = self.path / "images"
        try:
            # Only one process can make the folder for the images; somebody else's is refused, with nothing written.
            images.mkdir(parents=True)
            try:
                refuse_used(self.path)
                # Without room for the record that says how it ended, it does not begin.
                self._reserve.hold(len(short_text(self.record)) + SPARE_BYTES)
                self.write()
            except BaseException:
                self._reserve.give_up()
                images.rmdir()
                raise
        except FileExistsError as error:
            raise ConfigError(USED.format(self.path)) from error
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def _go_on(self) -> None:
        """Take over what is there. Up to the last write the record is the earlier command's."""
        try:
            (self.path / "images").mkdir(exist_ok=True)  # a run that failed before it began has none
            self._reserve.hold(len(short_text(self.record)) + SPARE_BYTES)
            journal.rewrite(self.path, self.record)
            self.write()
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def begin(self, jobs: Sequence[Asked], *, from_file: bool) -> None:
        """Note what the run is to have; of a prompts file also the lines, by which a change of it shows later."""
        self.record.images_asked = len(jobs)
        self._spare = SPARE_BYTES + max(len(job.prompt.encode()) for job in jobs)
        if from_file:
            self._write_asked(jobs)

    def _write_asked(self, jobs: Sequence[Asked]) -> None:
        asked_for.write(self.path, jobs)

    @property
    def is_due(self) -> bool:
        """Whether run.json may be written again for what has changed meanwhile; its time is a twentieth at most."""
        return time.monotonic() >= self._next_write

    def write(self) -> None:
        """Write run.json as it stands, without the images, and keep room for as much again."""
        with self._writing:
            began = time.monotonic()
            text = short_text(self.record)
            write_atomically(self.path / RECORD, text)
            with suppress(OSError):  # it is large enough for this record, and the next picture will not fit either
                self._reserve.hold(len(text) + self._spare)
            ended = time.monotonic()
            self._next_write = ended + max(AGAIN_S, 20 * (ended - began))

    def note_options(self, options: dict[str, OptionRecord], notes: Sequence[str]) -> None:
        """Take over what became of each option group, and what the user was told."""
        self.record.options = {
            group: option.model_copy(update={"facts": plain(option.facts)}) for group, option in options.items()
        }
        self.record.notes = list(notes)

    def note_spans(self, spans: Sequence[tuple[str, float, float]]) -> None:
        """Take over when each part of the run began and ended: name, start and end in seconds."""
        self.record.spans = [SpanRecord(name=n, start_s=round(a, 4), end_s=round(b, 4)) for n, a, b in spans]

    def save(self, asked: Asked, image: Image, output_format: str, *, finite: bool, constant: bool) -> Path:
        """Save a picture with its metadata, and add it to the record; returns its path.

        Not on the main thread: there a signal's ``abandon`` waits for the picture that is being written.
        """
        with self._saving:
            if self._closed:
                raise Interrupted("the run has ended")
            path, line = self._save(asked, image, output_format, finite=finite, constant=constant)
            self.record.timings.save_s.append(line.save_s)
            self._add(line)
        return path

    def add(self, line: ImageLine) -> None:
        """Add to the record a picture that another process has saved here; one that is in it already stays."""
        with self._saving:
            if self._closed:
                raise Interrupted("the run has ended")
            if line.identity not in self._known:
                self.record.timings.add(line)
                self._add(line)

    def _save(
        self, asked: Asked, image: Image, output_format: str, *, finite: bool, constant: bool
    ) -> tuple[Path, ImageLine]:
        started = time.perf_counter()
        ending = "jpg" if output_format == "jpeg" else output_format
        path = self.path / "images" / f"{asked.index:03d}_seed{asked.seed}.{ending}"
        compressed_by = save_image(image, path, self._metadata(asked, finite=finite), output_format)
        sha256, size = pixel_hash(image), path.stat().st_size
        return path, ImageLine(
            path=str(path.relative_to(self.path)),
            prompt=asked.prompt,
            seed=asked.seed,
            sha256=sha256,
            finite=finite,
            constant=constant,
            width=image.width,
            height=image.height,
            compressed_by=compressed_by,
            file_bytes=size,
            line=asked.line,
            number=asked.number,
            save_s=time.perf_counter() - started,
            calls=journal.calls_of(self.record.timings, self._calls),
            text_encode_s=self.record.timings.text_encode_s[self._encoded :],
        )

    def _metadata(self, asked: Asked, *, finite: bool) -> dict[str, Any]:
        return {
            "prompt": asked.prompt,
            "seed": asked.seed,
            "run_id": self.record.run_id,
            "config": self.record.config,
            "signature": self.signature,
            "environment": self.record.environment,
            **({"inputs": [given.model_dump() for given in self.record.inputs]} if self.record.inputs else {}),
            **({} if finite else {"finite": False}),
        }

    def _add(self, line: ImageLine) -> None:
        """Add a saved image to the record, whose timings have its times already."""
        self._calls += len(line.calls)
        self._encoded += len(line.text_encode_s)
        self.record.images.append(line.image())
        self.record.images_saved += 1
        self._known.add(line.identity)
        self._list(line)

    def _list(self, line: ImageLine) -> None:
        self._unwritten.append(line)
        journal.append(self.path, line)
        self._unwritten.pop()

    def finish(self, status: Status, error: BaseException | None = None, stage: str = "") -> None:
        """Close the record with its status."""
        with self._writing:
            self.record.status = status
            self.record.finished_at = _now()
            if error is not None:
                self.record.error = ErrorRecord(type=type(error).__name__, message=one_line(error), stage=stage)
            self._list_what_is_left()
            journal.put_in_order(self.record)
            if status == "completed":
                with suppress(OSError):
                    (self.path / asked_for.ASKED).unlink(missing_ok=True)
            write_last(self.path, self.record, self._reserve, self._unwritten)
            self._finished = True

    def _list_what_is_left(self) -> None:
        """Of many images the lines stay: they get the times that came after the last one, of its repeats."""
        timings = self.record.timings
        left = len(timings.decode_s) > self._calls or len(timings.text_encode_s) > self._encoded
        if left and len(self.record.images) > MOST_LISTED:
            with suppress(OSError):
                journal.rewrite(self.path, self.record)
                self._unwritten.clear()

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


def _continued(earlier: RunRecord, now: RunRecord) -> RunRecord:
    """An earlier command's record as that of a run which goes on; it keeps what cannot be measured again."""
    here = {"cwd": now.cwd, "signature": now.signature, "schema_version": now.schema_version}
    again = {"status": "running", "error": None, "finished_at": None, "images_file": journal.JOURNAL}
    when = {"resumed_at": [*earlier.resumed_at, now.started_at], "images_saved": len(earlier.images)}
    return earlier.model_copy(update={**here, **again, **when}, deep=True)


def write_failure(folder: Path, data: JsonObject, error: BaseException, *, overrule: bool = False) -> bool:
    """Record a run that failed before it had a record, or whose process died; returns whether there was need to.

    ``data`` is the config as far as it got: it may be what is wrong. ``overrule``: this is why it did not complete,
    whatever else its record says.
    """
    if (folder / RECORD).exists():
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
    write_last(folder, record, Reserve(folder / RESERVE), [])
    return True


def remove_unfinished(folder: Path) -> None:
    """Remove what a run that ended in the middle of writing has left."""
    for unfinished in (*folder.glob(".*.json*.*"), *folder.glob("images/.*.part"), folder / LOCK):
        unfinished.unlink(missing_ok=True)


def is_running(folder: Path) -> bool:
    """Whether a run folder's record is not closed; one that cannot be read is nobody's."""
    try:
        return read_record(folder).status == "running"
    except ConfigError:
        return False


def read_record(folder: Path) -> RunRecord:
    """The record of a run folder, with all of its images. Raises ConfigError if there is none that can be read."""
    for _ in range(2):  # a run that ends meanwhile moves its images to run.json
        record = _read_run_json(folder)
        if record.images_file is None:
            return record
        try:
            journal.add_lines(record, journal.read_lines(folder / record.images_file))
            return record
        except FileNotFoundError:
            if not record.images_saved:
                return record
    raise ConfigError(f"{folder / journal.JOURNAL} is missing: it lists the run's {record.images_saved} image(s)")


def _read_run_json(folder: Path) -> RunRecord:
    from pydantic import ValidationError

    path = folder / RECORD
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


def status_of(error: BaseException) -> Status:
    """The record's status for what ended a run."""
    return "interrupted" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
