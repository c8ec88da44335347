"""Jobs in processes that a launcher of Hydra's starts (joblib, submitit): their records are all they leave."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import psutil
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from fluxrun.config.composition import to_data
from fluxrun.config.schema import RunConfig
from fluxrun.errors import Interrupted, one_line
from fluxrun.process.ending import end_with_parent
from fluxrun.process.signals import EXIT_CODES, Interrupts
from fluxrun.record.folder import is_running, write_failure
from fluxrun.report.rows import run_folders
from fluxrun.runner import run
from fluxrun.types import JsonObject

log = logging.getLogger("fluxrun.sweep")

JOBLIB = "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher"

WORKERS_S = 0.25
"""What jobs have for closing their records at a signal; then the sweep does it for them."""


def has_workers(node: DictConfig) -> bool:
    """Whether a sweep's jobs run in children of its process, which end with it; submitit's on a cluster go on."""
    return str(node.hydra.launcher.get("_target_")) == JOBLIB


# --- in the sweep's process -------------------------------------------------------------------------------------------


def end_workers_with_us() -> None:
    """Have joblib's workers look for us from their start, not from their first job on: that may never come."""
    from joblib.parallel import BACKENDS, register_parallel_backend

    backend = getattr(BACKENDS["loky"], "func", BACKENDS["loky"])
    ours = partial(backend, initializer=_end_with_parent, initargs=(os.getpid(),))
    register_parallel_backend("loky", ours)


def stop_jobs(sweep: Path) -> None:
    """Tell the jobs to stop, and wait a moment: joblib kills them as soon as we stop, with no word to them.

    By SIGTERM: a worker that is still importing would answer a Ctrl+C with a traceback.
    """
    for worker in psutil.Process().children():
        with suppress(psutil.Error):
            worker.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + WORKERS_S
    while _running(sweep) and time.monotonic() < deadline:
        time.sleep(0.02)


def close_records(sweep: Path, error: BaseException | None = None) -> list[str]:
    """The jobs' processes are gone: records that they have not closed are closed here. Returns whose these were."""
    closed = []
    for folder in _running(sweep):
        with suppress(OSError):  # a full disk
            write_failure(folder, {}, error or Interrupted("interrupted"), overrule=True)
            closed.append(folder.name)
    return closed


def _running(sweep: Path) -> list[Path]:
    return [folder for folder in run_folders(sweep) if is_running(folder)]


# --- in a job's process -----------------------------------------------------------------------------------------------

_interrupted = threading.Event()
"""Whether a job in this process has been interrupted, and with it the sweep: then no other one begins."""


def job(node: DictConfig, dirs: tuple[Path, ...], command: Sequence[str]) -> None:
    """Draw one job; a failure is in its record. The process ends with its parent."""
    _end_with_parent()
    if _interrupted.is_set():
        return
    hydra: Any = HydraConfig.get()
    data = to_data(node, hydra.runtime.choices)
    draw(data, Path(hydra.runtime.output_dir), lambda config, folder: run(config, folder, command=command), dirs)


def draw(data: JsonObject, folder: Path, draw_run: Callable[[RunConfig, Path], object], dirs: tuple[Path, ...]) -> None:
    """Draw a config by ``draw_run``; what goes wrong is in the record, and in the log."""
    try:
        with Interrupts() as interrupts, interrupts.immediate():
            draw_run(RunConfig.from_dict(data, dirs), folder)
    except (KeyboardInterrupt, Interrupted):
        _interrupted.set()
    except Exception as error:  # as of any job in a sweep: it is this one's alone
        if write_failure(folder, data, error):
            log.error("%s", one_line(error), exc_info=error)


@cache
def _end_with_parent(parent: int | None = None) -> None:
    """Once a process, whatever jobs it gets; loky's own workers would finish what they have first."""
    end_with_parent(_end, parent)


def _end() -> None:
    if Interrupts.innermost():
        Interrupts.end(signal.SIGTERM)  # returns where another thread is ending the process: it closes the record first
    else:  # between two jobs, or before the first one
        os._exit(EXIT_CODES[signal.SIGTERM])
