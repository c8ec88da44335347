"""A small stand-in for the Hugging Face hub: the few endpoints its own client uses, over a folder on this disk."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "black-forest-labs/FLUX.2-klein-4B"


@dataclass
class Hub:
    """What the server serves, how it misbehaves, and what it was asked."""

    folder: Path
    url: str = ""
    repo: str = REPO
    gated: bool = False
    stall: str | None = None
    """Name of a file of which only the first half is sent; the rest never comes."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    stalled: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)

    def files(self) -> dict[str, Path]:
        return {str(f.relative_to(self.folder)): f for f in sorted(self.folder.rglob("*")) if f.is_file()}

    def fetched(self) -> list[str]:
        """Names of the files whose content was asked for."""
        return [path.partition(f"/resolve/{COMMIT}/")[2] or path.rpartition("/main/")[2] for m, path in self.requests
                if m == "GET" and "/resolve/" in path]  # fmt: skip


def _etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        return

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        if match := re.fullmatch(rf"/api/models/{re.escape(self.hub.repo)}(?:/revision/(.+))?", path):
            return self.info(match[1])
        if re.fullmatch(rf"/api/models/{re.escape(self.hub.repo)}/tree/(.+)", path):
            return self.json(
                [
                    {"type": "file", "path": name, "size": file.stat().st_size, "oid": "0" * 40}
                    for name, file in self.hub.files().items()
                ]
            )
        if match := re.fullmatch(rf"/{re.escape(self.hub.repo)}/resolve/([^/]+)/(.+)", path):
            return self.file(match[2])
        self.refuse(401, "RepoNotFound")

    def info(self, revision: str | None) -> None:
        if revision not in (None, "main", COMMIT):
            return self.refuse(404, "RevisionNotFound")
        siblings = [{"rfilename": name, "size": file.stat().st_size} for name, file in self.hub.files().items()]
        self.json({"id": self.hub.repo, "sha": COMMIT, "siblings": siblings})

    def file(self, name: str) -> None:
        if self.hub.gated:
            return self.refuse(401, "GatedRepo")
        if name not in self.hub.files():
            return self.refuse(404, "EntryNotFound")
        data = self.hub.files()[name].read_bytes()
        start = int(match[1]) if (match := re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))) else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{_etag(data)}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        if name == self.hub.stall:
            self.wfile.write(data[start : start + len(data) // 2])
            self.wfile.flush()
            self.hub.stalled.set()
            self.hub.release.wait(30)
            self.close_connection = True
            return
        self.wfile.write(data[start:])

    def json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def serve(folder: Path) -> Iterator[Hub]:
    """Serve ``folder`` as ``REPO`` on a free local port."""
    hub = Hub(folder)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.release.set()
        server.shutdown()
        server.server_close()


def use(running: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the hub's client ask this one."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", running.url)
    template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setenv("HF_ENDPOINT", running.url)


def empty_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache within ``folder``, no token and no offline switch."""
    from huggingface_hub import constants

    for name in ("HF_HUB_CACHE", "HF_ASSETS_CACHE"):
        monkeypatch.setattr(constants, name, str(folder / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return folder / "cache"
