"""Sweeps as people run them: real processes over the tiny model, jobs that fail, kills, Ctrl+C, resuming."""

from __future__ import annotations

import csv
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from helpers import SMALL, Child, draw, fluxrun, hashes, said, start_fluxrun

from fluxrun.cli.app import dispatch
from fluxrun.errors import ConfigError
from fluxrun.record.folder import RunFolder, read_record

SMALL_RUN = [override for override in SMALL if not override.startswith("steps")]
GRID = [*SMALL_RUN, "attention=sdpa,xformers,math", "steps=2,0", "seed=0,1"]
PATIENCE_S = 240


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "sweep.json").read_text())


def statuses(folder: Path) -> dict[str, str]:
    return {job["job"]: job["status"] for job in read(folder)["jobs"]}


def wait_for(child: Child, what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        assert child.poll() is None, "the sweep ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- a sweep in which half of the jobs are wrong ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Twelve jobs of which six have steps=0, given in an order that would draw the seeds first."""
    folder = tmp_path_factory.mktemp("sweep")
    done = fluxrun("--multirun", "seed=0,1", *[o for o in GRID if "seed" not in o], "hydra.sweep.dir=out", cwd=folder)
    return folder / "out", done


@pytest.mark.slow
def test_every_job_is_a_row_and_the_exit_code_says_that_some_failed(swept: tuple[Path, Any]) -> None:
    folder, done = swept
    assert done.returncode == 1, done.stderr
    jobs = read(folder)["jobs"]
    assert sorted(int(job["job"]) for job in jobs) == list(range(12))
    assert sorted(job["status"] for job in jobs) == ["completed"] * 6 + ["failed"] * 6
    assert all("steps=0" in job["reason"] for job in jobs if job["status"] == "failed")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_failed_job_has_its_own_record_and_its_traceback_in_its_log(swept: tuple[Path, Any]) -> None:
    folder, _ = swept
    failed = [job["job"] for job in read(folder)["jobs"] if job["status"] == "failed"]
    for name in failed:
        record = read_record(folder / name)
        assert record.error is not None
        assert record.config["steps"] == 0
        assert "Traceback" in (folder / name / "fluxrun.log").read_text()


@pytest.mark.slow
def test_weights_are_loaded_once_and_seeds_alone_build_nothing(swept: tuple[Path, Any]) -> None:
    folder, _ = swept
    result = read(folder)
    assert result["order"] == ["attention", "steps", "seed"]
    assert result["loads"] == ["first load"]
    done = {job["job"]: job for job in result["jobs"] if job["status"] == "completed"}
    assert sum(bool(job["load_s"]) for job in done.values()) == 1
    seeds = [job for job in done.values() if "seed=1" in job["overrides"]]
    assert len(seeds) == 3
    assert all(job["continued"] and not job["apply_s"] for job in seeds)


@pytest.mark.slow
def test_fallbacks_are_marked_and_the_neutral_job_is_the_baseline(swept: tuple[Path, Any]) -> None:
    folder, done = swept
    jobs = {tuple(job["overrides"][-3:]): job for job in read(folder)["jobs"]}
    neutral = jobs["attention=sdpa", "steps=2", "seed=0"]
    fell_back = jobs["attention=xformers", "steps=2", "seed=0"]
    assert neutral["is_baseline"]
    assert fell_back["options"]["attention"]["requested"] == "xformers"
    assert fell_back["options"]["attention"]["effective"] == "sdpa"
    assert not fell_back["is_baseline"]
    assert fell_back["psnr_db"] == "Infinity"
    assert fell_back["images"][0]["sha256"] == neutral["images"][0]["sha256"]
    assert fell_back["speedup"] is not None
    assert "attention=xformers fell back to sdpa" in done.stderr


@pytest.mark.slow
def test_the_table_is_sorted_by_speed_with_failed_jobs_last(swept: tuple[Path, Any]) -> None:
    folder, _ = swept
    rows = list(csv.DictReader((folder / "sweep.csv").open()))
    assert len(rows) == 12
    speeds = [float(row["image_s"]) for row in rows if row["image_s"]]
    assert len(speeds) == 6
    assert speeds == sorted(speeds)
    assert [row["status"] for row in rows[6:]] == ["failed"] * 6
    assert rows[0]["attention_effective"]


@pytest.mark.slow
def test_a_job_in_the_middle_of_a_sweep_has_the_pixels_it_has_alone(swept: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = swept
    alone = draw(tmp_path / "alone", "attention=math", "steps=2", "seed=1")
    middle = next(j for j in read(folder)["jobs"] if j["overrides"][-3:] == ["attention=math", "steps=2", "seed=1"])
    assert [image["sha256"] for image in middle["images"]] == hashes(alone)


# --- kills and interrupts ---------------------------------------------------------------------------------------------


def start(folder: Path, *arguments: str, fresh: bool = False) -> Child:
    with (folder / "stderr.txt").open("w") as errors:
        return start_fluxrun(*arguments, cwd=folder, stderr=errors, fresh=fresh)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_a_killed_sweep_is_resumed_with_every_job_once_and_none_lost(tmp_path: Path) -> None:
    grid = [*SMALL_RUN, "steps=2,300", "seed=0,1,2"]
    child = start(tmp_path, "--multirun", *grid, "hydra.sweep.dir=out")
    wait_for(child, (tmp_path / "out" / "3" / "run.json").exists)
    child.kill()
    child.wait()
    assert read_record(tmp_path / "out" / "3").status == "running"
    assert set(statuses(tmp_path / "out")) == {str(n) for n in range(6)}, "all jobs are in sweep.json from the start"
    finished = {str(n): read_record(tmp_path / "out" / str(n)).run_id for n in range(3)}
    assert read(tmp_path / "out")["status"] == "running"

    resumed = fluxrun("--multirun", *grid, "sweep.resume=out", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert statuses(tmp_path / "out") == {str(n): "completed" for n in range(6)}
    assert {name: read_record(tmp_path / "out" / name).run_id for name in finished} == finished
    assert [path.name for path in (tmp_path / "out" / "earlier").iterdir()] == ["3-1"]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
@pytest.mark.parametrize("isolation", ["none", "process"])
def test_ctrl_c_ends_the_sweep_after_the_step_with_a_report(tmp_path: Path, isolation: str) -> None:
    grid = [*SMALL_RUN, "steps=9000,2", f"sweep.isolation={isolation}"]
    child = start(tmp_path, "--multirun", *grid, "hydra.sweep.dir=out", fresh=isolation == "none")
    log = tmp_path / "out" / "0" / "fluxrun.log"
    wait_for(child, lambda: log.exists() and "step " in log.read_text())
    child.send_signal(signal.SIGINT)
    assert child.wait(PATIENCE_S) == 130
    assert read(tmp_path / "out")["status"] == "interrupted"
    assert statuses(tmp_path / "out") == {"0": "interrupted", "1": "pending"}
    assert (tmp_path / "out" / "sweep.csv").exists()
    assert "Traceback" not in (tmp_path / "stderr.txt").read_text()


@pytest.mark.slow
def test_two_sweeps_in_one_folder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fluxrun.sweep.folder import locked

    monkeypatch.chdir(tmp_path)
    with locked(tmp_path / "out"), pytest.raises(ConfigError, match="another sweep is running"):
        dispatch(["--multirun", *GRID, "hydra.sweep.dir=out"])


# --- baselines --------------------------------------------------------------------------------------------------------


def sweep_here(folder: Path, *overrides: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """A sweep in this process; its exit code and its rows by job."""
    code = dispatch(["--multirun", *SMALL_RUN, *overrides, f"hydra.sweep.dir={folder}"])
    return code, {job["job"]: job for job in read(folder)["jobs"]}


@pytest.mark.slow
def test_neutral_pictures_are_drawn_for_every_seed_that_has_none(tmp_path: Path) -> None:
    pytest.importorskip("skimage", reason="the extra 'report'")
    grid = ["steps=2,0", "seed=0,1", "attention=math", "sweep.baseline=neutral"]
    code, jobs = sweep_here(tmp_path / "s", *grid)
    assert code == 1, "steps=0"
    assert {name: job["status"] for name, job in jobs.items()} == {
        "baseline": "completed", "baseline-2": "completed", "0": "completed", "1": "completed", "2": "failed",
        "3": "failed",
    }  # fmt: skip
    assert all(jobs[name]["psnr_db"] is not None and jobs[name]["speedup"] for name in "01")
    assert jobs["baseline-2"]["continued"], "baselines come together, over one pipeline"
    before = {name: read_record(tmp_path / "s" / name).run_id for name in ("baseline", "baseline-2", "0", "1")}
    _, again = sweep_here(tmp_path / "s", *grid)
    assert {name: read_record(tmp_path / "s" / name).run_id for name in before} == before
    assert set(again) == set(jobs)


def test_a_baseline_that_fails_takes_no_job_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fluxrun.sweep import run as sweep

    real = sweep.draw

    def draws(data: dict[str, Any], dirs: Any, folder: Path, whole: sweep.Sweep) -> None:
        if folder.name.startswith("baseline"):
            raise RuntimeError("no baseline today")
        real(data, dirs, folder, whole)

    monkeypatch.setattr(sweep, "draw", draws)
    overrides = ["steps=2", "attention=math,flex", "sweep.baseline=neutral"]
    code, jobs = sweep_here(tmp_path / "s", *overrides)
    assert code == 1
    assert {name: job["status"] for name, job in jobs.items()} == {
        "0": "completed", "1": "completed", "baseline": "failed",
    }  # fmt: skip
    assert "no baseline today" in jobs["baseline"]["reason"]


def test_any_run_folder_can_be_the_baseline(tmp_path: Path) -> None:
    draw(tmp_path / "some run", "steps=2")
    baseline = f"sweep.baseline={tmp_path / 'some run'}"
    code, jobs = sweep_here(tmp_path / "s", "steps=2", "attention=math,flex", baseline)
    assert code == 0
    assert jobs["baseline run"]["is_baseline"]
    assert all(jobs[name]["speedup"] for name in "01")
    assert read(tmp_path / "s")["totals"]["loads"] == 1, "the earlier run's loading is not the sweep's"


def test_a_sweep_of_prompts_keeps_the_pipeline_and_names_each(tmp_path: Path) -> None:
    code, jobs = sweep_here(tmp_path / "s", "steps=2", "prompt=[a red circle],['a star, blue']")
    assert code == 0
    assert [jobs[name]["images"][0]["prompt"] for name in "01"] == ["a red circle", "a star, blue"]
    assert [jobs[name]["continued"] for name in "01"] == [False, True]
    assert "prompt=a star, blue" in (tmp_path / "s" / "sweep.csv").read_text()


def test_a_record_that_cannot_be_read_is_a_failed_row_and_not_the_tables_end(tmp_path: Path) -> None:
    (tmp_path / "s" / "mine").mkdir(parents=True)
    (tmp_path / "s" / "mine" / "run.json").write_text("{ not json")
    code, jobs = sweep_here(tmp_path / "s", "steps=2", "seed=0,1")
    assert {name: job["status"] for name, job in jobs.items()} == {"0": "completed", "1": "completed"}
    assert code == 0
    (tmp_path / "s" / "0" / "run.json").write_text("{ not json")
    assert dispatch(["report", str(tmp_path / "s")]) == 0
    assert statuses(tmp_path / "s") == {"0": "failed", "1": "completed"}


# --- one after another ------------------------------------------------------------------------------------------------


def test_two_sweeps_of_one_process_know_nothing_of_each_other(tmp_path: Path) -> None:
    import fluxrun.sweep.run as module

    before = (dict(vars(module)), list(sys.argv), dict(os.environ))
    first = ["steps=2", "seed=0,1", "attention=nothing_like_it"]
    with pytest.raises(ConfigError):
        sweep_here(tmp_path / "refused", *first)
    code, one = sweep_here(tmp_path / "one", "steps=2", "seed=0,1")
    assert (code, set(one)) == (0, {"0", "1"})
    began = datetime.now(UTC).isoformat(timespec="seconds")
    code, two = sweep_here(tmp_path / "two", "steps=0", "seed=7")
    assert (code, {name: job["status"] for name, job in two.items()}) == (1, {"0": "failed"})
    commands = [read(tmp_path / name)["command"] for name in ("one", "two")]
    assert commands[0] != commands[1]
    assert commands[1][-3:] == ["steps=0", "seed=7", f"hydra.sweep.dir={tmp_path / 'two'}"]
    assert read(tmp_path / "two")["started_at"] >= began
    assert (dict(vars(module)), list(sys.argv), dict(os.environ)) == before


def test_a_single_run_after_a_sweep_is_no_job_of_it(tmp_path: Path) -> None:
    sweep_here(tmp_path / "sweep", "steps=2", "seed=0")
    assert dispatch([*SMALL_RUN, "steps=2", f"hydra.run.dir={tmp_path / 'run'}"]) == 0
    assert set(statuses(tmp_path / "sweep")) == {"0"}
    record = read_record(tmp_path / "run")
    assert (record.status, record.command[-1]) == ("completed", f"hydra.run.dir={tmp_path / 'run'}")


def test_a_task_that_is_sent_to_another_process_leaves_the_sweep_at_home(tmp_path: Path) -> None:
    from fluxrun.config.schema import SweepConfig
    from fluxrun.sweep.run import Sweep, SweepTask

    sweep = Sweep(SweepConfig(), tmp_path, (tmp_path,), [], ["fluxrun"], None)
    sent = pickle.loads(pickle.dumps(SweepTask((tmp_path,), ["fluxrun"], sweep)))
    assert (sent.dirs, sent.command, sent.sweep) == ((tmp_path,), ["fluxrun"], None)


# --- what is refused as a whole ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["--multirun", "attention=sdpa,xformer"], "did you mean 'xformers'"),
        (["--multirun", "stepz=1,2"], "unknown key 'stepz'"),
        (["--multirun", "seed=0,1", "sweep.isolation=proces"], "sweep.isolation=proces"),
        (["--multirun", "seed=0,1", "sweep.resume=nowhere"], "no such folder"),
        (["--multirun", "seed=0,1", "sweep.baseline=attention=math"], "sweep.baseline"),
        (["--multirun", "seed=0,1", "sweep.min_psnr=-3"], "sweep.min_psnr"),
        (["--multirun", "seed=0,1", "hydra.sweep.subdir=a/${hydra.job.num}"], "hydra.sweep.subdir"),
        (["sweep.isolation=process"], "add --multirun"),
        (["+sweep=attention_x_compiler"], "attention_x_compile"),
    ],
)
def test_a_wrong_sweep_is_refused_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=says) as refused:
        dispatch(overrides)
    assert len(said(str(refused.value))) == 1
    assert not (tmp_path / "outputs").exists()


def test_a_signal_in_a_jobs_last_moment_ends_the_sweep_after_it(tmp_path, monkeypatch):
    finish = RunFolder.finish

    def finish_and_signal(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        finish(*arguments)

    monkeypatch.setattr(RunFolder, "finish", finish_and_signal)
    assert dispatch(["--multirun", *SMALL, "seed=0,1", f"hydra.sweep.dir={tmp_path}"]) == 130
    assert statuses(tmp_path) == {"0": "completed", "1": "pending"}
