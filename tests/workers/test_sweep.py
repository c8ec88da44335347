"""workers=N: a sweep's jobs on Ray's actors, in real processes that are killed on the way."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import SMALL, draw, fluxrun, hashes, said
from ray_processes import Started
from robustness.signals_campaign import untrue_records
from tagged_processes import PATIENCE_S, gone

from fluxrun.record.folder import read_record

pytest.importorskip("ray", reason="the extra 'ray'")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")]

SWEEP = ("--multirun", *SMALL, "workers=2", "hydra.sweep.dir=sweep")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    started: list[Started] = []

    def start(*arguments: str) -> Started:
        started.append(Started(tmp_path, *arguments))
        return started[-1]

    yield start
    for one in started:
        one.close()


def test_a_lost_workers_job_goes_to_another_one(tmp_path: Path, start: Callable[..., Started]) -> None:
    sweep = start(*SWEEP, "seed=range(0,12)")
    # Asked once: a moment later a worker may be between two jobs.
    drawing = sweep.until(lambda: len(sweep.completed()) >= 2 and sweep.drawing())
    drawing[0].kill()
    assert sweep.process.wait(PATIENCE_S) == 0, sweep.screen()
    rows = sweep.rows()
    assert {name: row["status"] for name, row in rows.items()} == {str(number): "completed" for number in range(12)}
    assert all(len(row["images"]) == 1 for row in rows.values())
    assert sweep.screen().count("worker lost; another one gets it") == 1
    assert "Traceback" not in sweep.screen()
    assert gone(sweep.others())
    alone = draw(tmp_path / "alone", "seed=3")
    assert hashes(alone) == [rows["3"]["images"][0]["sha256"]], "a worker's picture is everybody's"


def test_ctrl_c_ends_all_of_it(tmp_path: Path, start: Callable[..., Started]) -> None:
    sweep = start(*SWEEP, "num_images=2000", "seed=0,1,2")
    sweep.until(lambda: list(tmp_path.glob("sweep/*/images/*.png")))
    sweep.process.send_signal(signal.SIGINT)
    assert sweep.process.wait(PATIENCE_S) == 130, sweep.screen()
    assert gone(sweep.others())
    assert untrue_records(tmp_path) == []
    assert {row["status"] for row in sweep.rows().values()} == {"interrupted", "pending"}
    assert "Traceback" not in sweep.screen()


def test_nobody_is_left_when_the_command_is_killed_and_the_sweep_goes_on(
    tmp_path: Path, start: Callable[..., Started]
) -> None:
    sweep = start(*SWEEP, "seed=range(0,6)")
    sweep.until(lambda: sweep.completed() and sweep.drawing())
    others = sweep.others()
    sweep.process.kill()
    assert gone(others)
    before = {folder.name: read_record(folder).run_id for folder in sweep.completed()}
    again = fluxrun(*SWEEP, "seed=range(0,6)", cwd=tmp_path, fresh=True)
    assert again.returncode == 0, again.stderr
    assert {name: read_record(tmp_path / "sweep" / name).run_id for name in before} == before
    assert {row["status"] for row in sweep.rows().values()} == {"completed"}
    assert "Traceback" not in again.stderr
    assert said(again.stderr)
