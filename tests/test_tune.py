"""fluxrun tune: measures, takes what is faster and true to the picture, and writes a preset that runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from helpers import H100, SMALL

pytest.importorskip("skimage", reason="the extra 'report'")

from fluxrun.cli import dispatch
from fluxrun.compose import compose
from fluxrun.errors import ConfigError
from fluxrun.runner import prepare

FIXED = ["compile=none", "quantization=none", "cache=none"]
"""Groups named on the command line are not searched: only the kernels are, which need no compiling."""


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tune")
    output = folder / "preset" / "mine.yaml"
    where = ["--folder", str(folder / "runs"), "--output", str(output)]
    assert dispatch(["tune", "--repeats", "3", *where, *SMALL, *FIXED]) == 0
    return output


def test_the_preset_is_justified_line_by_line(tuned: Path) -> None:
    text = tuned.read_text()
    lines = text.splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[1].startswith("# fluxrun +preset=mine model=")
    assert "torch" in text
    assert "PSNR" in text
    assert "xformers: not usable here: needs a CUDA GPU" in text
    assert "math: " in text
    assert list(yaml.safe_load(text)) == ["defaults"]


def test_the_preset_composes_and_runs_elsewhere_with_fallbacks(tuned: Path) -> None:
    config = compose([*SMALL, "+preset=mine"], config_dir=tuned.parents[1])
    assert config.attention.name in tuned.read_text()
    assert prepare(config, H100).plan.choices["attention"].effective


def test_everything_measured_is_in_a_table(tuned: Path) -> None:
    result = json.loads((tuned.parents[1] / "runs" / "sweep.json").read_text())
    assert {"neutral", "attention=math"} <= {o for job in result["jobs"] for o in job["overrides"]}
    assert result["loads"] == ["first load"]
    assert all(job["status"] == "completed" for job in result["jobs"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--repeats", "1"], "at least 2"),
        (["--min-psnr", "0"], "more than 0"),
        (["--output", "x.txt"], "yaml"),
        (["--fast"], "unknown flag"),
        (["modle=tiny"], "modle"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=says):
        dispatch(["tune", *arguments])
    assert list(tmp_path.iterdir()) == []


def test_a_preset_file_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("kept")
    with pytest.raises(ConfigError, match="there is such a file"):
        dispatch(["tune", "--output", str(tmp_path / "mine.yaml")])
    assert (tmp_path / "mine.yaml").read_text() == "kept"
