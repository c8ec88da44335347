"""A signal at fixed moments, to real processes: the exit code, a true record, nobody left, also where Python waits."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from helpers import SMALL
from robustness.signals_campaign import Terminal, untrue_records
from tagged_processes import PATIENCE_S, Tagged, gone

from fluxrun.record.folder import read_record

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")]

SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]

KNOBS = "tile_size: 512\ntile_overlap: 0.25\nchannels_last: false\nfallback: full\n"

STUCK = """
import hashlib, time
from fluxrun.options.vae import VaeOption

class Computes(VaeOption):
    \"\"\"Is in C for minutes; Python's handlers do not run meanwhile.\"\"\"
    def apply(self, pipeline, context):
        print("nobody listens", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"a", b"b", 10**9)

class Swallows(VaeOption):
    \"\"\"Takes Ctrl+C for something else, as a library may.\"\"\"
    def apply(self, pipeline, context):
        print("nobody listens", flush=True)
        while True:
            try:
                time.sleep(600)
            except BaseException:
                pass
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Tagged]]:
    started: list[Tagged] = []

    def start(*arguments: str, **environment: str) -> Tagged:
        started.append(Tagged(tmp_path, *arguments, environment=environment))
        return started[-1]

    yield start
    for run in started:
        run.close()


# --- one run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_while_a_library_is_imported(tmp_path: Path, number: signal.Signals, code: int) -> None:
    terminal = Terminal([*SMALL, "hydra.run.dir=run"], tmp_path)
    try:
        maps = Path(f"/proc/{terminal.process.pid}/maps")
        assert terminal.until(lambda: "libtorch_cpu" in maps.read_text())
        terminal.send(number)
        terminal.until(lambda: False)
        assert terminal.process.poll() == code, terminal.text
        assert gone(terminal.others())
        assert "Traceback" not in terminal.text
    finally:
        terminal.close()
    assert untrue_records(tmp_path) == []
    assert read_record(tmp_path / "run").status == "interrupted"


@pytest.mark.parametrize(("number", "code"), SIGNALS)
@pytest.mark.parametrize("how", ["Computes", "Swallows"])
def test_while_nothing_listens(
    tmp_path: Path, config_dir: Path, start: Callable[..., Tagged], how: str, number: signal.Signals, code: int
) -> None:
    (tmp_path / "stuck_options.py").write_text(STUCK)
    (config_dir / "vae").mkdir()
    (config_dir / "vae" / "stuck.yaml").write_text(f"_target_: stuck_options.{how}\n{KNOBS}")
    options = ["--trust-config", "--config-dir", str(config_dir), "vae=stuck"]
    run = start(*options, *SMALL, "hydra.run.dir=run", PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    run.until(lambda: "nobody listens" in run.screen())
    run.process.send_signal(number)
    assert run.process.wait(PATIENCE_S) == code, run.screen()
    record = read_record(tmp_path / "run")
    assert (record.status, record.error and record.error.stage) == ("interrupted", "load")
    assert "Traceback" not in run.screen()


def test_no_compiler_outlives_it(tmp_path: Path, start: Callable[..., Tagged]) -> None:
    """Only fluxrun itself gets the signal, while g++ and what works for it are at it."""
    compiling = ["compile=default", "hydra.run.dir=run"]
    run = start(*SMALL, *compiling, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor"))

    def compilers() -> list[psutil.Process]:
        found = []
        for child in run.others():
            with contextlib.suppress(psutil.Error):
                found += [child] if child.name() in ("cc1plus", "g++", "c++", "clang++") else []
        return found

    run.until(lambda: len(compilers()) > 1)
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(PATIENCE_S) == 143, run.screen()
    assert gone(run.others())
    assert untrue_records(tmp_path) == []


# --- a sweep in other processes ---------------------------------------------------------------------------------------


def begun(folder: Path) -> bool:
    return any(folder.glob("sweep/*/images/*.png"))


LONG = ("--multirun", *SMALL[:-1], "num_images=2000", "hydra.sweep.dir=sweep", "seed=0,1,2")
JOBLIB = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")


def test_joblibs_jobs_are_interrupted_with_true_records(tmp_path: Path, start: Callable[..., Tagged]) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="the extra 'joblib'")
    run = start(*LONG, *JOBLIB)
    run.until(lambda: begun(tmp_path))
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(PATIENCE_S) == 143, run.screen()
    assert gone(run.others())
    assert untrue_records(tmp_path) == []
    result = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert result["status"] == "interrupted"
    assert {job["status"] for job in result["jobs"]} == {"interrupted", "pending"}


@pytest.mark.parametrize("elsewhere", [JOBLIB, ("sweep.isolation=process",)], ids=["joblib", "isolated"])
def test_jobs_end_when_the_sweep_is_killed(tmp_path: Path, start: Callable[..., Tagged], elsewhere: tuple[str]) -> None:
    """SIGKILL: the sweep itself can do nothing any more."""
    if elsewhere is JOBLIB:
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="the extra 'joblib'")
    run = start(*LONG, *elsewhere)
    run.until(lambda: begun(tmp_path))
    jobs = run.others()
    assert jobs
    run.process.kill()
    assert gone(jobs)
    assert [r for r in untrue_records(tmp_path) if "sweep.json" not in r] == []
    assert read_record(tmp_path / "sweep" / "0").status == "interrupted"
