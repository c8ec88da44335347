"""Leaving fast skips taking the interpreter apart, and nothing else."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.slow

LEAVES = """
import atexit, logging, subprocess, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from fluxrun.process.ending import leave_in_order

class Apart:
    def __del__(self):
        print("taken apart", flush=True)

apart = Apart()
logging.basicConfig(filename="log", level=logging.INFO)
logging.info("logged")
atexit.register(print, "at exit")
pool = ThreadPoolExecutor()  # never shut down: its idle thread waits for ever
pool.submit(time.sleep, 0)
threading.Thread(target=lambda: (time.sleep(0.3), print("thread"))).start()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
file = open("file", "w")
file.write("a file that nobody closed")
print("child", child.pid)
print("no line end", end="")
leave_in_order(3)
"""


def test_what_is_done_before_a_process_leaves(tmp_path: Path) -> None:
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", LEAVES], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert time.monotonic() - begun < 30
    assert done.returncode == 3, done.stderr
    first, *rest = done.stdout.splitlines()
    assert rest == ["no line endthread", "at exit"]
    assert "logged" in (tmp_path / "log").read_text()
    assert (tmp_path / "file").read_text() == "a file that nobody closed"
    with contextlib.suppress(psutil.NoSuchProcess):  # whoever has inherited it may not have taken note yet
        psutil.Process(int(first.split()[1])).wait(10)


REAPED = """
import subprocess, time
import psutil
from fluxrun.process.ending import reap
ended, lasting = subprocess.Popen(["true"]), subprocess.Popen(["sleep", "60"])
child = psutil.Process(ended.pid)
while child.status() != psutil.STATUS_ZOMBIE:
    time.sleep(0.01)
reap()
assert not child.is_running()
assert lasting.poll() is None
lasting.kill()
lasting.wait()
reap()
"""


def test_children_that_have_ended_leave_the_systems_table() -> None:
    subprocess.run([sys.executable, "-c", REAPED], check=True)
