"""Signs of life: who is gone, who is stopped, and who has ended in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fluxrun.process.heartbeat import Watch, is_alive

CHILD = """
import sys, threading, time
from pathlib import Path
from fluxrun.process.heartbeat import Heartbeat
orphaned = threading.Event()
heart = Heartbeat(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), orphaned.set)
heart.start()
if sys.argv[4] == "ends":
    heart.end("out of luck")
elif sys.argv[4] == "orphan":
    orphaned.wait(20)
    heart.end("nobody there")
else:
    time.sleep(60)
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    children: list[subprocess.Popen[bytes]] = []

    def started(rank: int, how: str = "stays", parent: int | None = None) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-c", CHILD, str(tmp_path), str(rank), str(parent or os.getpid()), how]
        children.append(subprocess.Popen(words))
        return children[-1]

    yield started
    for child in children:
        child.kill()
        child.wait()


def until(found: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_process_is_gone_and_a_stopped_one_silent(
    tmp_path: Path, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    children = [start(rank) for rank in range(2)]
    watch = Watch(tmp_path, 2, silent_s=3)
    until(lambda: len(watch.beats()) == 2)
    assert (watch.gone(), watch.silent(), watch.failed()) == ([], [], None)
    children[1].send_signal(signal.SIGSTOP)
    until(watch.silent)
    assert (watch.silent(), watch.gone()) == ([1], [])
    children[1].kill()  # a zombie by now, as nobody has asked how it ended
    until(watch.gone)
    assert watch.gone() == [1]


@pytest.mark.slow
def test_what_has_ended_in_order_is_not_missed(tmp_path: Path, start: Callable[..., subprocess.Popen[bytes]]) -> None:
    watch = Watch(tmp_path, 2, silent_s=0.1)
    gone = start(0)
    gone.kill()
    gone.wait()
    start(0, "ends").wait(20)
    start(1, "orphan", parent=gone.pid).wait(20)
    assert (watch.gone(), watch.silent()) == ([], [])
    assert watch.failed() == (0, "out of luck")


def test_a_process_that_is_not_there() -> None:
    assert is_alive(os.getpid())
    child = subprocess.Popen(["true"])
    child.wait()
    assert not is_alive(child.pid)
