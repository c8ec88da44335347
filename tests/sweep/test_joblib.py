"""hydra/launcher=joblib: jobs in processes that Hydra's launcher starts, one table of what they left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import SMALL

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
