"""The parts of workers=N that need no Ray: what is refused, what is counted, what an actor takes over."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import H100

from fluxrun.cli.app import dispatch
from fluxrun.config.schema import RayConfig, WorkersConfig
from fluxrun.errors import ConfigError
from fluxrun.workers import actor, cluster
from fluxrun.workers.actor import Surroundings
from fluxrun.workers.board import Board
from fluxrun.workers.cluster import check_workers
from fluxrun.workers.keeper import start_keeper

# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["workers=0"], "workers=0: input should be greater than 0"),
        (["workers=many"], "workers=many"),
        (["ray.address=auto"], r"add workers=N, or workers=auto"),
        (["ray.adress=auto", "workers=2"], "did you mean 'address'"),
        (["workers=1,2"], "workers is the whole sweep's"),
        (["workers=2", "ray.address=ray://head:10001"], "not a Ray client's"),
        (["workers=2", "parallel=ulysses"], "workers=2 and parallel=ulysses do not go together"),
        (["workers=2", "sweep.isolation=process"], "does not go with sweep.isolation=process"),
        (["workers=2", "hydra.sweep.subdir=job_${hydra.job.num}"], "hydra.sweep.subdir"),
    ],
)
def test_what_does_not_go_together_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cluster, "ray_is_there", lambda: True)
    with pytest.raises(ConfigError, match=says) as refused:
        dispatch(["--multirun", "seed=0,1", *overrides])
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "outputs").exists()


def test_a_run_has_workers_or_several_gpus_a_picture() -> None:
    with pytest.raises(ConfigError, match="workers=2 does not go with parallel=ulysses"):
        dispatch(["workers=2", "parallel=ulysses"])


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "ray_is_there", lambda: False)
    with pytest.raises(ConfigError, match=r"workers=2 needs Ray, .*pip install 'fluxrun\[ray\]'"):
        check_workers(WorkersConfig(workers=2))


def test_each_worker_takes_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "ray_is_there", lambda: True)
    monkeypatch.setattr(cluster, "detect", lambda: H100)
    check_workers(WorkersConfig(workers=1))
    check_workers(WorkersConfig(workers="auto"))
    check_workers(WorkersConfig(workers=8, ray=RayConfig(address="head:6379")))
    with pytest.raises(ConfigError, match="workers=2: each worker takes a GPU, and this machine has 1"):
        check_workers(WorkersConfig(workers=2))


# --- what an actor takes over -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [None, "3"])
def test_an_actor_has_the_commands_threads(monkeypatch: pytest.MonkeyPatch, threads: str | None) -> None:
    """Ray says 1 to every actor; a sum over other threads would be another picture."""
    monkeypatch.delenv(actor.THREADS, raising=False)
    if threads:
        monkeypatch.setenv(actor.THREADS, threads)
    here = Surroundings.here()
    monkeypatch.setenv(actor.THREADS, "1")
    here.set()
    assert os.environ.get(actor.THREADS) == threads
    assert here.variables[actor.WAITING] is not None


# --- how far it is ----------------------------------------------------------------------------------------------------


def test_the_board_counts_from_the_first_task_on(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    board = Board(10, "jobs")
    board.starts(0), board.starts(1)
    board.done = 2  # by an earlier sweep
    assert board.line() == "2 of 10 jobs"
    now = 130.0
    board.waits(0, "here"), board.begins(0, "job 3")
    now = 140.0
    board.pictures(0, 5)
    board.done = 6
    assert board.line() == "6 of 10 jobs, 0.5 pictures a second, about 10 s left"
    assert [str(cell) for cell in board.table().columns[2].cells] == ["job 3", "starting"]


# --- the end of a Ray that was started here ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_the_keeper_ends_what_works_in_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "ray"
    folder.mkdir()
    inside = (folder / "worker.out").open("w")
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], stdout=inside)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        start_keeper(folder).close()
        sleeper.wait(60)
        deadline = time.monotonic() + 60
        while folder.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not folder.exists()
        assert other.poll() is None
    finally:
        sleeper.kill(), other.kill(), inside.close()


def test_the_slurm_example_is_a_script() -> None:
    script = Path(__file__).resolve().parents[2] / "docs" / "workers.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    assert "workers=auto" in script.read_text()
