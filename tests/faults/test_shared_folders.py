"""Two processes and one folder, and a second signal: who came first keeps everything, no record says ``running``."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import SMALL, fluxrun, start_fluxrun

from fluxrun.errors import ConfigError
from fluxrun.record.claiming import claimed
from fluxrun.record.folder import read_record

pytestmark = pytest.mark.slow

PATIENCE_S = 240


def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("arguments", [["seed=7"], ["seed=7", "hydra.output_subdir=null"]])
def test_a_folder_in_use_is_refused_and_stays_as_it_is(tmp_path: Path, arguments: list[str]) -> None:
    folder = tmp_path / "run"
    with claimed(folder):  # whose record is still to be written
        (folder / "fluxrun.log").write_text("the first one's")
        before = contents(folder)
        done = fluxrun(*SMALL, *arguments, "hydra.run.dir=run", cwd=tmp_path)
        assert done.returncode == 2
        assert "another run is being drawn into" in done.stderr
        assert contents(folder) == before


def test_two_runs_at_once_into_one_folder(tmp_path: Path) -> None:
    with (tmp_path / "0").open("w") as one, (tmp_path / "1").open("w") as two:
        both = [
            start_fluxrun(*SMALL, f"seed={seed}", "hydra.run.dir=run", cwd=tmp_path, stderr=stream)
            for seed, stream in enumerate((one, two))
        ]
        codes = [child.wait(PATIENCE_S) for child in both]
    assert sorted(codes) == [0, 2]
    winner = codes.index(0)
    record = read_record(tmp_path / "run")
    assert (record.status, record.config["seed"]) == ("completed", winner)
    assert f"seed={winner}" in (tmp_path / "run" / ".hydra" / "overrides.yaml").read_text()
    log = (tmp_path / "run" / "fluxrun.log").read_text()
    assert "already holds" not in log
    assert "another run" not in log
    assert [path.name for path in (tmp_path / "run").glob(".*") if path.is_file()] == [], "neither lock nor reserve"


def test_a_used_folder_is_refused_and_let_go(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match="already holds a run"), claimed(tmp_path):
        pytest.fail("claimed")
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_the_command_in_the_record_is_what_was_typed(tmp_path: Path) -> None:
    """The folder is pinned for Hydra alone: typed again, the command gets a folder of its own."""
    done = fluxrun(*SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = (path.parent for path in tmp_path.rglob("run.json"))
    assert not any("hydra.run.dir" in word for word in read_record(folder).command)
    assert (folder / ".hydra" / "overrides.yaml").exists()
    assert (folder / "fluxrun.log").read_text()


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
@pytest.mark.parametrize("isolation", ["none", "process"])
def test_a_second_signal_leaves_no_record_running(tmp_path: Path, isolation: str) -> None:
    """A step of a picture this large takes seconds: the second signal finds it drawing."""
    large = ["model=tiny", "height=1024", "width=1024", "steps=200", f"sweep.isolation={isolation}"]
    with (tmp_path / "err").open("w") as err:
        child = start_fluxrun("--multirun", *large, "seed=0,1", "hydra.sweep.dir=s", cwd=tmp_path, stderr=err)
        until(lambda: "s/step" in (tmp_path / "err").read_text())
        child.send_signal(signal.SIGINT)
        until(lambda: "stopping at the next step" in (tmp_path / "err").read_text())
        child.send_signal(signal.SIGINT)
        assert child.wait(PATIENCE_S) == 130
    assert read_record(tmp_path / "s" / "0").status == "interrupted"
    result = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert result["status"] == "interrupted"
    assert {job["job"]: job["status"] for job in result["jobs"]} == {"0": "interrupted", "1": "pending"}


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_a_doubled_signal_ends_an_isolated_job_with_a_true_record(tmp_path: Path) -> None:
    """Both signals at once, as a stuck key or an impatient supervisor sends them."""
    grid = [*SMALL[:-1], "num_images=500", "sweep.isolation=process", "seed=0,1", "hydra.sweep.dir=s"]
    with (tmp_path / "err").open("w") as err:
        child = start_fluxrun("--multirun", *grid, cwd=tmp_path, stderr=err)
        until(lambda: list((tmp_path / "s" / "0" / "images").glob("*.png")) != [])
        child.send_signal(signal.SIGINT)
        child.send_signal(signal.SIGTERM)
        assert child.wait(PATIENCE_S) in (130, 143)
    record = read_record(tmp_path / "s" / "0")
    assert record.status == "interrupted"
    assert len(record.images) == len(list((tmp_path / "s" / "0" / "images").iterdir()))
    assert json.loads((tmp_path / "s" / "sweep.json").read_text())["status"] == "interrupted"
