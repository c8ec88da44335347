"""That the campaign of signals sees what it is there to see."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from robustness.signals_campaign import (
    MOMENTS,
    Case,
    Terminal,
    attempt,
    broken_files,
    table,
    untrue_records,
    wait_for_orphans,
)


def written(folder: Path, record: dict[str, Any]) -> Path:
    (folder / "run" / "images").mkdir(parents=True)
    (folder / "run" / "run.json").write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize(
    ("record", "problems"),
    [
        ({"status": "interrupted", "images": []}, []),
        ({"status": "running", "images": []}, ["run/run.json says running"]),
        ({"status": "failed", "images": [{"path": "images/0.png"}]}, ["run/run.json names 1 pictures, there are 0"]),
    ],
)
def test_what_a_run_may_not_say(tmp_path: Path, record: dict[str, Any], problems: list[str]) -> None:
    assert untrue_records(written(tmp_path, record)) == problems


def test_a_picture_that_no_record_names(tmp_path: Path) -> None:
    (written(tmp_path, {"status": "interrupted", "images": []}) / "run" / "images" / "0.png").touch()
    assert untrue_records(tmp_path) == ["run/run.json names 0 pictures, there are 1"]


def test_what_a_sweep_may_not_say(tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps({"status": "failed", "jobs": [{"status": "running"}]}))
    assert untrue_records(tmp_path) == ["sweep/sweep.json says of a job that it is running"]


def test_what_a_kill_may_not_leave(tmp_path: Path) -> None:
    run = written(tmp_path, {"status": "running", "images": [{"path": "images/0.png"}]}) / "run"
    assert broken_files(tmp_path) == ["run/run.json names 0.png, which is lost"]
    Image.new("RGB", (64, 64)).save(run / "images" / "0.png")
    assert broken_files(tmp_path) == []
    whole = (run / "images" / "0.png").read_bytes()
    (run / "images" / "0.png").write_bytes(whole[: len(whole) // 2])
    (run / "run.json").write_text('{"status": "runn')
    record, picture = broken_files(tmp_path)
    assert record.startswith("run/run.json is torn")
    assert picture.startswith("run/images/0.png names no whole picture")


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
@pytest.mark.parametrize(("moment", "after_s"), [("saving", 0.4), ("sweep", 4.0)])
def test_a_kill_leaves_whole_files_and_no_child(moment: str, after_s: float) -> None:
    case = attempt(moment, signal.SIGKILL, after_s)
    assert (case.wrong, case.left, case.code) == ([], [], -signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_joblibs_workers_end_with_a_sweep_that_is_killed_before_their_first_job(tmp_path: Path) -> None:
    """Found by `make kills ARGS="--seed 12"`: they waited for one, for 300 s."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="the extra 'joblib'")
    terminal = Terminal(MOMENTS["joblib"].arguments, tmp_path)
    try:
        assert terminal.until(lambda: any("LokyProcess-2" in " ".join(o.cmdline()) for o in terminal.others()))
        terminal.process.kill()
        terminal.process.wait()
        wait_for_orphans(terminal)
        assert terminal.others() == []
    finally:
        terminal.close()


def test_the_table_counts_each_kind_of_wrong() -> None:
    moments = list(MOMENTS)[:2]
    cases = [
        Case(moments[0], "SIGINT", 1.0, took_s=0.5, code=130),
        Case(moments[0], "SIGINT", 1.0, took_s=2.0, code=1, wrong=["exit 1", "run.json says running"], left=["g++"]),
        Case(moments[1], "SIGTERM", 1.0, ended_before=True),
    ]
    rows = [line.split() for line in table(cases).splitlines() if line]
    assert rows[1] == [moments[0], "2", "1.25s", "2.00s", "2.00s", "1", "1", "1", "1"]
    assert [row[0] for row in rows[1:]] == [moments[0], "all"], "one that had ended before is no case"
