"""Paths that are not UTF-8: refused in one line, or, where they come in by a link, written as an escape."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from checkpoints import tiny_folder
from helpers import SMALL, draw, fluxrun, said

from fluxrun.cli.app import dispatch
from fluxrun.errors import ConfigError
from fluxrun.record.folder import read_record

pytestmark = pytest.mark.slow

OTHER = "f\udcffr"
"""How Python reads a name that is Latin-1 on the disk."""


@pytest.fixture
def other(tmp_path: Path) -> Path:
    try:
        (tmp_path / OTHER).mkdir()
    except OSError as error:
        pytest.skip(f"this file system holds UTF-8 only: {error}")
    return tmp_path / OTHER


@pytest.mark.parametrize(
    "arguments",
    [
        [f"hydra.run.dir={OTHER}/run"],
        [f"reference_images=[{OTHER}/p.png]"],
        [f"prompts_file={OTHER}/p.txt"],
        ["model=local", f"model.path={OTHER}"],
        ["--config-dir", OTHER],
        ["--multirun", f"hydra.sweep.dir={OTHER}"],
        [f"prompt={OTHER}"],
        ["rerun", OTHER],
        ["report", OTHER],
        ["plan", f"model.path={OTHER}"],
    ],
)
def test_an_argument_is_refused_in_one_line(other: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.chdir(other.parent)
    with pytest.raises(ConfigError, match=r"f\\udcffr.* is not UTF-8") as refused:
        dispatch([*SMALL, *arguments] if "=" in arguments[0] else arguments)
    assert len(said(str(refused.value))) == 1
    assert list(other.iterdir()) == []


def test_a_working_directory_is_refused_on_the_screen(other: Path) -> None:
    done = fluxrun(*SMALL, cwd=other)
    assert done.returncode == 2
    assert said(done.stderr) == [f"error: {other.parent}/f\\udcffr is not UTF-8: give the file or folder another name, "
                                 "or a link with one"]  # fmt: skip
    assert list(other.iterdir()) == []


def test_a_link_to_such_a_folder_works(other: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder(), other / "model")
    os.symlink(other, tmp_path / "link")
    model = ("model=local", f"model.path={tmp_path / 'link' / 'model'}", "model.dtype=float32")
    record = draw(tmp_path / "run", *model, "model.text_encoder_out_layers=[1,2,3]")
    assert read_record(tmp_path / "run").options["model"].facts["source"].endswith("f\\udcffr/model")
    assert record.status == "completed"


def test_a_reason_that_names_such_a_path_is_in_the_log_of_refusals(other: Path, config_dir: Path) -> None:
    (config_dir / "attention").mkdir()
    (config_dir / "attention" / f"{OTHER}.yaml").write_text("_target_: fluxrun.options.attention.Attention\n")
    done = fluxrun("--config-dir", str(config_dir), "attention=nothing", cwd=config_dir)
    assert done.returncode == 2
    assert len(said(done.stderr)) == 1
    assert "unknown option attention=nothing" in done.stderr
