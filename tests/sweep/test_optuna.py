"""hydra/sweeper=optuna: the job's objective is seconds per image, and pictures that go too far are worth nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from helpers import SMALL

pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="the extra 'optuna'")
pytest.importorskip("skimage", reason="the extra 'report'")

from fluxrun.cli.app import dispatch
from fluxrun.sweep.objective import WORTHLESS_S

pytestmark = pytest.mark.slow  # processes of their own


@pytest.mark.parametrize(("min_psnr", "kept"), [("30", True), ("2000", False)])
def test_optuna_finds_a_setting_and_the_baseline_is_drawn_for_it(tmp_path: Path, min_psnr: str, kept: bool) -> None:
    space = ["attention=choice(math)", "measure.repeats=2", f"sweep.min_psnr={min_psnr}"]
    sweeper = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1"]
    assert dispatch(["--multirun", *sweeper, *SMALL, *space, f"hydra.sweep.dir={tmp_path}"]) == 0
    best = yaml.safe_load((tmp_path / "optimization_results.yaml").read_text())
    assert best["best_params"] == {"attention": "math"}
    assert (best["best_value"] < WORTHLESS_S) is kept
    jobs = {job["job"]: job for job in json.loads((tmp_path / "sweep.json").read_text())["jobs"]}
    assert set(jobs) == {"baseline", "0"}, "a setting that comes up again is not drawn again"
    assert jobs["baseline"]["is_baseline"]
