"""Real servers for tests: a process of its own with a worker, in a folder of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxrun.serving.connection import Server

TINY = ("model=tiny", "height=64", "width=64", "steps=2", "model.max_sequence_length=32")


@dataclass
class Running:
    """A server that runs, and the way to it."""

    process: subprocess.Popen[bytes]
    home: Path
    client: Server

    @property
    def output(self) -> Path:
        return self.home / "out"

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        return self.client.ask(method, path, body)

    def start(self, *overrides: str) -> str:
        return str(self.ask("POST", "/api/runs", {"overrides": [*TINY, *overrides]})["id"])

    def events(self, run: str) -> list[dict[str, Any]]:
        return list(self.client.events(f"/api/runs/{run}/events"))

    def draw(self, *overrides: str) -> dict[str, Any]:
        run = self.start(*overrides)
        self.events(run)
        return dict(self.ask("GET", f"/api/runs/{run}"))

    def until(self, run: str, event: str) -> None:
        next(e for e in self.client.events(f"/api/runs/{run}/events") if e["event"] == event)

    def record(self, run: str) -> dict[str, Any]:
        return dict(json.loads((self.output / "runs" / run / "run.json").read_text()))


def start_server(home: Path, *arguments: str) -> Running:
    """A server in a process of its own, once it answers."""
    environment = {**os.environ, "FLUXRUN_DATA_DIR": str(home / "data"), "COLUMNS": "300"}
    command = [sys.executable, "-m", "fluxrun", "serve", "--port", "0", "--output", str(home / "out"), *arguments]
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=home, env=environment, stdout=log, stderr=log, start_new_session=True)
    state = home / "data" / "server.json"
    for _ in range(3600):
        if state.exists():
            break
        assert process.poll() is None, (home / "log").read_text()
        time.sleep(0.05)
    if not state.exists():
        process.kill()
    found = json.loads(state.read_text())
    client = Server(f"unix:{found['socket']}" if found["socket"] else found["url"])
    return Running(process, home, client)
