"""``sweep.isolation=process``: every job in a process of its own (``job_process``), that ends with it and with us."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from fluxrun.errors import FluxrunError, Interrupted
from fluxrun.process.console import console
from fluxrun.process.signals import Interrupts
from fluxrun.record.folder import PATIENCE_S, read_record, write_failure
from fluxrun.types import JsonObject


class JobProcessError(FluxrunError):
    """A job's process ended without saying why, for example by a crash in a kernel."""


def run_in_child(data: JsonObject, dirs: tuple[Path, ...], folder: Path, command: Sequence[str]) -> None:
    """Run one job's config in a child process and wait for it. Raises what ended it."""
    with Interrupts.held_back():  # until the child can take one; Python by itself would show a traceback
        child = subprocess.Popen(
            [sys.executable, "-m", "fluxrun.sweep.job_process", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="backslashreplace",
            start_new_session=True,  # a Ctrl+C reaches it through us, once
        )
    assert child.stdin is not None
    assert child.stdout is not None
    interrupts = Interrupts(
        on_first=lambda: child.send_signal(signal.SIGINT),
        on_second=lambda: _end_at_once(child.pid, folder, data, interrupts.error()),
    )
    with interrupts, child:
        child.stdin.write(json.dumps({"data": data, "dirs": [str(d) for d in dirs], "command": list(command)}) + "\n")
        child.stdin.flush()
        for line in child.stdout:
            console.print(line.rstrip("\n"), markup=False, highlight=False, soft_wrap=True)
        child.stdin.close()
        child.wait()
    if interrupts.requested and (folder / "run.json").exists():
        write_failure(folder, data, interrupts.error())  # where the child was ended before it closed its record
    interrupts.check()
    if child.returncode:
        raise _failure(child.returncode, folder)


def _end_at_once(pid: int, folder: Path, data: JsonObject, error: Interrupted) -> None:
    """Let the child close its record, as a run does at a second signal; close it here if it does not come to that."""
    with contextlib.suppress(psutil.Error, OSError):
        child = psutil.Process(pid)
        child.send_signal(signal.SIGINT)
        child.wait(PATIENCE_S + 1)
    with contextlib.suppress(psutil.Error):
        psutil.Process(pid).kill()
    if (folder / "run.json").exists():
        write_failure(folder, data, error)


def _failure(code: int, folder: Path) -> FluxrunError:
    if (folder / "run.json").exists():
        error = read_record(folder).error
        if error is not None:
            return FluxrunError(error.message)
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return JobProcessError(f"the job's process ended with {how} before it could say why")
