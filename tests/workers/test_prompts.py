"""workers=N for a prompt set: parts drawn by workers, one folder, one record; what is lost is drawn again."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import SMALL, draw, fluxrun, hashes, small
from ray_processes import Started
from tagged_processes import gone

from fluxrun.config.schema import RunConfig, WorkersConfig
from fluxrun.errors import FluxrunError
from fluxrun.pipeline.session_pool import SessionPool
from fluxrun.record.folder import read_record
from fluxrun.workers import prompts
from fluxrun.workers.actor import Begun, Ended, Event, Saved
from fluxrun.workers.board import Board
from fluxrun.workers.cluster import Cluster
from fluxrun.workers.pool import Task, WorkerLost
from fluxrun.workers.prompts import PartWork, run_on_workers

TWO = WorkersConfig(workers=2)


class Here:
    """A pool whose one worker is this process; the worker is lost after so many pictures of a task, so many times."""

    losses: int
    after = 1

    def __init__(self, cluster: Cluster, work: PartWork, board: Board) -> None:
        self._work = work

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def run(self, tasks: Iterator[Task]) -> Iterator[tuple[Task, Event | WorkerLost]]:
        with SessionPool() as pool:
            for task in tasks:
                yield task, Begun()
                while task.lost < self.losses:
                    told: list[Event] = []
                    self._work(task.what, told.append, pool)
                    for event in told[: self.after]:
                        yield task, event
                    task.lost += 1
                    yield task, WorkerLost("worker lost")
                    if task.lost > 2:
                        break
                else:
                    told = []
                    result = self._work(task.what, told.append, pool)
                    yield from ((task, event) for event in told)
                    yield task, Ended(result=result)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> type[Here]:
    @contextlib.contextmanager
    def connected(crew: WorkersConfig) -> Iterator[Cluster]:
        yield Cluster(0, 2)

    monkeypatch.setattr(prompts, "connected", connected)
    monkeypatch.setattr(prompts, "Pool", Here)
    monkeypatch.setattr(Here, "losses", 0, raising=False)
    return Here


def lines(folder: Path, number: int) -> RunConfig:
    """A prompt set of so many lines."""
    file = folder / "prompts.txt"
    file.write_text("".join(f"a red circle, number {n}\n" for n in range(number)))
    return small(f"prompts_file={file}")


def test_the_pictures_are_those_of_one_process(tmp_path: Path, here: type[Here]) -> None:
    config = lines(tmp_path, 5)
    record = run_on_workers(config, tmp_path / "run", TWO, command=["fluxrun"])
    alone = draw(tmp_path / "alone", f"prompts_file={tmp_path / 'prompts.txt'}")
    assert hashes(record) == hashes(alone)
    assert read_record(tmp_path / "run").status == "completed"
    assert record.options["attention"].effective == "sdpa"
    assert record.timings.steady_step_s is not None
    assert record.environment["torch"]


def test_of_a_lost_part_only_what_is_missing_is_drawn_again(tmp_path: Path, here: type[Here], monkeypatch: Any) -> None:
    monkeypatch.setattr(here, "losses", 1)
    config = lines(tmp_path, 16)
    drawn: list[str] = []
    real = PartWork.__call__

    def counts(self: PartWork, task: Any, tell: Any, pool: SessionPool) -> Any:
        def told(event: Event) -> None:
            if isinstance(event, Saved):
                drawn.append(event.picture.path)
            tell(event)

        return real(self, task, told, pool)

    monkeypatch.setattr(PartWork, "__call__", counts)
    record = run_on_workers(config, tmp_path / "run", TWO)
    assert len(record.images) == len({image.path for image in record.images}) == 16
    parts = 8  # two pictures each: the first was told of before the worker was lost
    assert len(drawn) == 16 + parts


def test_a_part_that_loses_every_worker_fails_the_run_and_resume_draws_it(
    tmp_path: Path, here: type[Here], monkeypatch: Any
) -> None:
    monkeypatch.setattr(here, "losses", 3)
    config = lines(tmp_path, 2)
    monkeypatch.setattr(here, "after", 0)
    with pytest.raises(WorkerLost, match=r"worker lost, 3 times each over line 1, line 2: 2 image\(s\) are missing"):
        run_on_workers(config, tmp_path / "run", TWO)
    record = read_record(tmp_path / "run")
    assert (record.status, record.error and record.error.type) == ("failed", "WorkerLost")
    monkeypatch.setattr(here, "losses", 0)
    assert len(run_on_workers(config, tmp_path / "run", TWO, resume=True).images) == 2


def test_what_ends_a_part_ends_the_run(tmp_path: Path, here: type[Here], monkeypatch: Any) -> None:
    def fails(self: Here, tasks: Iterator[Task]) -> Iterator[tuple[Task, Event]]:
        yield next(tasks), Ended("OutOfMemory: no room")

    monkeypatch.setattr(here, "run", fails)
    with pytest.raises(FluxrunError, match="line 1: OutOfMemory: no room"):
        run_on_workers(lines(tmp_path, 2), tmp_path / "run", TWO)
    assert read_record(tmp_path / "run").status == "failed"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_every_picture_once_whatever_is_killed(tmp_path: Path) -> None:
    """A worker first, then the command itself; the same command with resume= draws what is missing."""
    pytest.importorskip("ray", reason="the extra 'ray'")
    lines(tmp_path, 60)
    command = (*SMALL, "prompts_file=prompts.txt", "workers=2")
    run = Started(tmp_path, *command, "hydra.run.dir=run")
    images = tmp_path / "run" / "images"
    try:
        run.until(lambda: len(list(images.glob("*.png"))) > 4 and run.drawing())[0].kill()
        run.until(lambda: len(list(images.glob("*.png"))) > 20)
        others = run.others()
        run.process.kill()
        assert gone(others)
    finally:
        run.close()
    assert "worker lost; another one gets it" in run.screen()
    before = {path.name: path.stat().st_mtime_ns for path in images.glob("*.png")}
    known = {Path(image.path).name for image in read_record(tmp_path / "run").images}
    again = fluxrun(*command, "resume=run", cwd=tmp_path, fresh=True)
    assert again.returncode == 0, again.stderr
    record = read_record(tmp_path / "run")
    assert record.status == "completed"
    assert [image.line for image in record.images] == list(range(1, 61))
    assert len(list(images.iterdir())) == 60
    assert {name: (images / name).stat().st_mtime_ns for name in known} == {name: before[name] for name in known}
    assert "Traceback" not in run.screen() + again.stderr
