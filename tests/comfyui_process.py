"""A real ComfyUI without a window, in a process of its own: workflows in, pictures, messages and console lines out.

``FLUXRUN_COMFYUI`` is the folder of ComfyUI, ``FLUXRUN_COMFYUI_PYTHON`` a Python that has what it and fluxrun need.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import psutil

REPOSITORY = Path(__file__).resolve().parents[1]

NODE = "FluxrunFlux2"

WORKFLOW = REPOSITORY / "docs" / "comfyui_api.json"
"""The workflow that the docs keep, in the form in which the API takes it."""

PATIENCE_S = 600.0

PICTURE, SAVE, RECORD = "1", "2", "3"
"""Its nodes: ours, ComfyUI's that saves, ComfyUI's that shows the record."""


class ComfyUI:
    """ComfyUI on a port of its own, with folders of its own, and our node linked into them."""

    def __init__(self, home: Path) -> None:
        self.home, self.console = home, home / "console.log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        for folder in ("custom_nodes", "input", "output", "user", "models/loras", "models/diffusers"):
            (home / folder).mkdir(parents=True, exist_ok=True)
        (home / "custom_nodes" / "fluxrun").symlink_to(REPOSITORY / "integrations" / "comfyui")
        command = [
            os.environ.get("FLUXRUN_COMFYUI_PYTHON", sys.executable), "main.py", "--cpu", "--listen", "127.0.0.1",
            "--port", str(self.port), "--base-directory", str(home), "--disable-api-nodes",
        ]  # fmt: skip
        path = f"{REPOSITORY / 'src'}:{os.environ.get('PYTHONPATH', '')}"
        own = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "FLUXRUN_CACHE_DIR": str(home / "cache")}
        with self.console.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=os.environ["FLUXRUN_COMFYUI"], stdout=log, stderr=log,
                env={**os.environ, **own},
            )  # fmt: skip
        self.until(self.answers)
        self.events = Events(self.port)

    def answers(self) -> bool:
        assert self.process.poll() is None, self.console.read_text()
        try:
            return NODE in self.ask("/object_info")
        except OSError:
            return False

    def until(self, there: Callable[[], Any]) -> Any:
        """Wait for something that becomes true."""
        deadline = time.monotonic() + PATIENCE_S
        while not (found := there()):
            assert time.monotonic() < deadline, self.console.read_text()[-3000:]
            time.sleep(0.1)
        return found

    def close(self) -> None:
        """End it; the process that draws goes with it."""
        children = self.children()
        self.process.terminate()
        self.process.wait(60)
        _, left = psutil.wait_procs(children, 60)
        assert not left

    # -- asking -------------------------------------------------------------------------------------------------------

    def get(self, path: str, body: Any = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return bytes(answer.read())

    def ask(self, path: str, body: Any = None) -> Any:
        return json.loads(self.get(path, body) or b"null")

    def post(self, workflow: dict[str, Any]) -> str:
        """Put a workflow into the queue; returns its id."""
        return str(self.ask("/prompt", {"prompt": workflow, "client_id": self.events.client})["prompt_id"])

    def refusal(self, workflow: dict[str, Any]) -> str:
        """What ComfyUI shows for a workflow that it does not take."""
        try:
            self.post(workflow)
        except urllib.error.HTTPError as error:
            [found] = json.loads(error.read())["node_errors"][PICTURE]["errors"]
            return f"{found['message']}: {found['details']}"
        raise AssertionError("the workflow was taken")

    def wait(self, prompt: str) -> dict[str, Any]:
        """What became of a workflow."""
        return dict(self.until(lambda: self.ask(f"/history/{prompt}"))[prompt])

    def draw(self, **changed: Any) -> dict[str, Any]:
        return self.wait(self.post(workflow(**changed)))

    def error(self, prompt: str) -> str:
        """The message of the error that a workflow ended in."""
        messages = dict(self.wait(prompt)["status"]["messages"])
        return str(messages["execution_error"]["exception_message"]).strip()

    def was_interrupted(self, prompt: str) -> bool:
        return "execution_interrupted" in dict(self.wait(prompt)["status"]["messages"])

    def record(self, ended: dict[str, Any]) -> dict[str, Any]:
        return dict(json.loads(ended["outputs"][RECORD]["text"][0]))

    def picture(self, ended: dict[str, Any]) -> bytes:
        return self.get(f"/view?{urlencode(ended['outputs'][SAVE]['images'][0])}")

    def said(self, since: int = 0) -> str:
        """What stands on the console, from a place on."""
        return self.console.read_text(errors="replace")[since:]

    # -- the process that draws ---------------------------------------------------------------------------------------

    def children(self) -> list[psutil.Process]:
        """The processes that draw, and what they have started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def runs(self, names: tuple[str, ...]) -> bool:
        """Whether one of them is a program of these names, and still at work."""
        found = False
        for child in self.children():
            with contextlib.suppress(psutil.Error):  # it has ended meanwhile
                found = found or (child.name() in names and child.status() != psutil.STATUS_ZOMBIE)
        return found


class Events:
    """ComfyUI's messages over its WebSocket, as they come."""

    client = "fluxrun-test"

    def __init__(self, port: int) -> None:
        self.seen: list[dict[str, Any]] = []
        self._socket = socket.create_connection(("127.0.0.1", port))
        key = base64.b64encode(os.urandom(16)).decode()
        head = (
            f"GET /ws?clientId={self.client} HTTP/1.1", f"Host: 127.0.0.1:{port}", "Upgrade: websocket",
            "Connection: Upgrade", f"Sec-WebSocket-Key: {key}", "Sec-WebSocket-Version: 13", "", "",
        )  # fmt: skip
        self._socket.sendall("\r\n".join(head).encode())
        self._file = self._socket.makefile("rb")
        while self._file.readline().strip():
            pass
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while len(head := self._file.read(2)) == 2:
            size = head[1] & 127
            if size > 125:
                size = struct.unpack(">H" if size == 126 else ">Q", self._file.read(2 if size == 126 else 8))[0]
            body = self._file.read(size)
            if head[0] & 15 == 1:
                self.seen.append(json.loads(body))
            elif head[0] & 15 == 2 and struct.unpack(">I", body[:4])[0] == 3:  # a text on a node
                length = struct.unpack(">I", body[4:8])[0]
                self.seen.append({"type": "text", "data": body[8 + length :].decode()})

    def of(self, kind: str, since: int = 0) -> list[Any]:
        return [event["data"] for event in self.seen[since:] if event["type"] == kind]


def workflow(**changed: Any) -> dict[str, Any]:
    """The docs' workflow with other inputs of our node."""
    nodes = json.loads(WORKFLOW.read_text())
    nodes[PICTURE]["inputs"] |= changed
    return dict(nodes)
