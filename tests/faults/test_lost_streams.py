"""Nobody takes the lines: a closed pipe, a full disk behind ``2>``, a terminal that is gone. Drawing goes on."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import SMALL, command, start_fluxrun

from fluxrun.record.folder import read_record
from fluxrun.streams import Lasting, LastingConsole, lasting

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="POSIX streams")]

PATIENCE_S = 240


def closed_pipe() -> int:
    """The writing end of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


STREAMS: dict[str, Callable[[], int]] = {
    "closed pipe": closed_pipe,
    "full disk": lambda: os.open("/dev/full", os.O_WRONLY),
}


@pytest.fixture(params=STREAMS)
def lost(request: pytest.FixtureRequest) -> Iterator[io.BufferedWriter]:
    with contextlib.suppress(OSError), os.fdopen(STREAMS[request.param](), "wb", buffering=0) as stream:
        yield stream


def test_a_run_draws_all_the_same(lost: io.BufferedWriter, tmp_path: Path) -> None:
    child = start_fluxrun(*SMALL, "num_images=2", "hydra.run.dir=run", cwd=tmp_path, stderr=lost, stdout=lost)
    assert child.wait(PATIENCE_S) == 0
    record = read_record(tmp_path / "run")
    assert (record.status, len(record.images)) == ("completed", 2)
    assert "saved" in (tmp_path / "run" / "fluxrun.log").read_text(), "the log file has what the screen did not get"


@pytest.mark.parametrize("isolation", ["none", "process"])
def test_a_sweep_draws_all_the_same(lost: io.BufferedWriter, tmp_path: Path, isolation: str) -> None:
    grid = [*SMALL, "seed=0,1", f"sweep.isolation={isolation}", "hydra.sweep.dir=s"]
    child = start_fluxrun("--multirun", *grid, cwd=tmp_path, stderr=lost, stdout=lost)
    assert child.wait(PATIENCE_S) == 0
    assert [read_record(tmp_path / "s" / name).status for name in "01"] == ["completed"] * 2
    assert (tmp_path / "s" / "sweep.csv").exists()


def test_a_failure_keeps_its_exit_code(lost: io.BufferedWriter, tmp_path: Path) -> None:
    child = start_fluxrun(*SMALL, "stepz=1", cwd=tmp_path, stderr=lost)
    assert child.wait(PATIENCE_S) == 2


def test_closed_streams(tmp_path: Path) -> None:
    line = " ".join(command(*SMALL, "hydra.run.dir=run")) + " >&- 2>&-"
    assert subprocess.run(["sh", "-c", line], cwd=tmp_path, check=False).returncode == 0
    assert read_record(tmp_path / "run").status == "completed"


def test_a_table_that_nobody_gets_is_no_success(tmp_path: Path) -> None:
    with (tmp_path / "err").open("w") as err, open("/dev/full", "wb", buffering=0) as full:
        for arguments in (["plan", *SMALL], ["--version"], ["--cfg", "job"]):
            assert start_fluxrun(*arguments, cwd=tmp_path, stderr=err, stdout=full).wait(PATIENCE_S) in (1, 2)
    lines = (tmp_path / "err").read_text().splitlines()
    assert len(lines) == 3
    assert all(line.startswith("error: cannot write") for line in lines)


class Terminal:
    """A fluxrun process whose terminal this is, until it is closed."""

    def __init__(self, folder: Path, *arguments: str, nohup: bool = False) -> None:
        self.master, slave = os.openpty()
        self.folder = folder / "run"

        def own_the_terminal() -> None:
            import fcntl
            import termios

            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            if nohup:
                signal.signal(signal.SIGHUP, signal.SIG_IGN)

        self.process = subprocess.Popen(
            command(*arguments, f"hydra.run.dir={self.folder}"), cwd=folder, stdin=slave, stdout=slave, stderr=slave,
            preexec_fn=own_the_terminal,  # noqa: PLW1509 - no other thread of a test is in the middle of anything
        )  # fmt: skip
        os.close(slave)

    def read_until_a_picture(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        os.set_blocking(self.master, False)
        while not list(self.folder.glob("images/*.png")):
            assert self.process.poll() is None
            assert time.monotonic() < deadline
            with contextlib.suppress(BlockingIOError):
                os.read(self.master, 65536)
            time.sleep(0.02)


@pytest.mark.slow
def test_a_terminal_that_is_closed_interrupts_with_a_true_record(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path, *SMALL[:-1], "num_images=500")
    terminal.read_until_a_picture()
    os.close(terminal.master)
    assert terminal.process.wait(PATIENCE_S) == 129
    record = read_record(tmp_path / "run")
    assert record.status == "interrupted"
    assert len(record.images) == len(list((tmp_path / "run" / "images").iterdir())) >= 1


@pytest.mark.slow
def test_under_nohup_it_draws_on(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path, *SMALL, "num_images=4", nohup=True)
    terminal.read_until_a_picture()
    os.close(terminal.master)
    assert terminal.process.wait(PATIENCE_S) == 0
    record = read_record(tmp_path / "run")
    assert (record.status, len(record.images)) == ("completed", 4)


# --- in this process --------------------------------------------------------------------------------------------------


class Gone(io.StringIO):
    """A stream without a file behind it."""

    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")

    def flush(self) -> None:
        raise ValueError("I/O operation on closed file")


def test_a_console_and_a_print_outlive_their_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Gone())
    LastingConsole().print("a line")
    with lasting("stderr"):
        print("another", file=sys.stderr, flush=True)
    assert isinstance(sys.stderr, Gone), "put back"
    monkeypatch.setattr(sys, "stderr", None)
    LastingConsole().print("a line")
    with lasting("stderr"):
        print("another", file=sys.stderr)


def test_a_stream_that_is_there_gets_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    LastingConsole().print("a [bold]line[/bold]")
    with lasting("stderr"):
        print("another", file=sys.stderr)
    assert stream.getvalue() == "a line\nanother\n"
    assert Lasting(stream).write("four") == 4
