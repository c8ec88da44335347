"""hydra/launcher=joblib: jobs in processes that Hydra's launcher starts, one table of what they left."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers import SMALL, start_fluxrun

pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="the extra 'joblib'")

from fluxrun.cli.app import dispatch
from fluxrun.record.folder import read_record

pytestmark = pytest.mark.slow  # processes of their own


def test_jobs_in_other_processes_are_in_the_table(tmp_path: Path) -> None:
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", f"hydra.sweep.dir={tmp_path}"]
    arguments = ["--multirun", *launcher, *SMALL, "seed=0,1", "strict=false,maybe"]
    assert dispatch(arguments) == 1
    jobs = json.loads((tmp_path / "sweep.json").read_text())["jobs"]
    assert sorted(job["status"] for job in jobs) == ["completed", "completed", "failed", "failed"]
    assert all("strict=maybe" in job["reason"] for job in jobs if job["status"] == "failed")
    drawn = [tmp_path / image["path"] for job in jobs for image in job["images"]]
    assert len(drawn) == 2
    assert all(path.exists() for path in drawn)
    assert read_record(drawn[0].parents[1]).command == ["fluxrun", *arguments]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_no_row_stays_running_when_a_worker_is_killed(tmp_path: Path) -> None:
    launcher = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=sweep")
    with (tmp_path / "screen.txt").open("w") as stream:
        long = ("--multirun", *SMALL, "num_images=2000", *launcher, "seed=0,1,2")
        sweep = start_fluxrun(*long, cwd=tmp_path, stdout=stream, stderr=stream)
    deadline = time.monotonic() + 240
    while len(list(tmp_path.glob("sweep/[01]/images/*.png"))) < 2:
        assert sweep.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    working = [child for child in psutil.Process(sweep.pid).children() if "LokyProcess" in " ".join(child.cmdline())]
    working[0].kill()
    assert sweep.wait(240) == 1
    screen = (tmp_path / "screen.txt").read_text()
    rows = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["jobs"]
    lost = [row for row in rows if row["status"] == "failed"]
    assert {row["status"] for row in rows} <= {"failed", "pending"}
    assert lost
    assert all(row["reason"] == "WorkerLost: worker lost" for row in lost)
    assert screen.count("worker lost") >= len(lost)
    assert "JoblibLauncher failed: " in screen
    assert "Traceback" not in screen
