"""Who may ask: Host, Origin, token, cookie, content type, size. No worker runs here."""

from __future__ import annotations

import asyncio
import json

import httpx2
import pytest

from fluxrun.process import device
from fluxrun.serving.app import make_app
from fluxrun.serving.guard import Access, Refusal
from fluxrun.serving.images_api import refuse_what_failed
from fluxrun.serving.limits import Limits
from fluxrun.serving.rules import Accepted
from fluxrun.serving.runs import Run
from fluxrun.serving.service import Settings

LOCAL = Access("127.0.0.1", 8484)
REMOTE = Access("0.0.0.0", 8484, token="sesame", names=("pictures.example",))
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    apps = {access: make_app(Settings(access, folder, limits=Limits(body=500))) for access in (LOCAL, REMOTE)}

    def ask(method, path, *, access=LOCAL, host="127.0.0.1:8484", body=None, headers=None):
        transport = httpx2.ASGITransport(app=apps[access], raise_app_exceptions=False)

        async def send():
            async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1:8484") as client:
                return await client.request(method, path, content=body, headers={"Host": host, **(headers or {})})

        return asyncio.run(send())

    return ask


@pytest.mark.parametrize("host", ["127.0.0.1:8484", "localhost:8484", "LOCALHOST", "[::1]:8484"])
def test_hosts_of_this_machine(ask, host):
    assert ask("GET", "/api/status", host=host).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "127.0.0.1.evil.example", "", "localhost@evil.example", "192.168.1.2", "a:b:c", "[::1", "[x]"],
)
def test_a_foreign_host(ask, host):
    assert ask("GET", "/api/status", host=host).status_code == 421


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:9999", "https://localhost", "http://[::1"]
)
def test_a_foreign_origin(ask, origin):
    for method, path in (("GET", "/api/status"), ("POST", "/api/runs")):
        assert ask(method, path, headers={"Origin": origin}).status_code == 403


def test_a_page_of_another_site(ask):
    foreign = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
    assert ask("GET", "/api/runs", headers=foreign).status_code == 403
    own = {"Origin": "http://127.0.0.1:8484", "Sec-Fetch-Site": "same-origin"}
    assert ask("GET", "/api/runs", headers=own).status_code == 200


def test_a_text_post_from_a_page(ask):
    body = json.dumps({"overrides": []})
    for kind in ({"Content-Type": "text/plain"}, {"Content-Type": "multipart/form-data"}, {}):
        assert ask("POST", "/api/runs", body=body, headers=kind).status_code == 415


def test_no_token_on_a_host_that_is_not_loopback(ask):
    def status(path="/api/status", method="GET", **headers):
        return ask(method, path, access=REMOTE, host="192.168.1.2:8484", headers=headers).status_code

    assert status() == status(Authorization="Bearer wrong") == status(Cookie="fluxrun_8484=wrong") == 401
    assert status("/openapi.json") == status("/v1/models") == status("/api/files?ending=png", "POST") == 401
    assert status(Authorization="Bearer sesame") == status(Cookie="a=b; fluxrun_8484=sesame") == 200
    assert status("/api/status?token=sesame") == 401  # an address is in histories and logs
    assert ask("GET", "/v1/models", access=REMOTE, host="pictures.example").status_code == 401
    assert ask("GET", "/v1/models", access=REMOTE, host="evil.example").status_code == 421


def test_the_token_becomes_a_cookie(ask):
    wrong = ask("POST", "/api/login", access=REMOTE, host="10.0.0.1", body='{"token": "x"}', headers=JSON)
    assert wrong.status_code == 401
    right = ask("POST", "/api/login", access=REMOTE, host="10.0.0.1", body='{"token": "sesame"}', headers=JSON)
    cookie = right.headers["set-cookie"]
    assert right.status_code == 204
    assert "HttpOnly" in cookie
    assert "samesite=strict" in cookie.lower()


def test_a_body_that_is_too_large(ask):
    body = json.dumps({"overrides": ["prompt=" + "x" * 600]})
    assert ask("POST", "/api/runs", body=body, headers=JSON).status_code == 413

    async def chunks():
        for _ in range(20):
            yield b"x" * 100

    assert ask("POST", "/api/runs", body=chunks(), headers=JSON).status_code == 413


@pytest.mark.parametrize("name", ["..", "../../etc", "%2e%2e%2f%2e%2e", "20260101-000000-0000000g"])
def test_ids_lead_nowhere(ask, tmp_path, name):
    (tmp_path / "run.json").write_text("{}")
    for path in (f"/api/runs/{name}", f"/api/runs/{name}/files/run.json", f"/api/runs/x/files/{name}/run.json"):
        assert ask("GET", path).status_code in (404, 405)


def test_errors_are_one_line_of_json(ask):
    for path, body in (
        ("/api/runs", "{"),
        ("/api/runs", "{}"),
        ("/api/runs", '{"overrides": ["sede=1"]}'),
        ("/nope", "{}"),
    ):
        answer = ask("POST", path, body=body, headers=JSON)
        assert answer.status_code in (400, 404, 422)
        assert set(answer.json()["error"]) == {"message", "type", "exit_code"}
        assert "\n" not in answer.json()["error"]["message"]


def test_documents(ask):
    assert ask("GET", "/docs").status_code == ask("GET", "/redoc").status_code == 404
    assert "/api/runs/{run_id}/events" in ask("GET", "/openapi.json").json()["paths"]
    options = ask("GET", "/api/options").json()
    attention = {option["name"]: option for option in options["groups"]["attention"]["options"]}
    assert attention["sdpa"]["usable"]
    assert attention["flash4"]["why_not"]
    assert [option["name"] for option in options["groups"]["model"]["options"]] == ["shapes", "tiny"]


def test_a_plan(ask):
    body = json.dumps({"overrides": ["model=tiny", "attention=flash4"]})
    answer = ask("POST", "/api/plan", body=body, headers=JSON).json()
    assert answer["options"]["attention"]["effective"] == "sdpa"
    assert answer["options"]["attention"]["fallbacks"]


@pytest.mark.parametrize(
    ("kind", "status"), [("OutOfMemory", 507), ("WorkerDied", 503), ("Interrupted", 409), ("NotFinite", 400)]
)
def test_what_a_failed_run_is_answered(kind, status, tmp_path):
    run = Run("x", Accepted((), {}, 1), tmp_path, state="failed", error="memory=balanced would fit", error_type=kind)
    with pytest.raises(Refusal, match="memory=balanced would fit") as caught:
        refuse_what_failed(run)
    assert caught.value.status == status


def test_a_lost_device(monkeypatch):
    assert not device.is_lost("cpu")
    monkeypatch.setattr(
        device, "synchronize", lambda name: (_ for _ in ()).throw(RuntimeError("CUDA error: misaligned"))
    )
    assert device.is_lost("cuda")
