"""A wheel, installed into an empty folder, brings its own conf along."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import GROUPS, option_names

pytestmark = pytest.mark.slow  # processes of their own

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(folder / "site")]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    return folder / "site"


def run(installed: Path, folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-P", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_works_in_an_empty_folder(installed, tmp_path):
    assert run(installed, tmp_path, "-c", "import fluxrun; print(fluxrun.__file__)").startswith(str(installed))
    config = yaml.safe_load(run(installed, tmp_path, "-m", "fluxrun", "--cfg", "job"))
    assert set(GROUPS) <= set(config)
    assert "attention" in run(installed, tmp_path, "-m", "fluxrun", "plan", "attention=xformers")
    assert list(tmp_path.iterdir()) == []


def test_all_options_are_in_it(installed):
    for group in GROUPS:
        assert sorted(path.stem for path in (installed / "fluxrun" / "conf" / group).glob("*.yaml")) == option_names(
            group
        )
    assert (installed / "bin" / "fluxrun").exists()
