"""What a warm server does under real use, under a crowd and under attack: ``make serving``.

``groups``: twenty requests in which every option group changes once; ``memory``: 300 requests; ``client``: the command
line as client against a plain run; ``crowd``: 100 requests at once, of which 20 go away, and a SIGKILL of the worker;
``hostile``: requests made from the OpenAPI document and by hand. Each part's result is written as soon as it is there.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
from servers import TINY, Running, start_server

PROMPT = "prompt=a red circle left of a blue square"

GROUPS = (
    (), ("seed=1",), ("prompt=a green triangle",), ("steps=4",), ("prompt=a blue circle", "seed=5"),
    ("attention=math",), (), ("kernels=fused",), (), ("compile=regional",), ("compile=regional", "seed=2"),
    ("vae=tiled",), ("memory=staged",), ("quantization=int8_weight_only",), ("cache=fixed",), (),
    ("lora=adapters", "lora.files=[{bundled: night}]"), ("scheduler=heun",), ("model=tiny",), (),
)  # fmt: skip
"""Of each request what it changes from the first one: every group once, in between back again."""

DOCUMENTED = (503, 507)

PATHS = (
    "/../canary", "/static/../../canary", "/static/%2e%2e%2fcanary", "/api/runs/..%2f..%2fcanary/files/run.json",
    "/api/runs/20200101-000000-00000000/files/../../canary", "/api/runs/x/files//etc/passwd", "//etc/passwd", "/%00",
    "/api/compare?a=../canary&b=/etc/passwd", "/api/sweeps/../report", "/api/runs?search=%00&limit=999999",
    "/api/files?ending=../../x", "/api/runs/" + "a" * 4000,
)  # fmt: skip

BODIES = (
    b"", b"null", b"[]", b"\xff\xfe", b'{"overrides": 1}', b'{"overrides": [null]}', b'{"overrides": ["\\ud800=1"]}',
)  # fmt: skip

HEADS = (
    "Host: evil.example", "Host: {host}\r\nHost: {host}", "Host: {host}\r\nOrigin: null", "Host:", "X: y",
    "Host: {host}\r\nContent-Length: 5\r\nContent-Length: 6", "Host: {host}\r\nTransfer-Encoding: chunked",
    "Host: {host}\r\nX: " + "y" * 20000, "Host: {host}\r\nCookie: " + "a=b; " * 500,
    "Host: {host}\r\nAuthorization: Bearer \xff", "Host: {host}\r\nLast-Event-ID: -1",
)  # fmt: skip

LINES = (
    "GET /api/status HTTP/1.1", "POST /api/runs HTTP/1.1", "GET http://evil.example/ HTTP/1.1", "GET / HTTP/9.9",
)  # fmt: skip

Result = dict[str, Any]


def groups(home: Path, options: argparse.Namespace) -> Result:
    """Which of twenty requests rebuilt, which loaded weights, and how long each took."""
    rows = []
    with serving(home) as server:
        for number, changes in enumerate(GROUPS):
            words = [
                word for word in (PROMPT, "seed=0") if word.split("=")[0] not in {c.split("=")[0] for c in changes}
            ]
            began = time.perf_counter()
            run = server.ask("POST", "/api/runs", {"overrides": [*words, *changes]})["id"]
            lines = [e["text"] for e in server.events(run) if e["event"] == "line"]
            took, ended = time.perf_counter() - began, server.ask("GET", f"/api/runs/{run}")
            said = [line for line in lines if "new shell" in line or "as it stands" in line or "cannot be used" in line]
            row = {"request": number, "changes": list(changes), "seconds": round(took, 2), "state": ended["state"]}
            rows.append({**row, "weights_loaded": ended["weights_loaded"], "said": said})
            print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
    return {"requests": rows}


def memory(home: Path, options: argparse.Namespace) -> Result:
    """The worker's and the server's resident memory while it draws many requests; every tenth one changes an option."""
    points = []
    with serving(home) as server:
        for number in range(options.requests):
            server.draw(f"prompt=picture {number}", f"seed={number}", *(["attention=math"] if number % 10 == 9 else []))
            if number % 25 == 24 or number in (0, 10):
                worker = server.ask("GET", "/api/status")["worker"]
                handles = psutil.Process(worker["pid"]).num_fds()
                http_bytes = psutil.Process(server.process.pid).memory_info().rss
                points.append([number + 1, worker["rss_bytes"], http_bytes, handles])
                print(points[-1], flush=True)
        starts = server.ask("GET", "/api/status")["worker"]["starts"]
    return {
        "columns": ["requests", "worker_rss", "http_rss", "worker_open_files"],
        "points": points,
        "worker_starts": starts,
    }


def client(home: Path, options: argparse.Namespace) -> Result:
    """Whole commands, the same picture: through the server and alone; and what the client adds to drawing."""
    words = ["model=shapes", PROMPT]
    with serving(home) as server:
        environment = {**os.environ, "FLUXRUN_DATA_DIR": str(home / "data")}
        commands = {"client": ["--server", "auto"], "alone": []}
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        beside = []
        for seed in range(options.repeats + 1):  # the first one is warm-up for both
            for name, extra in commands.items():
                command = [sys.executable, "-m", "fluxrun", *extra, *words, f"seed={seed}"]
                began = time.perf_counter()
                subprocess.run(command, cwd=home, env=environment, check=True, capture_output=True)
                seconds[name].append(time.perf_counter() - began)
            newest = server.ask("GET", "/api/runs?limit=1")["runs"][0]["id"]
            timings = server.record(newest)["timings"]
            drawing = sum(timings["text_encode_s"] + timings["denoise_s"] + timings["decode_s"])
            beside.append(seconds["client"][-1] - drawing)
    best = {name: min(values[1:]) for name, values in seconds.items()}
    return {"seconds": seconds, "ratio": best["alone"] / best["client"], "client_beside_drawing_s": beside}


# --- a crowd ----------------------------------------------------------------------------------------------------------


def crowd(home: Path, options: argparse.Namespace) -> Result:
    """A hundred requests at once, a fifth of which go away; the worker is killed in the middle."""
    answers: Counter[str] = Counter()
    chance = random.Random(options.seed)
    leaving = set(chance.sample(range(100), 20))
    with serving(home, "--limit", "queue=150") as server:
        server.draw()
        threads = [
            threading.Thread(
                target=_one_of_many, args=[server, n, chance.uniform(0, 3) if n in leaving else None, answers]
            )
            for n in range(100)
        ]
        for thread in threads:
            thread.start()
        time.sleep(4)
        os.kill(server.ask("GET", "/api/status")["worker"]["pid"], signal.SIGKILL)
        for thread in threads:
            thread.join(600)
        waiting = [thread for thread in threads if thread.is_alive()]
        after = server.draw("prompt=after the crowd")["state"]
        records = Counter(json.loads(path.read_text())["status"] for path in server.output.glob("runs/*/run.json"))
        left = [
            str(path)
            for pattern in (".*.json*.*", "images/.*", ".lock")
            for path in server.output.glob(f"runs/*/{pattern}")
        ]
    with serving(home) as server:
        again = server.draw("prompt=the next start")["state"]
    return {
        "answers": dict(answers), "without_answer": len(waiting), "after": after, "records": dict(records),
        "unfinished_files": left, "next_start": again,
        "passed": not waiting and not left and after == again == "completed" and "running" not in records
        and sum(answers.values()) == 100 and answers["200"] + answers["503"] + answers["left"] == 100,
    }  # fmt: skip


def _one_of_many(server: Running, number: int, leaves_after: float | None, answers: Counter[str]) -> None:
    body = {"model": "tiny", "prompt": f"crowd {number}", "size": "64x64", "overrides": ["steps=2"]}
    parts = urlsplit(server.client.address)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=leaves_after)
    connection.timeout = 500 if leaves_after is None else leaves_after + 0.01
    try:
        connection.request("POST", "/v1/images/generations", json.dumps(body), {"Content-Type": "application/json"})
        answers[str(connection.getresponse().status)] += 1
    except TimeoutError:
        answers["left"] += 1
    finally:
        connection.close()


# --- hostile requests -------------------------------------------------------------------------------------------------


def hostile(home: Path, options: argparse.Namespace) -> Result:
    """Requests that nobody in their right mind sends: no 5xx but the documented ones, no file outside of the output."""
    limits = ("queue=8", "images=2", "pixels=16384", "steps=4", "body=20000", "upload=20000", "uploads=60000")
    (home / "canary").write_text("nobody's business")
    statuses: Counter[int] = Counter()
    failures: list[str] = []
    with serving(home, *(word for limit in limits for word in ("--limit", limit))) as server:
        server.draw()
        before = snapshot(home)

        def note(status: int, what: str) -> None:
            statuses[status] += 1
            if status >= 500 and status not in DOCUMENTED:
                failures.append(f"{status}: {what[:400]}")
                print(failures[-1], flush=True)

        _from_the_document(server, options, note)
        _by_hand(server, note)
        accepted = _accepted(server, options, note)
        changed = sorted(before.items() ^ snapshot(home).items())
        alive = server.draw()["state"]
    drawn = sum(path.read_text().count('"status": "completed"') for path in (home / "out").glob("runs/*/run.json"))
    return {
        "seed": options.seed, "statuses": dict(sorted(statuses.items())), "accepted": accepted, "drawn": drawn,
        "failures": failures, "files_changed_outside": changed, "alive": alive,
        "passed": alive == "completed" and drawn >= 50 and sum(statuses.values()) >= 500 and not failures + changed,
    }  # fmt: skip


def snapshot(home: Path) -> dict[str, tuple[int, int]]:
    """Every file below ``home`` that is not the server's own: path, size and time."""
    own = {home / "out", home / "log", home / "cache"}
    files = (path for path in home.rglob("*") if path.is_file() and not own & {path, *path.parents})
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def _from_the_document(server: Running, options: argparse.Namespace, note: Callable[[int, str], None]) -> None:
    """Valid and invalid requests for every operation, as schemathesis makes them of /openapi.json."""
    import requests
    import schemathesis
    from hypothesis import HealthCheck, given, seed, settings
    from schemathesis import GenerationMode

    schema = schemathesis.openapi.from_url(f"{server.client.address}/openapi.json")
    for mode, count in ((GenerationMode.POSITIVE, options.count // 2), (GenerationMode.NEGATIVE, options.count // 2)):

        @seed(options.seed)
        @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(case=schema.as_strategy(generation_mode=mode))
        def attempt(case: Any) -> None:
            try:
                answer = case.call(base_url=server.client.address, timeout=30)
            except requests.exceptions.RequestException as error:  # what the HTTP client itself does not send
                note(0, repr(error))
                return
            note(answer.status_code, f"{case.method} {case.formatted_path} {answer.text}")

        attempt()


def _accepted(server: Running, options: argparse.Namespace, note: Callable[[int, str], None]) -> int:
    """Requests that are allowed, with any text and any open option: they must be drawn, or refused in one line."""
    from hypothesis import HealthCheck, given, seed, settings
    from hypothesis import strategies as st

    accepted = 0
    catalogue = server.ask("GET", "/api/options")["groups"]
    choices = [
        f"{group}={option['name']}"
        for group in ("attention", "vae", "scheduler", "cache", "memory", "kernels")
        for option in catalogue[group]["options"]
    ]  # fmt: skip
    words = st.tuples(
        st.text(max_size=200), st.integers(0, 2**62), st.integers(1, 5), st.lists(st.sampled_from(choices), max_size=2)
    )

    @seed(options.seed)
    @settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(words)
    def attempt(asked: tuple[str, int, int, list[str]]) -> None:
        nonlocal accepted
        prompt, seed_, steps, changes = asked
        given_ = [*TINY[:3], f"prompt={prompt}", f"seed={seed_}", f"steps={steps}", *changes]
        status, answer = raw(server, "POST", "/api/runs", json.dumps({"overrides": given_}).encode())
        note(status, f"{given_}: {answer[:300]!r}")
        if status == 202:
            accepted += 1
            server.events(json.loads(answer)["id"])

    attempt()
    return accepted


def _by_hand(server: Running, note: Callable[[int, str], None]) -> None:
    """Oversize bodies, traversal, tricks with headers and with the protocol itself."""
    big = json.dumps({"overrides": ["prompt=" + "x" * 30000]}).encode()
    note(*_told(raw(server, "POST", "/api/runs", big)))
    note(*_told(raw(server, "POST", "/api/files?ending=png", os.urandom(50000))))
    for path in PATHS:
        for method in ("GET", "POST", "DELETE", "PUT"):
            note(*_told(raw(server, method, path, b"{}")))
    deep = ("[" * 5000 + "]" * 5000).encode()
    for body in (*BODIES, deep):
        for path in ("/api/runs", "/api/plan", "/api/sweeps", "/v1/images/generations", "/api/login"):
            note(*_told(raw(server, "POST", path, body)))
    host = urlsplit(server.client.address).netloc
    for head in (text.replace("{host}", host) for text in HEADS):
        for line in LINES:
            note(_protocol(server, f"{line}\r\n{head}\r\n\r\n"), f"{line} {head}")


def _told(answer: tuple[int, bytes]) -> tuple[int, str]:
    return answer[0], repr(answer[1][:200])


def raw(server: Running, method: str, path: str, body: bytes) -> tuple[int, bytes]:
    """One request as it is, whatever is in its path; status 0 where the connection was closed without an answer."""
    parts = urlsplit(server.client.address)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
    connection._validate_path = lambda path: None  # type: ignore[attr-defined]
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


def _protocol(server: Running, text: str) -> int:
    parts = urlsplit(server.client.address)
    with socket.create_connection((parts.hostname, parts.port), timeout=10) as connection, contextlib.suppress(OSError):
        connection.sendall(text.encode("latin-1"))
        connection.shutdown(socket.SHUT_WR)
        answer = connection.recv(100).split()
        return int(answer[1]) if len(answer) > 1 else 0
    return 0


# --- the whole --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(home: Path, *arguments: str) -> Iterator[Running]:
    """A server in ``home``; at the end it is stopped, and must have left nobody."""
    server = start_server(home, *arguments)
    try:
        yield server
    finally:
        server.process.terminate()
        server.process.wait(120)


PARTS: dict[str, Callable[[Path, argparse.Namespace], Result]] = {
    "groups": groups, "memory": memory, "client": client, "crowd": crowd, "hostile": hostile,
}  # fmt: skip


def main() -> int:
    """Run the parts; 1 where one of them did not pass."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=list(PARTS), choices=[*PARTS, []])
    parser.add_argument("--output", type=Path, default=Path("build/serving.json"))
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    parser.add_argument("--count", type=int, default=400, help="hostile: requests made from the document")
    parser.add_argument("--requests", type=int, default=300, help="memory: how many are drawn")
    parser.add_argument("--repeats", type=int, default=3, help="client: commands of each kind that count")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    results: dict[str, Result] = {}
    for part in options.parts or list(PARTS):
        home = Path(tempfile.mkdtemp(prefix=f"fluxrun-{part}-"))
        try:
            results[part] = {"load_average": os.getloadavg()[0], **PARTS[part](home, options)}
        finally:
            shutil.rmtree(home, ignore_errors=True)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(part, json.dumps({k: v for k, v in results[part].items() if k not in ("requests", "points")}), flush=True)
    return int(any(result.get("passed") is False for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
