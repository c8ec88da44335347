"""``python -m fluxrun.sweep.job_process FOLDER``: one job of ``sweep.isolation=process``, in this process alone.

It reads the config as JSON from its standard input, runs it into the folder, and ends at once when the input closes,
because then its parent is gone.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fluxrun.errors import Interrupted, exit_code_of
from fluxrun.process import spans
from fluxrun.process.ending import leave, leave_in_order
from fluxrun.process.signals import EXIT_CODES, Interrupts
from fluxrun.process.watch import watched
from fluxrun.startup.owner import own_process


def main(folder: Path) -> int:
    """Run the job; returns the exit code, 130 as soon as it is interrupted."""
    spans.add("interpreter", spans.process_start(), time.perf_counter())
    with watched(), Interrupts() as interrupts:
        try:
            with interrupts.immediate():
                interrupts.let_through()
                return _run(folder)
        except (KeyboardInterrupt, Interrupted):
            return interrupts.error().exit_code


def _run(folder: Path) -> int:
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    return run_job(job, folder)[0]


def run_job(job: Mapping[str, Any], folder: Path, *, is_first: bool = True) -> tuple[int, str]:
    """Run a job's config into the folder; returns the exit code, and what failed.

    Not ``is_first``: another process writes the folder, and this one draws along.
    """
    from fluxrun.config.schema import RunConfig
    from fluxrun.planning.libraries import libraries_of
    from fluxrun.planning.prepare import prepare
    from fluxrun.process.console import log_to
    from fluxrun.record.folder import write_failure
    from fluxrun.runner import run
    from fluxrun.startup.lean import start_lean

    if is_first:
        log_to(folder)
    try:
        config = RunConfig.from_dict(job["data"], tuple(Path(d) for d in job["dirs"]))
        prepared = prepare(config)
        start_lean(libraries_of(prepared))
        resume = job.get("resume", False)
        run(config, folder, command=job["command"], machine=prepared.plan.machine, resume=resume)
    except (Exception, KeyboardInterrupt) as error:
        if is_first and write_failure(folder, job["data"], error):
            logging.getLogger("fluxrun").error("%s", error, exc_info=error)
        return exit_code_of(error), str(error)
    return 0, ""


def _end_with_parent() -> None:
    sys.stdin.read()
    Interrupts.end(signal.SIGTERM)


if __name__ == "__main__":
    own_process()
    code = main(Path(sys.argv[1]))
    if code in EXIT_CODES.values():
        leave(code)
    leave_in_order(code)
