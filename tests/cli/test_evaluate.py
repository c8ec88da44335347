"""fluxrun eval: draws held-out prompts with the bundled model and writes down how often the picture is right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import fluxrun, said
from PIL import Image

from fluxrun.cli.app import dispatch
from fluxrun.errors import ConfigError
from fluxrun.record.folder import read_record
from fluxrun.shapes.evaluate import SETS

FEW = ("--per-set", "1", "--seeds", "0,1")
QUICK = ("model=shapes", "height=128", "width=128", "steps=4")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval") / "run"
    assert dispatch(["eval", *FEW, *QUICK, "vae=full", f"hydra.run.dir={folder}"]) == 0
    return folder


def test_accuracy_is_told_by_set_and_attribute(evaluated: Path) -> None:
    report = json.loads((evaluated / "accuracy.json").read_text())
    assert report["overrides"] == [*QUICK, "vae=full"]
    assert (report["images"], report["distinct_prompts"]) == (2 * len(SETS), len(SETS))
    assert set(report["accuracy"]) == set(SETS)
    for found in report["accuracy"].values():
        assert found["images"] == 2
        assert {found["all"], found["colour"], found["shape"]} <= {0, 0.5, 1}
    wrong = sum(round(found["images"] * (1 - found["all"])) for found in report["accuracy"].values())
    assert len(report["failures"]) == wrong
    assert all(failure["seed"] in (0, 1) and failure["wrong"] for failure in report["failures"])


def test_it_is_a_run_like_any_other(evaluated: Path) -> None:
    record = read_record(evaluated)
    assert record.status == "completed"
    assert record.command[:2] == ["fluxrun", "eval"]
    assert record.options["vae"].requested == "full"
    asked = [json.loads(line) for line in (evaluated / "held_out.jsonl").read_text().splitlines()]
    assert [(image.prompt, image.seed) for image in record.images] == [(a["prompt"], a["seed"]) for a in asked]
    assert [a["seed"] for a in asked] == [0] * len(SETS) + [1] * len(SETS)


def test_the_contact_sheet_shows_every_picture(evaluated: Path) -> None:
    with Image.open(evaluated / "contact_sheet.png") as sheet:
        assert sheet.size == (12 + 6 * (192 + 12), 12 + 192 + 30 + 12)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--per-sett", "1"], "unknown flag '--per-sett'; allowed: --per-set N"),
        (["--multirun"], "unknown flag '--multirun'"),
        (["stepz=1"], "unknown key 'stepz'"),
        (["steps=0"], "greater than or equal to 1"),
        (["attention=xformer"], "did you mean 'xformers'"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=says):
        dispatch(["eval", *arguments])
    assert list(tmp_path.iterdir()) == []


def test_a_used_folder_is_refused(evaluated: Path) -> None:
    before = (evaluated / "accuracy.json").read_bytes()
    with pytest.raises(ConfigError, match="already holds a run"):
        dispatch(["eval", *FEW, *QUICK, f"hydra.run.dir={evaluated}"])
    assert (evaluated / "accuracy.json").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--seeds", "0,x"], ["--per-set", "many"], ["--per-sett", "1"]])
def test_the_exit_code_of_bad_input(tmp_path: Path, arguments: list[str]) -> None:
    done = fluxrun("eval", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "error: " in said(done.stderr)[-1]
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
