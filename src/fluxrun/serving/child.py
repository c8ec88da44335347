"""The worker process as the server sees it: started when it is needed, told what to draw, and known when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fluxrun.errors import FluxrunError
from fluxrun.trust import TRUST_VARIABLE

STANDARD_ERROR = 2

LINE_BYTES = 2**22
"""The longest event: a line may quote a prompt."""

STOP_S = 20.0
"""What a worker has for finishing its step and its record, once it is to end."""


class WorkerDied(FluxrunError):
    """The process that draws has ended in the middle of a run."""


class Child:
    """At most one worker process at a time.

    ``without`` are environment variables that it does not get, ``output`` is the file that it prints to.
    """

    def __init__(self, python: str = sys.executable, without: Sequence[str] = (), output: int = STANDARD_ERROR) -> None:
        self._python, self._without, self._output = python, {TRUST_VARIABLE, *without}, output
        self._process: asyncio.subprocess.Process | None = None
        self._events: asyncio.StreamReader | None = None
        self._burial: asyncio.Task[None] | None = None
        self.starts = 0
        """How many workers there have been."""

    @property
    def pid(self) -> int | None:
        """The number of the process that is there now."""
        return self._process.pid if self._process and self._process.returncode is None else None

    async def start(self) -> None:
        """Start a process, unless one is there."""
        if self.pid is not None:
            return
        await self._forget()
        ours, theirs = os.pipe()
        try:
            self._process = await asyncio.create_subprocess_exec(
                self._python, "-m", "fluxrun.serving.worker", str(theirs), str(os.getpid()),
                stdin=asyncio.subprocess.PIPE,
                stdout=self._output,  # what a library prints belongs to the log, not to an answer
                stderr=self._output,
                pass_fds=[theirs],
                env={name: value for name, value in os.environ.items() if name not in self._without},
                start_new_session=True,  # a Ctrl+C reaches it through us
            )  # fmt: skip
        except OSError:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        self._events = asyncio.StreamReader(limit=LINE_BYTES)
        protocol = asyncio.StreamReaderProtocol(self._events)
        await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, os.fdopen(ours, "rb"))
        self._burial = asyncio.create_task(_bury(self._process))
        self.starts += 1

    async def draw(self, job: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Have a job drawn; the events of it, ``ended`` last. Raises WorkerDied, also for one that died while idle."""
        await self.start()
        process, events = self._process, self._events
        assert process is not None
        assert process.stdin is not None
        assert events is not None
        with contextlib.suppress(ConnectionError):
            process.stdin.write(json.dumps(job).encode() + b"\n")
            await process.stdin.drain()
        while line := await events.readline():
            if not line.endswith(b"\n"):  # it died while it was writing
                break
            event = json.loads(line)
            yield event
            if event["event"] == "ended":
                if event.get("leaving"):  # its device is lost: the next run is another process's
                    await process.wait()
                return
        raise WorkerDied(_how_it_ended(await process.wait()))

    def interrupt(self) -> None:
        """Stop the run that is being drawn at its next step; while loading or compiling, at once."""
        self._send(signal.SIGINT)

    def kill(self) -> None:
        """End it at once."""
        self._send(signal.SIGKILL)

    async def stop(self) -> None:
        """Let it finish its step and its record, and end; one that does not is killed."""
        self._send(signal.SIGTERM)
        if self._process is not None:
            try:
                await asyncio.wait_for(self._process.wait(), STOP_S)
            except TimeoutError:
                self.kill()
                await self._process.wait()
        await self._forget()

    def _send(self, number: signal.Signals) -> None:
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number) if number == signal.SIGKILL else os.kill(self.pid, number)

    async def _forget(self) -> None:
        if self._burial is not None:
            await self._burial
        self._burial = None
        self._process = self._events = None  # whoever still reads its events comes to their end


async def _bury(process: asyncio.subprocess.Process) -> None:
    """Once a worker has ended, what it has left in its session (a compiler) goes, and with it the pipe's last end."""
    await process.wait()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _how_it_ended(code: int) -> str:
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    hint = " (SIGKILL: often the system's answer to no memory left)" if code == -signal.SIGKILL else ""
    return f"the process that draws ended with {how}{hint}; it is started again for the next request"
