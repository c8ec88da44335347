"""The process that draws, as ComfyUI's thread sees it: fluxrun's server's own queue and child, without the server."""

from __future__ import annotations

import asyncio
import os
import queue
import sys
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fluxrun.errors import ConfigError, FluxrunError, one_line
from fluxrun.serving.child import Child
from fluxrun.serving.limits import Limits
from fluxrun.serving.rules import Accepted, Rules, Wording
from fluxrun.serving.runs import Run, Runs
from fluxrun.serving.uploads import Uploads

from .files import ComfyFiles

T = TypeVar("T")

WORDING = Wording(
    asker="a workflow",
    owner="the node",
    models="put its folder into ComfyUI's models/diffusers",
    files="input:NAME and loras:NAME name files of ComfyUI's own folders",
    limit="",
    instead="run fluxrun itself",
)

PYTHON = "FLUXRUN_PYTHON"
"""Environment variable: another Python with fluxrun that draws, so that its torch may be another than ComfyUI's."""

IDLE_S = 600.0
"""How long the process that draws stays without anything to draw."""

ALLOCATORS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")

COMFYS_ALLOCATOR = "cudaMallocAsync"
"""What ComfyUI chooses for itself, and leaves in the environment."""

LOOK_S = 0.1
"""How often it is looked whether the interrupt button was pressed."""


class Painter:
    """One queue, one child process, one event loop on a thread, for all nodes of this ComfyUI."""

    def __init__(self, folder: Path, models: Sequence[str], folders: Any) -> None:
        limits = Limits()
        self.uploads = Uploads(folder / "uploads", limits)
        self.log = folder / "worker.log"
        """What the process prints; what is worth saying comes as a line of a run."""
        self._output = self.log.open("ab", buffering=0)
        self.rules = Rules(models, limits, ComfyFiles(self.uploads, folders), WORDING)
        without = [name for name in ALLOCATORS if COMFYS_ALLOCATOR in os.environ.get(name, "")]
        child = Child(os.environ.get(PYTHON) or sys.executable, without, self._output.fileno())
        self._runs = Runs(folder, self.rules, limits.queue, IDLE_S, child)
        self._loop = asyncio.new_event_loop()
        self._working: asyncio.Task[None] | None = None
        threading.Thread(target=self._loop.run_forever, name="fluxrun", daemon=True).start()

    def keep(self, png: bytes) -> str:
        """A picture as a file that a request can name."""
        self.uploads.folder.mkdir(parents=True, exist_ok=True)  # ComfyUI's temporary folder may have been emptied

        async def chunks() -> AsyncIterator[bytes]:
            yield png

        return self._do(self.uploads.take("png", chunks()))

    def start(self, accepted: Accepted) -> Run:
        """Have a checked request drawn, after those that are still waiting."""

        async def put() -> Run:
            if self._working is None or self._working.done():
                self._working = asyncio.create_task(self._runs.work())
            return self._runs.put(accepted)

        return self._do(put())

    def events(self, run: Run) -> Iterator[dict[str, Any]]:
        """What happens, until the run has ended; an empty event now and then, so that somebody can look around."""
        waiting: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()

        async def follow() -> None:
            try:
                async for _, event in run.follow():
                    waiting.put(event)
            finally:
                waiting.put(None)

        following = asyncio.run_coroutine_threadsafe(follow(), self._loop)
        while True:
            try:
                event = waiting.get(timeout=LOOK_S)
            except queue.Empty:
                self._look_after(run)
                yield {}
                continue
            if event is None:
                break
            yield event
        following.result()

    def _look_after(self, run: Run) -> None:
        """Raise FluxrunError where nobody is there to draw the run: no process could be started."""
        if run.ended or self._working is None or not self._working.done():
            return
        self.stop(run)
        error = self._working.exception()
        raise FluxrunError(f"the process that draws could not be started: {one_line(error) if error else 'no reason'}")

    def stop(self, run: Run) -> None:
        """Stop a run at its next step, while loading or compiling at once; asked again, at once in any case."""
        self._loop.call_soon_threadsafe(self._runs.cancel, run)

    def release(self) -> None:
        """End the process that draws and give its memory back; the next picture starts another one."""
        self._do(self._runs.child.stop())

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


def pictures_of(run: Run, record: dict[str, Any]) -> list[Path]:
    """The pictures of a run that is done. Raises ConfigError where there are none."""
    paths = [run.folder / str(image["path"]) for image in record.get("images", [])]
    if not paths:
        raise ConfigError(f"the run in {run.folder} has drawn no picture")
    return paths
