"""The page: complete, self-contained, rebuilt from folders, and without a complaint in a real browser."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import SMALL

pytest.importorskip("skimage", reason="the extra 'report'")
pytest.importorskip("matplotlib", reason="the extra 'report'")
pytest.importorskip("jinja2", reason="the extra 'report'")

from fluxrun.cli.app import dispatch
from fluxrun.errors import ConfigError

pytestmark = pytest.mark.slow

PROMPT = 'a <b>bold</b> "circle" & ${HOME} é'


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two kernels at two seeds, a fallback and a failed job."""
    folder = tmp_path_factory.mktemp("report") / "sweep"
    grid = [o for o in SMALL if not o.startswith("steps")]
    grid += ["attention=sdpa,math,xformers", "steps=2,0", "seed=0,1", f"prompt={PROMPT}", f"hydra.sweep.dir={folder}"]
    assert dispatch(["--multirun", *grid]) == 1
    return folder


def test_the_page_needs_nothing_from_outside(swept: Path) -> None:
    page = (swept / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', page)
    assert "<script" not in page
    sources = re.findall(r'<img src="([^"]{0,24})', page)
    assert len(sources) == 6
    assert all(source.startswith("data:image/webp;base64") for source in sources)


def test_the_page_tells_all_of_it(swept: Path) -> None:
    page = (swept / "report.html").read_text(encoding="utf-8")
    for text in ("Pareto front", "baseline", "xformers", "needs a CUDA GPU", "steps=0", "seed 1", "torch", "command"):
        assert text in page
    assert page.count("<svg") == 2
    assert re.search(r"were not measured:.*steps=0 · failed", page, re.DOTALL)
    assert "<b>bold</b>" not in page, "a prompt is text, not markup"
    assert "&lt;b&gt;bold&lt;/b&gt;" in page


def test_a_report_is_rebuilt_from_the_jobs_alone(swept: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copied"
    shutil.copytree(swept, copy)
    for name in ("sweep.json", "sweep.csv", "report.html"):
        (copy / name).unlink()
    assert dispatch(["report", str(copy)]) == 0
    assert (copy / "sweep.csv").read_text().count("\n") == 13
    assert "Pareto front" in (copy / "report.html").read_text()


def test_several_sweeps_become_one_report(swept: Path, tmp_path: Path) -> None:
    shutil.copytree(swept, tmp_path / "other")
    assert dispatch(["report", str(swept), str(tmp_path / "other"), "--output", str(tmp_path / "both")]) == 0
    page = (tmp_path / "both" / "report.html").read_text()
    assert "sweep/0" in page
    assert "other/0" in page


def test_a_sweep_named_twice_is_one_and_equal_names_are_told_apart(swept: Path, tmp_path: Path) -> None:
    shutil.copytree(swept, tmp_path / "machine_a" / "sweep")
    shutil.copytree(swept, tmp_path / "machine_b" / "sweep")
    folders = [str(tmp_path / name / "sweep") for name in ("machine_a", "machine_b", "machine_a")]
    assert dispatch(["report", *folders, "--output", str(tmp_path / "both")]) == 0
    with (tmp_path / "both" / "sweep.csv").open() as file:
        jobs = [line["job"] for line in csv.DictReader(file)]
    assert len(jobs) == len(set(jobs)) == 24
    assert {job.rpartition("/")[0] for job in jobs} == {"machine_a/sweep", "machine_b/sweep"}


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        dispatch(["report", str(tmp_path)])
    with pytest.raises(ConfigError, match="no such folder"):
        dispatch(["report", str(tmp_path / "nowhere")])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no Chromium to look at the page with")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_page_without_a_complaint(swept: Path, tmp_path: Path, width: int) -> None:
    shot = tmp_path / "page.png"
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr"
    )
    done = subprocess.run(
        ["chromium", *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2000",
         f"--screenshot={shot}", (swept / "report.html").resolve().as_uri()],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert shot.exists(), done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr


def test_pictures_that_are_gone_are_named_and_the_rest_is_reported(
    swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "copied"
    shutil.copytree(swept, folder)
    jobs = sorted(path.parent.parent for path in folder.glob("*/images/*.png"))
    shutil.rmtree(jobs[0] / "images")
    next(jobs[1].glob("images/*")).write_bytes(b"\x89PNG torn")
    torn = next(jobs[2].glob("images/*"))
    torn.write_bytes(torn.read_bytes()[:-2000])  # its size can be read, its pixels cannot
    assert dispatch(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    for text in (page, capsys.readouterr().err):
        assert "2 picture(s) of job" in text
        assert "cannot be read, and are not compared or shown" in text
        assert "No such file" in text
    assert page.count('<img src="data:image/webp') == 3
    monkeypatch.setattr("sys.argv", ["fluxrun"])
    grid = [o for o in SMALL if not o.startswith("steps")]
    grid += ["attention=sdpa,math,xformers", "steps=2", "seed=0,1,2", f"prompt={PROMPT}"]
    assert dispatch(["--multirun", *grid, f"sweep.resume={folder}"]) == 0, "six jobs are there, three are new"
    said = capsys.readouterr().err
    assert "9 completed" in said
    assert "2 picture(s) of job" in said
