"""``python -m fluxrun.workers.keeper FOLDER``: ends what is left of a Ray that worked in FOLDER, and removes FOLDER.

It does so once its standard input closes, because then the command that has started Ray is over, or was killed: Ray's
own processes notice the latter, but some of them only a minute later.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import psutil

LAST_S = 5.0
"""How long it looks for processes that may still be starting."""


def start_keeper(folder: Path) -> IO[bytes]:
    """Start it; closing what is returned is its signal, and so is the end of this process."""
    keeper = subprocess.Popen(
        [sys.executable, "-m", "fluxrun.workers.keeper", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # a Ctrl+C is for the command
    )
    assert keeper.stdin is not None
    return keeper.stdin


def main(folder: Path, driver: int) -> None:
    """Wait, then end the processes; nothing else in them says whose they are but the log files they have open."""
    sys.stdin.read()
    last = time.monotonic() + LAST_S
    while left := _working_in(str(folder), driver):
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=1)
        if time.monotonic() > last:
            break
    shutil.rmtree(folder, ignore_errors=True)


def _working_in(folder: str, driver: int) -> list[psutil.Process]:
    """Processes with an open file in the folder, but for the command's own, which may be closing them right now."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid not in (driver, os.getpid()) and process.status() != psutil.STATUS_ZOMBIE:
                found += [process] if any(file.path.startswith(folder) for file in process.open_files()) else []
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), os.getppid())
