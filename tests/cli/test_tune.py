"""fluxrun tune: measures, takes what is faster and true to the picture, and writes a preset that runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import H100, SMALL

pytest.importorskip("skimage", reason="the extra 'report'")

from fluxrun.cli.app import dispatch
from fluxrun.config.composition import compose
from fluxrun.config.schema import GROUPS
from fluxrun.errors import ConfigError
from fluxrun.planning.prepare import prepare
from fluxrun.record.schema import Chosen, Fallback
from fluxrun.report.rows import Row
from fluxrun.sweep.trials import Trial
from fluxrun.sweep.tuner import Tuner

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
    assert re.search(r"# .*xformers.*: not usable here: needs a CUDA GPU", text)
    assert "# math: " in text
    assert "# fused: not usable here" in text, "groups are found, not listed"
    assert list(yaml.safe_load(text)) == ["defaults"]


def test_the_preset_composes_and_runs_elsewhere_with_fallbacks(tuned: Path) -> None:
    config = compose([*SMALL, "+preset=mine"], config_dir=tuned.parents[1])
    assert config.attention.name in tuned.read_text()
    assert prepare(config, H100).plan.choices["attention"].effective


def test_everything_measured_is_in_a_table(tuned: Path) -> None:
    result = json.loads((tuned.parents[1] / "runs" / "sweep.json").read_text())
    assert {"attention=sdpa", "attention=math"} <= {o for job in result["jobs"] for o in job["overrides"]}
    assert result["loads"] == ["first load"]
    assert all(job["status"] == "completed" for job in result["jobs"])


@pytest.mark.slow
def test_what_the_command_line_fixes_stays_and_an_option_of_ones_own_is_tried(
    tmp_path: Path, config_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (config_dir / "attention").mkdir()
    (config_dir / "attention" / "mine.yaml").write_text("defaults: [math, _self_]\n")
    (config_dir / "attention" / "broken.yaml").write_text("defaults: [math, _self_]\nbakend: x\n")
    fixed = ["compile=regional", "quantization=none", "cache=none", "vae=full"]
    where = ["--folder", str(tmp_path / "runs"), "--config-dir", str(config_dir), "--repeats", "2"]
    assert dispatch(["tune", *where, *SMALL, *fixed]) == 0
    jobs = json.loads((tmp_path / "runs" / "sweep.json").read_text())["jobs"]
    ran = {(job["options"]["attention"]["effective"], job["options"]["compile"]["effective"]) for job in jobs}
    assert ran >= {("sdpa", "none"), ("sdpa", "regional"), ("math", "regional"), ("mine", "regional")}
    preset = (tmp_path / "runs" / "tiny_tuned.yaml").read_text()
    assert "# mine: " in preset
    assert re.search(r"# .*broken.*: not usable here: .*unknown key 'attention.bakend'", preset)
    assert "override /compile" not in preset
    said = capsys.readouterr().err
    assert re.search(r"^\[\d+, \d+ s\] attention=mine …$", said, re.MULTILINE)
    assert "saved " not in said, "one line per option, not each run's own"


def tuner(tmp_path: Path, *overrides: str, **given: Any) -> Tuner:
    """A search that has not begun, from the neutral options."""
    config = compose([*SMALL, *overrides])
    standard = {"min_psnr": 30, "fixed": frozenset(), "thorough": False, "minutes": 1.0, "command": []}
    made = Tuner(data=config.source, dirs=config.config_dirs, folder=tmp_path, **(standard | given))
    made.chosen = {group: config.source[group]["name"] for group in GROUPS if group != "model"}
    return made


def test_an_option_gets_a_chance_without_one_taken_before_that_it_does_not_go_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = tuner(tmp_path, "kernels=fused", "compile=cudagraphs")
    search.trials = [Trial("kernels", "fused", "", taken=True), Trial("compile", "cudagraphs", "", taken=True)]
    usable_with = {("regional", "diffusers"): None, ("regional", "fused"): "nothing left to fuse"}
    monkeypatch.setattr(
        search, "falls_back", lambda group, data: usable_with[data["compile"]["name"], data["kernels"]["name"]]
    )
    found, _ = search.made_usable("compile", "regional", dict(search.candidates("compile"))["regional"])
    assert found is not None
    assert (found["compile"]["name"], found["kernels"]["name"]) == ("regional", "diffusers")


def test_what_goes_only_in_the_place_of_another_option_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = tuner(tmp_path, "kernels=fused", minutes=1000.0)
    search.trials = [Trial("kernels", "fused", "", taken=True)]
    tried: list[str] = []

    def falls_back(group: str, data: Any) -> str | None:
        regional, fused = data["compile"]["name"] == "regional", data["kernels"]["name"] == "fused"
        return "nothing left to fuse" if regional and fused else None

    def measured(group: str, name: str, data: Any, best: Row) -> Trial:
        tried.append(f"{group}={name} kernels={data['kernels']['name']}")
        return Trial(group, name, "not faster", row=best)

    monkeypatch.setattr(search, "falls_back", falls_back)
    monkeypatch.setattr(search, "attempt", measured)
    search.search_all(Row(job="0", folder="0", status="completed"))
    assert tried[-1] == "compile=regional kernels=diffusers"
    assert {"compile=cudagraphs kernels=fused", "quantization=fp8 kernels=fused"} <= set(tried[:-1])
    assert {trial.name for trial in search.trials} >= {"regional", "cudagraphs", "fp8", "max_autotune"}


def test_only_an_option_that_was_replaced_is_given_up(tmp_path: Path) -> None:
    search = tuner(tmp_path, "compile=cudagraphs", "compile.targets=[transformer,text_encoder]", "kernels=fused")
    fell = [Fallback(option="some", stage="requires", reason="a conflict")]
    same = {group: Chosen(requested=name, effective=name) for group, name in search.chosen.items()}
    gave_way = {
        "compile": Chosen(requested="cudagraphs", effective="cudagraphs", fallbacks=fell),
        "kernels": Chosen(requested="fused", effective="diffusers", fallbacks=fell),
    }
    search.take(search.data, Row(job="1", folder="1", status="completed", options=same | gave_way))
    assert search.chosen == {**search.chosen, "compile": "cudagraphs", "kernels": "diffusers"}
    assert search.data["compile"]["targets"] == ["transformer", "text_encoder"]


def test_what_takes_minutes_or_comes_too_late_is_not_tried(tmp_path: Path) -> None:
    slow = dict(tuner(tmp_path).candidates("compile"))
    assert list(slow)[:2] == ["cudagraphs", "regional"], "what is ready soonest first"
    for name in ("max_autotune", "max_autotune_no_cudagraphs"):
        usable, why = tuner(tmp_path).made_usable("compile", name, slow[name])
        assert usable is None
        assert "--thorough" in why
    usable, why = tuner(tmp_path, minutes=-1.0).made_usable("attention", "math", {**slow["regional"], "name": "math"})
    assert usable is None
    assert "--minutes" in why


@pytest.mark.parametrize(
    ("fastest_s", "median_s", "taken", "says"),
    [
        (0.5, 0.51, True, "PSNR"),
        (0.99, 0.99, False, "not faster"),
        (0.95, 1.03, False, "the repeats differ by 8%"),
        (0.5, 2.0, True, "PSNR"),
    ],
)
def test_a_gain_must_exceed_what_the_repeats_differ_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fastest_s: float, median_s: float, taken: bool, says: str
) -> None:
    search = tuner(tmp_path)
    monkeypatch.setattr(search, "psnr", lambda row: 40.0)
    plain = {"attention": Chosen(requested="math", effective="math")}
    row = Row(job="1", folder="1", status="completed", options=plain, image_s=median_s, fastest_image_s=fastest_s)
    best = Row(job="0", folder="0", status="completed", options=plain, image_s=1.0, fastest_image_s=1.0)
    verdict, found = search.judge("attention", row, best)
    assert found is taken
    assert says in verdict


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--repeats", "1"], "at least 2"),
        (["--min-psnr", "0"], "more than 0"),
        (["--output", "x.txt"], "yaml"),
        (["--fast"], "unknown flag"),
        (["--steps", "0"], "at least 1"),
        (["--minutes", "0"], "more than 0"),
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
