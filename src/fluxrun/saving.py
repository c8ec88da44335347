"""Pictures are written to disk while the next one is drawn; the record gets them in order."""

from __future__ import annotations

import logging
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING

from fluxrun.errors import one_line

if TYPE_CHECKING:
    from PIL.Image import Image

    from fluxrun.prompts import Job
    from fluxrun.record import ImageRecord, RunFolder

log = logging.getLogger("fluxrun.generate")

MOST_WAITING = 4
"""Pictures that may wait to be written; then drawing waits, so that a slow disk does not fill the memory."""


class Saver:
    """Writes a run's pictures on a thread of its own, as a context: on leaving, all of them are on disk.

    Compressing a 1024x1024 PNG takes a CPU core 0.1 to 0.2 s, half as long as an H200 draws one with klein-4B. Only
    files are written on that thread: the record changes, and errors appear, in ``save`` and at the context's end.
    """

    def __init__(self, folder: RunFolder, output_format: str, *, beside: bool) -> None:
        """``beside``: write while the next picture is drawn; else before ``save`` returns."""
        self._folder = folder
        self._format = output_format
        self._most = MOST_WAITING if beside else 0
        self._number = len(folder.record.images)
        self._waiting: deque[tuple[Future[tuple[ImageRecord, float]], str]] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fluxrun-save")

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for what is being written. Raises OSError when that fails, unless the run ends with an error anyway."""
        try:
            self._collect(most=0)
        except OSError as problem:
            if error is None:
                raise
            log.error("a finished picture could not be saved: %s", one_line(problem))
        finally:
            self._thread.shutdown(cancel_futures=True)

    def save(self, image: Image, job: Job, about: str) -> None:
        """Write a picture, now or soon; ``about`` is said of it then.

        Raises OSError when this one or an earlier one cannot be written.
        """
        self._waiting.append((self._thread.submit(self._write, self._number, image, job), about))
        self._number += 1
        self._collect(self._most)

    def _write(self, number: int, image: Image, job: Job) -> tuple[ImageRecord, float]:
        started = time.perf_counter()
        saved = self._folder.write_image(number, image, job.prompt, job.seed, self._format)
        return saved, time.perf_counter() - started

    def _collect(self, most: int) -> None:
        """Take over what is written, in order, and wait until no more than ``most`` are not."""
        while self._waiting and (len(self._waiting) > most or self._waiting[0][0].done()):
            written, about = self._waiting.popleft()
            saved, seconds = written.result()
            self._folder.record.timings.save_s.append(seconds)
            self._folder.add(saved)
            log.info("saved %s (seed %d, %s)", self._folder.path / saved.path, saved.seed, about)
