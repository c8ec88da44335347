"""A setting's process: what it answers is in its row; one that dies or hangs is a result, and is gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
import tasks_for_workers as tasks

from bench.settings import Setting
from bench.worker import Job, Worker


def worker(task: Any, folder: Path) -> Worker:
    """A worker with a row as a section begins one."""
    name = task.__name__
    job = Job(Setting(name), task, (), folder, folder / f"{name}.log")
    return Worker(job, {"setting": name, "status": "not measured", "error": None, "samples": {}})


@pytest.mark.slow
def test_what_works_is_measured_and_what_does_not_is_ended(tmp_path: Path) -> None:
    works, dies, hangs = (worker(task, tmp_path) for task in (tasks.works, tasks.dies, tasks.hangs))
    for one in (works, dies, hangs):
        one.begin("build")
        one.wait(60)
    for one, seconds in ((works, 60), (dies, 60), (hangs, 0.2)):
        one.begin("warm")
        one.wait(seconds)
    assert dies.row["status"] == "failed"
    assert "process pool was terminated abruptly" in dies.row["error"]
    assert (hangs.row["status"], hangs.row["error"]) == ("failed", "no answer within 0 s")
    assert not psutil.pid_exists(hangs.row["pid"])
    for _ in range(2):
        works.begin("turn")
        works.wait(60)
    assert works.row["status"] == "measured"
    assert works.row["samples"] == {"step_ms": [[1.0, 2.0], [3.0]]}
    assert works.row["first_call_s"] == 1.0, "a later pass's first call is none"
    assert works.row["options"] == {"compile": "counted"}
    works.begin("turn")  # one more than there is
    works.wait(60)
    assert works.row["status"] == "measured"
    assert "StopIteration" in works.row["error"]
    assert not psutil.pid_exists(works.row["pid"])


@pytest.mark.slow
def test_one_that_dies_while_others_take_their_turns_is_a_result_too(tmp_path: Path) -> None:
    one = worker(tasks.works, tmp_path)
    one.begin("build")
    one.wait(60)
    process = psutil.Process(one.row["pid"])
    process.kill()
    process.wait(60)
    one.begin("warm")
    one.wait(60)
    assert one.row["status"] == "failed"
    assert "process pool" in one.row["error"]
    one.end()
