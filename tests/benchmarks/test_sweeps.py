"""What the sweep benchmarks read from a sweep's own account, and their command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import cpu_sweep
from bench.sweeps import Found, main, statuses, swept, totals

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def test_a_sweeps_own_account() -> None:
    sweep = swept(RESULTS / "shapes_sweep_cpu")
    assert statuses(sweep) == cpu_sweep.EXPECTED
    spent = totals(sweep)
    assert spent["loads"] == len(spent["why_loaded"]) == 1
    assert spent["load_once_plus_jobs_s"] == pytest.approx(spent["load_s"] + spent["jobs_s"], abs=2e-3)
    assert spent["load_once_plus_jobs_s"] < spent["wall_s"]


def test_a_sweep_that_left_nothing(tmp_path: Path) -> None:
    assert swept(tmp_path).status == "missing"
    assert statuses(swept(tmp_path)) == {}


def test_each_part_is_kept_before_the_next_one_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def first(out: Path, model: str) -> Found:
        return {"drawn": model}

    def second(out: Path, model: str) -> Found:
        assert json.loads((out / "parts.json").read_text()) == {"first": {"drawn": "model=tiny"}}
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["sweep.py", str(tmp_path / "new"), "--model", "tiny"])
    with pytest.raises(KeyboardInterrupt):
        main("", "parts.json", "shapes", {"first": first, "second": second})
    monkeypatch.setattr("sys.argv", ["sweep.py", str(tmp_path), "--parts", "third"])
    with pytest.raises(SystemExit):
        main("", "parts.json", "shapes", {"first": first, "second": second})
