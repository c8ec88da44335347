"""A run on several GPUs, from outside: torchrun starts a process for each, and here is watched that they end."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from fluxrun.config.schema import RunConfig
from fluxrun.errors import FluxrunError, mark_said
from fluxrun.process.console import console
from fluxrun.process.heartbeat import Watch
from fluxrun.process.ranks import RankFailed
from fluxrun.process.signals import Interrupts
from fluxrun.record.folder import read_record, write_failure
from fluxrun.record.schema import RunRecord
from fluxrun.record.writing import plain
from fluxrun.types import JsonObject

log = logging.getLogger("fluxrun")

PROGRAM = "fluxrun.sweep.rank_process"
"""What each process runs: ``python -m PROGRAM FOLDER``."""

POLL_S = 0.2

NOTICE_S = 1.0
"""What torchrun has for saying how a process ended, before all of them are."""

GRACE_S = 20.0
"""What the processes have for ending themselves: at a signal, or when one of them has failed."""

JOB, LOG = "job.json", "torchrun.log"


def draw_in_ranks(
    config: RunConfig,
    folder: Path,
    size: int,
    command: Sequence[str],
    program: str = PROGRAM,
    *,
    resume: bool = False,
) -> RunRecord:
    """Draw a run by ``size`` processes; the first one's record is the run's. Raises what ended it.

    Whatever becomes of them, they are gone when it returns, and the record says how the run ended.
    """
    with tempfile.TemporaryDirectory(prefix="fluxrun-ranks-") as name:
        group = _Group(Path(name), folder, plain(config.source), size)
        job = {"data": group.data, "dirs": plain(config.config_dirs), "command": list(command), "folder": str(folder)}
        job["resume"] = resume
        (group.state / JOB).write_text(json.dumps({**job, "parent": os.getpid()}), encoding="utf-8")
        interrupts = Interrupts(
            on_first=lambda: group.tell(interrupts.requested or signal.SIGINT),
            on_second=lambda: group.close(interrupts.error()),
        )
        with interrupts:
            group.start(program)
            lost = group.wait(interrupts)
            group.end()
        if interrupts.requested:
            group.close(interrupts.error())
            raise interrupts.error()
        return group.record(lost)


class _Group:
    """torchrun and the processes below it."""

    def __init__(self, state: Path, folder: Path, data: JsonObject, size: int) -> None:
        self.state, self.folder, self.data, self.size = state, folder, data, size
        self._watch = Watch(state, size)
        self._torchrun: subprocess.Popen[bytes] | None = None

    def start(self, program: str) -> None:
        """Start torchrun. Its own words go to a log, those of the first process to where ours go."""
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.size}",
            "--local-addr=127.0.0.1", "--monitor-interval=0.2", "-m", program, str(self.state),
        ]  # fmt: skip
        threads = max(1, (os.cpu_count() or 1) // self.size)  # else torchrun gives each of them one
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        with (self.state / LOG).open("wb") as words:
            self._torchrun = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=_our_console(), stderr=words, env=environment,
                start_new_session=True,  # a Ctrl+C reaches them through us, once
            )  # fmt: skip

    def tell(self, number: signal.Signals) -> None:
        """Hand a signal on to torchrun, which hands it on to all."""
        if self._torchrun is not None:
            self._torchrun.send_signal(number)

    def wait(self, interrupts: Interrupts) -> str:
        """Wait for their end; returns what became of a process that is gone or silent, which ends the waiting."""
        assert self._torchrun is not None
        ending: float | None = None
        while self._torchrun.poll() is None:
            time.sleep(POLL_S)
            if lost := self._lost():
                return lost
            if ending is None and (interrupts.requested or self._watch.failed()):
                ending = time.monotonic()
            if ending is not None and time.monotonic() - ending > GRACE_S:
                return ""
        return self._lost()

    def _lost(self) -> str:
        if gone := self._watch.gone():
            time.sleep(NOTICE_S)
            return self._how_ended(gone)
        if silent := self._watch.silent():
            return f"rank {silent[0]} was stopped: it gave no sign of life"
        return ""

    def _how_ended(self, gone: Sequence[int]) -> str:
        """How the first of them ended, by what torchrun says: with the others it has something to do itself."""
        words = (self.state / LOG).read_text(encoding="utf-8", errors="replace")
        found = re.search(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+)", words)
        code, rank = (int(found[1]), int(found[2])) if found else (-signal.SIGKILL, gone[0])
        if code == -signal.SIGKILL:
            return f"rank {rank} was killed"
        return f"rank {rank} ended with {signal.Signals(-code).name if code < 0 else f'exit code {code}'} (see {LOG})"

    def end(self) -> None:
        """Kill whatever is left of them."""
        if self._torchrun is None:
            return
        with contextlib.suppress(psutil.Error):
            torchrun = psutil.Process(self._torchrun.pid)
            for process in [*torchrun.children(recursive=True), torchrun]:
                with contextlib.suppress(psutil.Error):
                    process.kill()
        for beat in self._watch.beats().values():
            if not beat.ended:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(beat.pid, signal.SIGKILL)
        self._torchrun.wait()

    def close(self, error: BaseException) -> None:
        """End them all, and the record with them."""
        self.end()
        write_failure(self.folder, self.data, error)

    def record(self, lost: str) -> RunRecord:
        """The record of a group that has ended. Raises what ended it before the run was complete."""
        if (self.folder / "run.json").exists():
            record = read_record(self.folder)
            if record.status == "completed":
                return record
        self._keep_log()
        failed = self._watch.failed()
        if not lost and failed is not None and failed[0] == 0:  # it has said and recorded so itself
            raise _said(FluxrunError(failed[1]))
        what = lost or (f"rank {failed[0]}: {failed[1]}" if failed else f"the processes did not begin (see {LOG})")
        error = RankFailed(what)
        write_failure(self.folder, self.data, error, overrule=True)
        console.show_cursor(True)
        log.error("%s", error)
        raise _said(error)

    def _keep_log(self) -> None:
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.state / LOG, self.folder / LOG)


def _said(error: FluxrunError) -> FluxrunError:
    mark_said(error)
    return error


def _our_console() -> int:
    """Standard error, if there is one."""
    try:
        os.fstat(2)
    except OSError:
        return subprocess.DEVNULL
    return 2
