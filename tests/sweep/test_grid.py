"""A grid before its jobs run: counted, its options looked at once each, its jobs known without composing them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import SMALL, fluxrun

from fluxrun.cli.app import dispatch
from fluxrun.config.composition import compose_node, config_dirs, hydra_for, to_data
from fluxrun.config.origin import CheckingLoader
from fluxrun.config.prompts import MOST_IMAGES
from fluxrun.errors import ConfigError, TrustError
from fluxrun.record.folder import data_hash, read_record
from fluxrun.report.rows import GridJob
from fluxrun.sweep import grid as grid_module
from fluxrun.sweep.grid import MOST_JOBS, axes_of_grid, compose_grid


@pytest.fixture
def composed(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """The overrides of each composition that a grid makes."""
    calls: list[Sequence[str]] = []

    def composing(hydra: Any, overrides: Sequence[str], dirs: Any) -> Any:
        calls.append(overrides)
        return compose_node(hydra, overrides, dirs)

    monkeypatch.setattr(grid_module, "compose_node", composing)
    return calls


def jobs_of(*overrides: str, config_dir: Path | None = None, check: bool = False) -> list[GridJob]:
    """A grid's jobs; with ``check`` each is held against its own composition."""
    dirs = config_dirs(config_dir)
    with hydra_for(dirs) as hydra:
        jobs = compose_grid(hydra, axes_of_grid(hydra, overrides, dirs), dirs)
        for job in jobs if check else ():
            assert job.config_hash == data_hash(to_data(compose_node(hydra, job.for_hydra, dirs)))
    return jobs


def test_a_grid_is_known_with_the_hash_of_each_job() -> None:
    jobs = jobs_of("attention=glob(m*)", "steps=0,2", "hydra.sweep.dir=x", "sweep.baseline=auto", check=True)
    assert [job.overrides for job in jobs] == [("attention=math", "steps=0"), ("attention=math", "steps=2")]
    assert jobs[0].for_hydra == ("attention=math", "steps=0", "sweep.baseline=auto")
    assert jobs[0].config_hash != jobs[1].config_hash
    assert "sweep" not in jobs[0].data


@pytest.mark.parametrize(
    "overrides",
    [
        ["attention=flex,sdpa", "compile=none,regional", "seed=1,1,2"],
        ["prompt=[a red circle],['a star, blue']", "guidance=1,2.5,null,1.0,true"],
        ["measure={repeats:2,warmup:1},{repeats:3,warmup:0}", "seed=choice(7,'8')"],
        ["height=64,128", "width=${height},96"],
        ["+compile.inductor_options.a=1,2", "compile=regional"],
        ["model=tiny,shapes", "steps=range(1,4)", "prompt='${seed}',b"],
    ],
    ids=lambda overrides: overrides[0].partition("=")[0],
)
def test_a_job_is_what_its_own_composition_makes_of_it(overrides: list[str]) -> None:
    assert jobs_of(*overrides, check=True)


def test_each_option_is_composed_once_and_not_each_job(composed: list[Sequence[str]]) -> None:
    assert len(jobs_of("attention=sdpa,math,flex", "compile=none,regional", "seed=range(0,500)")) == 3000
    assert len(composed) == 5, "the first job, two and one further options, the last job"


def test_five_thousand_seeds_are_two_compositions(composed: list[Sequence[str]]) -> None:
    jobs = jobs_of("seed=range(0,5000)")
    assert len({job.config_hash for job in jobs}) == 5000
    assert len(composed) == 2


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["seed=range(0,50000000)"], "50,000,000 jobs, and 10,000 are the most"),
        (["seed=range(0,200)", "steps=range(0,200)"], "40,000 jobs"),
        (["seed=shuffle(range(0,1e300,0.5))"], r"10\^15 or more jobs"),
        (["seed=range(0,0)"], "nothing to vary"),
        (["seed=range(0,1,0)"], "cannot be counted"),
        (["attention=glob(zz*)"], "nothing to vary"),
        (["seed=range(0,9)", "attention=sdpa,nope"], "unknown option attention=nope"),
        (["attention=sdpa,math", "compile=none,regional,nope"], "unknown option compile=nope"),
        (["seed=range(0,9)", "stepz=1,2"], "unknown key 'stepz'"),
    ],
)
def test_what_refuses_the_whole_grid_does_so_before_it_is_listed(overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as refused:
        jobs_of(*overrides)
    assert "\n" not in str(refused.value)


def test_the_most_jobs_are_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MOST_JOBS == 10_000
    monkeypatch.setattr(grid_module, "MOST_JOBS", 4)
    assert len(jobs_of("seed=range(0,4)")) == 4
    with pytest.raises(ConfigError, match="5 jobs, and 4 are the most"):
        jobs_of("seed=range(0,5)")


@pytest.mark.parametrize("count", [MOST_IMAGES + 1, 50_000_000])
def test_too_many_images_are_refused_before_they_are_listed(tmp_path: Path, count: int) -> None:
    with pytest.raises(ConfigError, match=f"{count:,} images, and {MOST_IMAGES:,} are the most"):
        dispatch([*SMALL, f"num_images={count}", f"hydra.run.dir={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


def test_a_strangers_option_refuses_the_whole_grid(tmp_path: Path) -> None:
    (tmp_path / "preset").mkdir()
    (tmp_path / "preset" / "mine.yaml").write_text("# @package _global_\nsteps: 2\n")
    (tmp_path / "preset" / "theirs.yaml").write_text("# @package _global_\ncompile: {cache_dir: /somewhere}\n")
    with pytest.raises(TrustError, match=r"theirs\.yaml sets 'compile\.cache_dir'"):
        jobs_of("+preset=mine,theirs", "seed=range(0,9)", config_dir=tmp_path)


# --- jobs as they come ------------------------------------------------------------------------------------------------


def test_what_does_not_go_together_fails_as_its_own_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loads(self: Any, config: Any, overrides: list[str]) -> Any:
        if {"seed=1", "batch_size=2"} <= set(overrides):
            raise RuntimeError("not\ntogether")
        return original(self, config, overrides)

    original = CheckingLoader.load_sweep_config
    monkeypatch.setattr(CheckingLoader, "load_sweep_config", loads)
    code = dispatch(["--multirun", *SMALL, "batch_size=1,2", "seed=0,1,2", f"hydra.sweep.dir={tmp_path}"])
    assert code == 1
    jobs = {job["job"]: job for job in json.loads((tmp_path / "sweep.json").read_text())["jobs"]}
    assert {name: job["status"] for name, job in jobs.items()} == {
        "0": "completed", "1": "completed", "2": "completed", "3": "completed", "4": "failed", "5": "completed",
    }  # fmt: skip
    assert jobs["4"]["reason"].startswith("ConfigError: ")
    assert read_record(tmp_path / "4").config["seed"] == 1


def test_a_job_like_one_before_is_not_drawn_again(tmp_path: Path) -> None:
    arguments = ["--multirun", *SMALL, "seed=0,0,1", f"hydra.sweep.dir={tmp_path}"]
    assert dispatch(arguments) == 0
    assert sorted(path.parent.name for path in tmp_path.glob("*/run.json")) == ["0", "2"]
    before = {name: read_record(tmp_path / name).run_id for name in ("0", "2")}
    assert dispatch(arguments) == 0
    assert {name: read_record(tmp_path / name).run_id for name in before} == before


@pytest.mark.slow
def test_the_number_of_jobs_is_said_before_the_first_one(tmp_path: Path) -> None:
    done = fluxrun("--multirun", *SMALL, "seed=range(0,2)", "hydra.sweep.dir=out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[0] == "2 jobs, into out"
