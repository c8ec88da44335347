"""``python -m fluxrun.sweep.rank_process FOLDER``: one of the processes that torchrun starts for ``parallel``.

The folder has the job, and the processes' signs of life.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from fluxrun.errors import Interrupted
from fluxrun.hardware.detection import place
from fluxrun.pipeline.torchrun import JOB
from fluxrun.process import spans
from fluxrun.process.console import console
from fluxrun.process.ending import end_with_parent, leave, leave_in_order
from fluxrun.process.heartbeat import Heartbeat
from fluxrun.process.signals import EXIT_CODES, Interrupts
from fluxrun.process.watch import watched
from fluxrun.startup.owner import own_process
from fluxrun.sweep.job_process import run_job


def main(state: Path) -> int:
    """Draw along with the others; returns the exit code."""
    spans.add("interpreter", spans.process_start(), time.perf_counter())
    here = place()
    assert here is not None
    job = json.loads((state / JOB).read_text(encoding="utf-8"))
    speak_if_first(here.rank)
    heart = Heartbeat(state, here.rank, job["parent"], end_now)
    heart.start()
    end_with_parent(end_now)
    with watched(), Interrupts() as interrupts:
        try:
            with interrupts.immediate():
                interrupts.let_through()
                code, error = run_job(job, Path(job["folder"]), is_first=here.rank == 0)
        except (KeyboardInterrupt, Interrupted) as raised:
            code, error = interrupts.error().exit_code, str(raised)
        heart.end("" if code == 0 or interrupts.requested else error)
        return code


def speak_if_first(rank: int) -> None:
    """The first process speaks on its standard output, which is the console; its standard error is torchrun's log."""
    if rank == 0:
        console.file = sys.stdout
    else:
        console.quiet = True
        os.dup2(2, 1)


def end_now() -> None:
    """Who has started this process is gone."""
    Interrupts.end(signal.SIGTERM)


def run_as_program() -> None:
    """All of it, the process's end included."""
    own_process()
    code = main(Path(sys.argv[1]))
    if code in EXIT_CODES.values():
        leave(code)
    leave_in_order(code)


if __name__ == "__main__":
    run_as_program()
