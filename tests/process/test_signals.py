"""Real signals to real processes, in every stage: finished images stay, nothing half-done does, nobody is left."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import SMALL, start_fluxrun
from PIL import Image

from fluxrun.process.signals import Interrupts
from fluxrun.record.folder import read_record

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix", reason="POSIX signals"),
]
PATIENCE_S = 240
"""How long to wait for something on a busy machine before a test gives up; nothing is timed."""

MANY_STEPS = ("model=tiny", "num_images=3", "steps=400", "height=64", "width=64", "model.max_sequence_length=32")


class Child:
    """A fluxrun process in its own session, with its standard error in a file."""

    def __init__(self, folder: Path, *arguments: str, **how: Any) -> None:
        self.folder = folder
        self.run_folder = folder / "run"
        self.errors = folder / "stderr.txt"
        with self.errors.open("w") as stream:
            self.process = start_fluxrun(
                *arguments, f"hydra.run.dir={self.run_folder}", cwd=folder, stderr=stream, **how
            )
        self.seen: set[psutil.Process] = set()

    def wait_for(self, what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not what():
            self.look_at_children()
            assert self.process.poll() is None, self.errors.read_text()
            assert time.monotonic() < deadline, self.errors.read_text()
            time.sleep(0.02)

    def look_at_children(self) -> None:
        try:
            self.seen |= set(psutil.Process(self.process.pid).children(recursive=True))
        except psutil.NoSuchProcess:
            return

    def signal(self, number: signal.Signals) -> None:
        self.look_at_children()
        # As a terminal does it: to everybody in the foreground.
        os.killpg(self.process.pid, number)

    def ended(self) -> int:
        code = self.process.wait(PATIENCE_S)
        _gone, alive = psutil.wait_procs(list(self.seen), timeout=20)
        assert not alive
        return code

    def said(self) -> str:
        return self.errors.read_text()

    def images(self) -> list[Path]:
        return sorted((self.run_folder / "images").glob("*.png"))

    def leftovers(self) -> list[Path]:
        return [path for path in self.run_folder.rglob("*") if path.name.startswith(".") and path.is_file()]


@pytest.fixture
def start(tmp_path):
    started: list[Child] = []

    def start(*arguments: str, **how: Any) -> Child:
        started.append(Child(tmp_path, *arguments, **how))
        return started[-1]

    yield start
    for child in started:
        if child.process.poll() is None:
            os.killpg(child.process.pid, signal.SIGKILL)
            child.process.wait()


def check_stopped(child: Child, code: int, images: int | None = None) -> None:
    assert child.ended() == code, child.said()
    record = read_record(child.run_folder)
    assert record.status == "interrupted"
    assert record.finished_at is not None
    assert record.error is not None
    assert record.error.type == "Interrupted"
    assert [Path(image.path).name for image in record.images] == [path.name for path in child.images()]
    for path in child.images():
        with Image.open(path) as image:
            image.load()
    if images is not None:
        assert len(record.images) == images
    assert child.leftovers() == []
    assert "Traceback" not in child.said()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_while_drawing(start, number, code):
    """One picture is finished, the second is being drawn."""
    child = start(*MANY_STEPS, fresh=number == signal.SIGINT)
    child.wait_for(lambda: len(child.images()) == 1)
    child.signal(number)
    check_stopped(child, code)
    assert 1 <= len(child.images()) <= 2


def test_while_loading(start):
    child = start(*SMALL)
    child.wait_for((child.run_folder / "run.json").exists)
    child.signal(signal.SIGINT)
    check_stopped(child, 130, images=0)
    error = read_record(child.run_folder).error
    assert error is not None
    assert error.stage in ("prepare", "load")


def test_while_compiling(start, tmp_path):
    """A cold compile takes some twenty seconds; it is not waited out."""
    child = start(
        *SMALL, "compile=default", "+compile.inductor_options.compile_threads=2",
        env={"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"), "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    child.wait_for(lambda: "Compiling" in child.said())
    child.signal(signal.SIGINT)
    check_stopped(child, 130, images=0)
    record = read_record(child.run_folder)
    assert record.options["compile"].fallbacks == []  # an interrupt is not a failure of the option


def test_the_second_signal_ends_at_once(start):
    """The first one would wait for a step, and a step of a picture this large takes seconds; the second does not."""
    child = start("model=tiny", "height=1024", "width=1024", "steps=200", "num_images=2")
    child.wait_for(lambda: "s/step" in child.said())  # while loading, the first one would end it already
    child.signal(signal.SIGINT)
    child.wait_for(lambda: "stopping at the next step" in child.said())
    child.signal(signal.SIGINT)
    assert child.ended() == 130, child.said()
    record = read_record(child.run_folder)
    assert record.status == "interrupted"
    assert record.images == []
    assert child.images() == child.leftovers() == []


def test_before_anything_began(start):
    child = start("plan", fresh=True)
    child.process.send_signal(signal.SIGTERM)
    assert child.process.wait(PATIENCE_S) in (143, -signal.SIGTERM, 0)


def swallowed_by_a_library() -> None:
    """As Hydra does it in the middle of composing."""
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    except KeyboardInterrupt:
        raise ValueError("no such config") from None


def test_what_a_library_makes_of_an_interrupt_is_one_again():
    with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt), interrupts.immediate():
        swallowed_by_a_library()
    assert interrupts.error().exit_code == 143


def test_an_error_without_an_interrupt_stays_what_it_is():
    with Interrupts() as interrupts, pytest.raises(ValueError, match="no such config"), interrupts.immediate():
        raise ValueError("no such config")


def test_an_interrupt_that_hits_a_destructor_is_raised_after_it(capsys: pytest.CaptureFixture[str]) -> None:
    class Hit:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.001)  # where the handler runs, and raises

    def draw() -> None:
        Hit()
        time.sleep(PATIENCE_S)

    hook = sys.unraisablehook
    with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt), interrupts.immediate():
        draw()
    assert interrupts.requested == signal.SIGINT
    assert "Traceback" not in capsys.readouterr().err
    assert sys.unraisablehook is hook
