"""Folders that cannot be written, from the start or suddenly, and folders that vanish while a run draws, for real."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import SMALL, fluxrun, start_fluxrun
from PIL import Image

from fluxrun.record.folder import read_record

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="POSIX mounts and open files")]

MANY = [*SMALL, "num_images=3000"]
PATIENCE_S = 240


def mount(*arguments: str) -> None:
    """What takes root to do, or the test is left out."""
    if os.geteuid() or not shutil.which("mount"):
        pytest.skip("a read-only folder needs root and mount: chmod does not stop root")
    made = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"mount: {made.stderr.strip()}")


def make_read_only(folder: Path) -> None:
    """From now on nothing in it can be written, but for files that are open already."""
    other = folder.parents[1] / "read_only"
    other.mkdir(exist_ok=True)
    mount("--bind", str(folder), str(other))
    mount("-o", "remount,bind,ro", str(other))
    mount("--bind", str(other), str(folder))  # in one step: a folder in use cannot be remounted
    subprocess.run(["umount", "-l", str(other)], check=True)


def vanish(folder: Path) -> None:
    """In one step, as deleting it file by file is a race with who makes new ones."""
    folder.rename(folder.parents[1] / "vanished")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder whose mounts are taken away at the end."""
    folder = tmp_path / "in" / "place"
    folder.mkdir(parents=True)
    yield folder
    for path in (*folder.glob("*"), folder, tmp_path / "read_only"):
        subprocess.run(["umount", "-l", str(path)], capture_output=True, check=False)


def while_drawing(change: Callable[[], None], place: Path, *arguments: str) -> tuple[int, str]:
    """Change something once the first picture is there; returns the exit code and what was on the screen."""
    screen = place.parent / "stderr.txt"
    with screen.open("w") as errors:
        child = start_fluxrun(*arguments, cwd=place.parent, stderr=errors)
    deadline = time.monotonic() + PATIENCE_S
    while not any(place.glob("**/images/*.png")):
        assert child.poll() is None, screen.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    change()
    code = child.wait(PATIENCE_S)
    return code, screen.read_text()


def errors_in(screen: str) -> list[str]:
    assert "Traceback" not in screen
    assert "--- Logging error ---" not in screen
    return [line for line in screen.splitlines() if line.startswith("error:")]


# --- that cannot be written -------------------------------------------------------------------------------------------


def test_a_read_only_folder_is_a_refusal(place: Path) -> None:
    make_read_only(place)
    for arguments in ([f"hydra.run.dir={place / 'run'}"], ["--multirun", f"hydra.sweep.dir={place / 's'}", "seed=0,1"]):
        done = fluxrun(*arguments, *SMALL, cwd=place.parent)
        assert done.returncode == 2, done.stderr
        assert len(errors_in(done.stderr)) == 1
        assert "Read-only file system" in done.stderr


def test_a_folder_that_turns_read_only_fails_the_run_in_one_line(place: Path) -> None:
    run = place / "run"
    code, screen = while_drawing(lambda: make_read_only(run), place, *MANY, f"hydra.run.dir={run}")
    assert code == 1
    line, *more = errors_in(screen)
    assert not more
    assert "Read-only file system" in line
    subprocess.run(["umount", "-l", str(run)], check=True)
    record = read_record(run)
    assert record.status == "running", "what cannot be written stays as it was"
    for image in record.images:
        with Image.open(run / image.path) as picture:
            picture.load()


# --- that vanish ------------------------------------------------------------------------------------------------------


def test_a_folder_that_vanishes_while_drawing_fails_the_run_in_one_line(place: Path) -> None:
    run = place / "run"
    code, screen = while_drawing(lambda: vanish(run), place, *MANY, f"hydra.run.dir={run}")
    assert code == 1
    line, *more = errors_in(screen)
    assert not more
    assert "No such file or directory" in line
    assert not (run / "run.json").exists(), "there is no run any more that a record could be of"


def test_a_job_whose_folder_vanishes_fails_alone(place: Path) -> None:
    sweep = place / "s"
    arguments = ["--multirun", *SMALL, "num_images=1000,1", f"hydra.sweep.dir={sweep}"]
    code, screen = while_drawing(lambda: vanish(sweep / "0"), place, *arguments)
    assert code == 1
    line, *more = errors_in(screen)
    assert not more
    assert "No such file or directory" in line
    assert read_record(sweep / "1").status == "completed"
    assert "failed" in (sweep / "sweep.csv").read_text()


def test_a_sweep_whose_folder_vanishes_says_so_and_ends(place: Path) -> None:
    sweep = place / "s"
    arguments = ["--multirun", *SMALL, "num_images=1000,1", f"hydra.sweep.dir={sweep}"]
    code, screen = while_drawing(lambda: vanish(sweep), place, *arguments)
    assert code == 1
    assert errors_in(screen)
