"""A disk that fills, for real: what is on it is in the record, the record says how it ended, and a table comes."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import SMALL, draw, fluxrun
from PIL import Image

from fluxrun.atomic import Reserve
from fluxrun.config.composition import compose
from fluxrun.errors import ConfigError
from fluxrun.record.folder import RunFolder, read_record, write_failure
from fluxrun.report.result import Result

pytestmark = pytest.mark.slow

MANY = [*(o for o in SMALL if not o.startswith("num_images")), "num_images=20"]
"""More pictures than the small disk holds: some 14 kB each."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An empty disk of 140 kB; a full one is one on which nothing can be written."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=140k", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    ) if os.geteuid() == 0 and os.path.exists("/bin/mount") else None  # fmt: skip
    if made is None or made.returncode:
        pytest.skip("a small disk needs root and mount" if made is None else f"mount: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> None:
    """Leave no byte free."""
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(512))


def check_pictures(folder: Path) -> int:
    """Each picture on the disk is whole and recorded, and the other way round; returns how many there are."""
    record = read_record(folder)
    on_disk = sorted(path.name for path in (folder / "images").iterdir())
    assert [Path(image.path).name for image in record.images] == on_disk
    for name in on_disk:
        with Image.open(folder / "images" / name) as image:
            image.load()
    assert not (folder / ".reserve").exists()
    return len(on_disk)


def test_a_run_ends_with_a_true_record(disk: Path, tmp_path: Path) -> None:
    done = fluxrun(*MANY, f"hydra.run.dir={disk / 'run'}", cwd=tmp_path)
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    record = read_record(disk / "run")
    assert record.status == "failed"
    assert record.error is not None
    assert record.error.stage == "save"
    assert 1 <= check_pictures(disk / "run") < 20


def test_a_disk_that_is_full_from_the_start_is_a_refusal(disk: Path, tmp_path: Path) -> None:
    fill(disk)
    done = fluxrun(*SMALL, f"hydra.run.dir={disk / 'run'}", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1
    assert "No space left on device" in done.stderr
    with pytest.raises(ConfigError, match="cannot write to the output folder"):
        RunFolder(disk / "other", compose([]).source)
    assert not (disk / "other" / "images").exists(), "claimed whole or not at all"
    (disk / "filler").unlink()
    draw(disk / "other")
    assert read_record(disk / "other").status == "completed", "with room again it can be used"


def test_a_sweep_tries_every_job_and_shows_its_table(disk: Path, tmp_path: Path) -> None:
    done = fluxrun("--multirun", *MANY, "seed=0,100,200", f"hydra.sweep.dir={disk / 's'}", cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "--- Logging error ---" not in done.stderr
    assert "3 job(s): 3 failed" in done.stderr
    result = Result.model_validate_json((disk / "s" / "sweep.json").read_text())
    assert {row.job: row.status for row in result.jobs} == {"0": "failed", "1": "failed", "2": "failed"}
    assert all("No space left on device" in (row.reason or "") for row in result.jobs)
    assert (disk / "s" / "sweep.csv").read_text().count("\n") == 4
    check_pictures(disk / "s" / "0")
    assert not (disk / "s" / ".reserve").exists()


def test_the_last_record_fits_however_long_it_has_become(disk: Path) -> None:
    folder = RunFolder(disk / "run", compose([]).source)
    folder.record.notes = [f"note {number}: " + 100 * "x" for number in range(80)]
    folder.write()
    fill(disk)
    folder.record.notes.append("one more")
    with pytest.raises(OSError, match="No space left"):
        folder.write()
    folder.finish("failed", OSError(28, "No space left on device"), "save")
    record = read_record(disk / "run")
    assert (record.status, record.notes[-1]) == ("failed", "one more")


def test_the_record_of_a_process_that_died_is_closed_with_its_reserve(disk: Path) -> None:
    """isolation=process: the child was killed, and so has left its reserve."""
    folder = RunFolder(disk / "run", compose([]).source)
    fill(disk)
    assert (disk / "run" / ".reserve").exists()
    assert write_failure(folder.path, {}, RuntimeError("SIGKILL"))
    assert read_record(folder.path).status == "failed"
    assert not (disk / "run" / ".reserve").exists()


def test_a_log_that_cannot_be_written_is_said_once(disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import logging

    from fluxrun.process.console import LogFile

    fill(disk)
    handler = LogFile(disk / "fluxrun.log")
    for number in range(3):
        handler.handle(logging.makeLogRecord({"msg": f"line {number}", "levelno": logging.INFO}))
    assert capfd.readouterr().err.count("fluxrun.log cannot be written: [Errno 28] No space left on device") == 1
    (disk / "filler").unlink()
    handler.handle(logging.makeLogRecord({"msg": "room again \udcff", "levelno": logging.INFO}))
    handler.close()
    assert "room again \\udcff" in (disk / "fluxrun.log").read_text()


def test_a_reserve_that_cannot_grow_stays(disk: Path) -> None:
    reserve = Reserve(disk / ".reserve")
    reserve.hold(2048)
    fill(disk)
    with pytest.raises(OSError, match="No space left"):
        reserve.hold(100_000)
    assert (disk / ".reserve").stat().st_size >= 4096
    reserve.give_up()
    (disk / "record").write_bytes(bytes(4096))


def test_a_reserve_grows_and_goes(tmp_path: Path) -> None:
    reserve = Reserve(tmp_path / ".reserve")
    reserve.hold(1000)
    before = (tmp_path / ".reserve").stat().st_size
    reserve.hold(before)
    assert (tmp_path / ".reserve").stat().st_size == before, "not written again for every picture"
    reserve.hold(before + 1)
    assert (tmp_path / ".reserve").stat().st_size > before
    reserve.give_up()
    reserve.give_up()
    assert not (tmp_path / ".reserve").exists()


def test_the_reserve_is_there_while_a_run_draws_and_gone_afterwards(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", compose([]).source)
    assert (tmp_path / "run" / ".reserve").stat().st_size > (tmp_path / "run" / "run.json").stat().st_size
    folder.finish("completed")
    assert not (tmp_path / "run" / ".reserve").exists()
