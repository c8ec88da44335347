"""A real server with a real worker: runs, their ends, and what is left of them."""

from __future__ import annotations

import base64
import http.client
import json
import os
import signal
import stat
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from servers import Running, start_server

from fluxrun.record.schema import RunRecord
from fluxrun.serving.connection import ServerError

pytestmark = pytest.mark.slow


def lines(events):
    return [event["text"] for event in events if event["event"] == "line"]


def test_runs_over_one_pipeline(server):
    first = server.draw("prompt=a cat")
    assert first["state"] == "completed"
    assert first["exit_code"] == 0
    RunRecord.model_validate(server.record(first["id"]))
    again = server.start("prompt=a heron", "seed=3")
    events = server.events(again)
    assert "options, model and size as before: the pipeline is used as it stands" in lines(events)
    assert [event["done"] for event in events if event["event"] == "step"][-1:] in ([], [2])
    assert next(event for event in events if event["event"] == "picture")["path"] == "images/000_seed3.png"
    changed = server.start("prompt=a heron", "attention=math")
    assert "attention sdpa → math: new shell, weights kept" in lines(server.events(changed))
    assert server.ask("GET", f"/api/runs/{changed}")["weights_loaded"] == 0


def test_a_fallback_is_said(server):
    run = server.start("attention=flash4")
    assert any("attention=flash4 cannot be used" in line for line in lines(server.events(run)))


def test_a_refusal_by_the_plan_leaves_no_folder(server):
    run = server.draw("guidance=4")
    assert (run["state"], run["exit_code"]) == ("refused", 2)
    assert "distilled" in run["error"]
    assert not (server.output / "runs" / run["id"]).exists()


def test_a_full_queue(server):
    long = server.start("steps=500")
    server.until(long, "steps")
    waiting = [server.start() for _ in range(3)]
    with pytest.raises(ServerError, match="try again in") as caught:
        server.start()
    assert caught.value.status == 429
    for run in (*waiting, long):
        server.ask("DELETE", f"/api/runs/{run}")
    assert server.events(long)[-1]["state"] == "interrupted"
    assert server.record(long)["status"] == "interrupted"
    assert {server.ask("GET", f"/api/runs/{run}")["state"] for run in waiting} == {"cancelled"}


def test_a_stop_while_compiling(server):
    run = server.start("compile=regional", "prompt=compiled")
    server.until(run, "compiling")
    server.ask("DELETE", f"/api/runs/{run}")
    assert server.events(run)[-1]["state"] == "interrupted"
    assert server.draw("prompt=after it")["state"] == "completed"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT], ids=lambda number: number.name)
def test_the_worker_dies(server, number):
    run = server.start("steps=500")
    after = server.start()
    server.until(run, "steps")
    worker = server.ask("GET", "/api/status")["worker"]["pid"]
    os.kill(worker, number)
    assert number.name in server.events(run)[-1]["error"]
    assert server.record(run)["status"] == "failed"
    assert number.name in server.record(run)["error"]["message"]
    left = {path.name for path in (server.output / "runs" / run).iterdir()}
    assert left == {"run.json", "images", "fluxrun.log"}
    assert server.events(after)[-1]["state"] == "completed"
    assert server.ask("GET", "/api/status")["worker"]["pid"] not in (None, worker)


def test_the_openai_package(server):
    import openai  # seconds, which the collection of the fast tests should not take

    client = openai.OpenAI(base_url=f"{server.client.address}/v1", api_key="any")
    extra = {"seed": 5, "overrides": ["steps=2"]}
    answer = client.images.generate(model="tiny", prompt="a cat", n=2, size="64x64", extra_body=extra)
    assert [base64.b64decode(picture.b64_json or "")[:4] for picture in answer.data or []] == [b"\x89PNG"] * 2
    assert {model.id for model in client.models.list()} == {"shapes", "tiny"}
    with pytest.raises(openai.BadRequestError, match="must be WIDTHxHEIGHT"):
        client.images.generate(prompt="a cat", size="large")  # type: ignore[call-overload]


def test_a_client_that_goes_away_stops_its_run(server):
    body = json.dumps({"model": "tiny", "prompt": "a gull", "size": "64x64", "overrides": ["steps=500"]})
    connection = http.client.HTTPConnection(urlsplit(server.client.address).netloc)
    connection.request("POST", "/v1/images/generations", body, {"Content-Type": "application/json"})
    while (run := server.ask("GET", "/api/status")["drawing"]) is None:
        time.sleep(0.05)
    server.until(run, "steps")
    connection.close()
    assert server.events(run)[-1]["state"] == "interrupted"


def test_history(server):
    drawn = [server.draw("prompt=a night heron", f"seed={seed}")["id"] for seed in (1, 2)]
    found = server.ask("GET", "/api/runs?search=heron+A+NIGHT")
    assert {run["id"] for run in found["runs"]} == set(drawn)
    run = found["runs"][0]
    assert run["prompt"] == "a night heron"
    with server.client.open("GET", f"/api/runs/{run['id']}/files/{run['images'][0]}") as picture:
        assert picture.read(4) == b"\x89PNG"


def test_the_http_process_imports_no_torch(server):
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "libtorch" not in maps
    assert "libpython" in maps or "python" in maps


@pytest.fixture
def other(tmp_path):
    running = start_server(tmp_path, "--socket", str(tmp_path / "socket"), "--idle-minutes", "0.001")
    yield running
    running.process.kill()


def test_a_socket_of_ones_own_and_its_end(other: Running):
    assert stat.S_IMODE((other.home / "socket").stat().st_mode) == 0o600
    assert stat.S_IMODE((other.home / "data" / "server.json").stat().st_mode) == 0o600
    run = other.start("steps=500")
    other.until(run, "steps")
    worker = other.ask("GET", "/api/status")["worker"]["pid"]
    ended = threading.Thread(target=other.events, args=[run])
    ended.start()
    other.process.send_signal(signal.SIGINT)
    assert other.process.wait(60) == 0
    ended.join(10)
    assert other.record(run)["status"] == "interrupted"
    assert not psutil.pid_exists(worker)
    assert not (other.home / "socket").exists()
    assert not (other.home / "data" / "server.json").exists()
    assert json.loads((other.output / "runs" / run / "run.json").read_text())["error"]["type"] == "Interrupted"
    assert sys.platform != "linux" or "Traceback" not in (other.home / "log").read_text()
