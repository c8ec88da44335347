"""speed.py: its command line, and a dry run with a setting that works and one that does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import speed
from bench.sections import SECTIONS

ROOT = Path(__file__).resolve().parents[2]


def test_sections_are_asked_for_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert speed.section_names("vae,klein") == ["klein", "vae"]
    assert speed.arguments(["OUT"]).only == list(SECTIONS)
    with pytest.raises(SystemExit):
        speed.arguments(["OUT", "--only", "kleni"])
    assert "kleni: not among klein" in capsys.readouterr().err


def test_a_section_that_breaks_is_said_and_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken(type(SECTIONS["roofline"])):  # type: ignore[misc]
        def measure(self, run: object) -> None:
            run.add({"what": "one kernel", "unit": "GB/s", "samples": [1.0]})  # type: ignore[attr-defined]
            raise RuntimeError("the device went away")

    monkeypatch.setitem(SECTIONS, "roofline", Broken(name="roofline", about="", label="roofline", seconds=1))
    assert speed.main([str(tmp_path), "--only", "roofline", "--model", "tiny"]) == 1
    assert "roofline broke: RuntimeError: the device went away" in capsys.readouterr().out
    kept = json.loads((tmp_path / "roofline.json").read_text())
    assert [row["what"] for row in kept["rows"]] == ["one kernel"]
    assert kept["after"]["at"]


@pytest.mark.slow
def test_dry_run_measures_what_works_and_says_what_does_not(tmp_path: Path) -> None:
    arguments = ["--model", "tiny", "--only", "klein", "--keep", "neutral", "broken: compile=nope"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "speed.py"), str(tmp_path), *arguments],
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    section = json.loads((tmp_path / "klein.json").read_text())
    rows = {row["setting"]: row for row in section["rows"]}
    assert section["after"] is not None
    assert rows["plain"]["status"] == rows["neutral"]["status"] == "measured"
    assert len(rows["neutral"]["samples"]["step_ms"][0]) == 4
    # The same weights, the same inputs, the same arithmetic: fluxrun without options is plain diffusers.
    assert rows["neutral"]["rel_l2"] == 0
    assert rows["neutral"]["options"]["compile"]["effective"] == "none"
    assert rows["broken"]["status"] == "failed"
    assert "nope" in rows["broken"]["error"]
    assert "a dry run" in done.stdout
