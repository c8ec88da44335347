"""The command line as a client: the lines, folder and exit code of a plain run, and what it refuses."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time

import pytest
from helpers import fluxrun, said
from PIL import Image
from servers import TINY

from fluxrun.errors import ConfigError
from fluxrun.serving.client import parsed, split, written


def test_the_words_of_a_line():
    assert split(["--server", "auto", "prompt=a", "seed=1"]) == ("auto", ["prompt=a", "seed=1"])
    assert split(["prompt=--server", "--server=unix:/x"]) == ("unix:/x", ["prompt=--server"])


@pytest.mark.parametrize(
    "words",
    [
        ["--config-dir", "x"],
        ["--trust-config"],
        ["--multirun", "seed=1,2"],
        ["hydra.run.dir=x"],
        ["+sweep=kernels"],
        ["plan"],
    ],
)
def test_what_only_a_plain_run_does(words):
    with pytest.raises(ConfigError, match="run without --server"):
        split(["--server", "auto", *words])


@pytest.mark.slow
def test_no_server(tmp_path):
    environment = {"FLUXRUN_DATA_DIR": str(tmp_path / "data")}
    result = fluxrun("--server", "auto", "seed=1", cwd=tmp_path, env=environment, fresh=True)
    assert result.returncode == 2
    assert len(said(result.stderr)) == 1
    assert "fluxrun serve starts one" in result.stderr


@pytest.mark.parametrize(
    "text", ["[a.png,'b c.png']", "[{path: 'x, y.safetensors', scale: 0.8},{bundled: outline}]", "['it\\'s.png']"]
)
def test_a_list_of_files_is_written_as_it_was_read(text):
    value = parsed(f"lora.files={text}")
    assert parsed(f"lora.files={written(value)}") == value


def plain(text: str) -> list[str]:
    """Lines without what differs from run to run: folder and times."""
    return [
        re.sub(r"\d+\.\d+( s)?", "T", re.sub(r"\S*outputs/[\w/.-]+?(?=/images| \()", "OUT", line))
        for line in said(text)
    ]


@pytest.mark.slow
def test_a_run_elsewhere_is_a_run(server, tmp_path):
    environment = {"FLUXRUN_DATA_DIR": str(server.home / "data")}
    words = [*TINY, "prompt=a 'quoted', ${x} prompt", "seed=9", "attention=flash4"]
    server.draw("seed=1")
    there = fluxrun("--server", "auto", *words, cwd=tmp_path, env=environment, fresh=True)
    here = fluxrun(*words, cwd=tmp_path, env=environment)
    assert (there.returncode, here.returncode) == (0, 0), there.stderr
    first, second = sorted((tmp_path / "outputs").glob("*/*"))
    records = [json.loads((folder / "run.json").read_text()) for folder in (first, second)]
    assert records[0]["images"][0]["sha256"] == records[1]["images"][0]["sha256"]
    assert records[0]["config_hash"] == records[1]["config_hash"]
    assert (first / "images" / "000_seed9.png").exists()
    assert (first / "fluxrun.log").exists()
    lines = [line for line in plain(there.stderr) if "new shell" not in line]
    assert lines == [line for line in plain(here.stderr) if not line.startswith("Loading")]
    assert str(first) in there.stderr


@pytest.mark.slow
def test_files_are_uploaded(server, tmp_path):
    for name in ("a b.png", "c.png"):
        Image.new("RGB", (64, 64), "red").save(tmp_path / name)
    environment = {"FLUXRUN_DATA_DIR": str(server.home / "data")}
    words = [*TINY, "reference_images=['a b.png',c.png]", "output_format=webp"]
    result = fluxrun("--server", "auto", *words, cwd=tmp_path, env=environment, fresh=True)
    assert result.returncode == 0, result.stderr
    record = json.loads(next((tmp_path / "outputs").glob("*/*/run.json")).read_text())
    assert len(record["inputs"]) == 2
    refused = fluxrun("--server", "auto", "image=none.png", cwd=tmp_path, env=environment, fresh=True)
    assert (refused.returncode, len(said(refused.stderr))) == (2, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("word", "code"), [("sede=1", 2), ("guidance=4", 2), ("model=flux2_dev", 2)])
def test_refusals(server, tmp_path, word, code):
    environment = {"FLUXRUN_DATA_DIR": str(server.home / "data")}
    result = fluxrun("--server", "auto", word, cwd=tmp_path, env=environment, fresh=True)
    assert (result.returncode, len(said(result.stderr))) == (code, 1)
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slow
def test_an_interrupt(server, tmp_path):
    command = [sys.executable, "-m", "fluxrun", "--server", server.client.address, *TINY, "steps=500"]
    client = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while server.ask("GET", "/api/status")["drawing"] is None:
        time.sleep(0.1)
    server.until(server.ask("GET", "/api/status")["drawing"], "steps")
    client.send_signal(signal.SIGINT)
    _, error = client.communicate(timeout=60)
    assert client.returncode == 130
    assert "interrupted after 0 image(s)" in error
    assert json.loads(next((tmp_path / "outputs").glob("*/*/run.json")).read_text())["status"] == "interrupted"
