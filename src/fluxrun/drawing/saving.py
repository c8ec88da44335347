"""Pictures are compressed and written while the next one is drawn, in order and into the record at once."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from fluxrun.config.prompts import Job
from fluxrun.drawing.inspection import SOUND, Finding
from fluxrun.errors import one_line
from fluxrun.process import spans
from fluxrun.record.folder import RunFolder

if TYPE_CHECKING:
    from PIL.Image import Image


log = logging.getLogger("fluxrun.generate")

MOST_WAITING = 4
"""Pictures that may wait to be written; then drawing waits, so that a slow disk does not fill the memory."""


class Saver:
    """Writes a run's pictures on a thread of its own, as a context: on leaving, all of them are on disk.

    Compressing a 1024x1024 PNG takes a CPU core 0.1 to 0.2 s, about as long as an H200 draws one with klein-4B. A
    picture is in the record as soon as it is on disk; one that cannot be written is raised in ``save`` or at the end.
    """

    def __init__(
        self,
        folder: RunFolder,
        output_format: str,
        *,
        beside: bool,
        on_saved: Callable[[Path, int], None] = lambda path, seed: None,
    ) -> None:
        """``beside``: write while the next picture is drawn; else before ``save`` returns.

        ``on_saved`` is told each picture's path and seed, on the thread that has written it.
        """
        self._on_saved = on_saved
        self._folder = folder
        self._format = output_format
        self._most = MOST_WAITING if beside else 0
        self._waiting: deque[Future[None]] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fluxrun-save")

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for what is being written. Raises what went wrong first, unless the run ends with an error anyway."""
        self._thread.shutdown()
        problems = [problem for written in self._waiting if (problem := written.exception()) is not None]
        for problem in problems if error is not None else problems[1:]:
            log.error("a finished picture could not be saved: %s", one_line(problem))
        if problems and error is None:
            raise problems[0]

    def save(self, image: Image, job: Job, about: str, finding: Finding = SOUND) -> None:
        """Write a picture, now or soon; ``about`` is said of it then, and ``finding`` is in its record.

        Raises OSError when this one or an earlier one cannot be written.
        """
        self._waiting.append(self._thread.submit(self._write, image, job, about, finding))
        while self._waiting and (len(self._waiting) > self._most or self._waiting[0].done()):
            self._waiting.popleft().result()

    def _write(self, image: Image, job: Job, about: str, finding: Finding) -> None:
        with spans.span("save"):
            path = self._folder.save(job, image, self._format, finite=finding.finite, constant=finding.constant)
        log.info("saved %s (seed %d, %s)", path, job.seed, about)
        self._on_saved(path, job.seed)
