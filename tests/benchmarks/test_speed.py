"""speed.py: settings that compose, groups that fit, and a dry run with a setting that works and one that does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import speed_settings as known
from speed_rounds import groups_that_fit
from speed_settings import FAST, LOSSLESS, PLAIN, Setting

from fluxrun.config.composition import compose

ROOT = Path(__file__).resolve().parents[2]
EVERY = {s.name: s for s in chain(*known.KLEIN, known.DEV, known.IMAGE, known.VAE, known.LONG, known.FIRST_IMAGE)}


@pytest.mark.parametrize("setting", [s for s in EVERY.values() if s.recipe is None], ids=lambda s: s.name)
def test_every_setting_composes(setting: Setting) -> None:
    assert compose([*known.MODELS["klein_4b"], *setting.overrides, "memory=staged"]).options()


def test_every_recipe_exists() -> None:
    from speed_plain import RECIPES

    assert {s.recipe for s in EVERY.values() if s.recipe} == RECIPES.keys()


def test_every_memory_row_composes() -> None:
    for row in known.MEMORY:
        assert compose([*known.MODELS[row.model], f"steps={row.steps}", *row.overrides])


def test_groups_are_split_where_memory_is_short() -> None:
    group = (PLAIN, LOSSLESS, known.fluxrun("neutral"), FAST)
    assert groups_that_fit([group], 12, None) == [list(group)]
    assert groups_that_fit([group], 30, 80) == [[PLAIN, LOSSLESS], [PLAIN, known.fluxrun("neutral"), FAST]]
    assert groups_that_fit([(PLAIN,)], 12, 80) == [[PLAIN]]


def test_a_setting_from_the_command_line() -> None:
    parsed = known.parse_setting("mine: quantization=fp8 compile=default")
    assert parsed == known.fluxrun("mine", "quantization=fp8", "compile=default")
    with pytest.raises(ValueError, match="name: override"):
        known.parse_setting("quantization=fp8")


def test_dry_run_measures_what_works_and_says_what_does_not(tmp_path: Path) -> None:
    arguments = ["--model", "tiny", "--only", "klein", "--keep", "neutral", "--add", "broken: compile=nope"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "speed.py"), str(tmp_path), *arguments, "--rounds", "1"],
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=180,
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
