"""Who may ask: looked at before a request reaches any route: Host, Origin, token, content type, size of the body."""

from __future__ import annotations

import hmac
import ipaddress
import json
import socket
from collections.abc import Collection
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN_PATHS = ("/", "/api/login")
"""What is answered without a token: the page, which asks for it, and where it is handed in."""

SAFE = ("GET", "HEAD", "OPTIONS")

UPLOADS = "/api/files"


@dataclass(frozen=True)
class Access:
    """How the server is reached, and what it asks for."""

    host: str
    port: int
    token: str | None = None
    """None: everybody who can connect may ask."""
    names: tuple[str, ...] = ()
    """Further names that it is reached by."""

    @property
    def cookie(self) -> str:
        """The cookie's name: browsers share cookies between the ports of a host."""
        return f"fluxrun_{self.port}"

    def knows(self, given: str) -> bool:
        """Whether a token is the right one."""
        return self.token is None or hmac.compare_digest(given.encode(), self.token.encode())

    def allows_host(self, header: str) -> bool:
        """Whether a Host header names this server: a foreign name that leads here is an attack (DNS rebinding)."""
        name = (urlsplit(f"//{header}").hostname or "").rstrip(".")
        if is_loopback(self.host):
            return name == "localhost" or is_loopback(name)
        return is_address(name) or name in {self.host, *self.names, "localhost", socket.gethostname(), socket.getfqdn()}


def is_address(name: str) -> bool:
    """Whether a name is an IP address, which no DNS can make lead elsewhere."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(name: str) -> bool:
    """Whether only this machine reaches it."""
    return name == "localhost" or (is_address(name) and ipaddress.ip_address(name).is_loopback)


class Refusal(Exception):
    """An answer other than what was asked for."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Guard:
    """An ASGI middleware; what it refuses no route has seen."""

    def __init__(self, app: ASGIApp, access: Access, body_limit: int) -> None:
        self.app, self.access, self.body_limit = app, access, body_limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        sent = False

        async def watched(message: Message) -> None:
            nonlocal sent
            sent = True
            await send(_hardened(message))

        try:
            headers = _headers(scope)
            self._check(scope, headers)
            await self.app(scope, await self._limited(scope, headers, receive), watched)
        except Refusal as refusal:
            if not sent:
                await _answer(send, refusal)

    def _check(self, scope: Scope, headers: dict[str, str]) -> None:
        method, path = scope["method"], scope["path"]
        if not self.access.allows_host(headers.get("host", "")):
            raise Refusal(421, "this server is not reached by that name (Host)")
        _check_origin(method, path, headers)
        is_page = path in OPEN_PATHS or path.startswith("/static/")
        if not is_page and not self.access.knows(_token(headers, self.access.cookie)):
            raise Refusal(401, "a token is needed: Authorization: Bearer TOKEN; the server's state file has it")
        is_json = headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json"
        if method not in SAFE and path != UPLOADS and _has_body(headers) and not is_json:
            raise Refusal(415, "the body must be JSON (Content-Type: application/json)")

    async def _limited(self, scope: Scope, headers: dict[str, str], receive: Receive) -> Receive:
        """The body, read up to its limit before any route sees it; uploads have a limit of their own."""
        if scope["path"] == UPLOADS:
            return receive
        too_large = Refusal(413, f"a body may have {self.body_limit:,} bytes")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.body_limit:
            raise too_large
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
            if len(body) > self.body_limit:
                raise too_large
        waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replayed() -> Message:
            return waiting.pop() if waiting else await receive()

        return replayed


def _headers(scope: Scope) -> dict[str, str]:
    """The request's headers; of those that are looked at here each may be there once."""
    headers: dict[str, str] = {}
    for raw, value in scope["headers"]:
        name = raw.decode("latin-1").lower()
        if name in headers and name in ("host", "origin", "content-type", "content-length", "authorization"):
            raise Refusal(400, f"two {name} headers")
        headers[name] = f"{headers[name]}; {value.decode('latin-1')}" if name in headers else value.decode("latin-1")
    return headers


def _check_origin(method: str, path: str, headers: dict[str, str]) -> None:
    """A page of somebody else's may link to this one, and nothing more."""
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc.lower() != headers["host"].lower():
        raise Refusal(403, "a page of another origin may not ask this server")
    is_link = method == "GET" and path == "/" and headers.get("sec-fetch-mode") == "navigate"
    if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not is_link:
        raise Refusal(403, "a page of another site may not ask this server")


def _has_body(headers: dict[str, str]) -> bool:
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers or "content-type" in headers


def _token(headers: dict[str, str], cookie: str) -> str:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token:
        return token.strip()
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(cookie)
    except CookieError:
        return ""
    return found.value if found else ""


HARDENING: Collection[tuple[bytes, bytes]] = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
        b"frame-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    ),
)


def _hardened(message: Message) -> Message:
    if message["type"] == "http.response.start":
        present = {name for name, _ in message.get("headers", [])}
        message["headers"] = [*message.get("headers", []), *((n, v) for n, v in HARDENING if n not in present)]
    return message


async def _answer(send: Send, refusal: Refusal) -> None:
    kind = {401: "unauthorized", 413: "too_large", 415: "not_json"}.get(refusal.status, "refused")
    body = json.dumps({"error": {"message": str(refusal), "type": kind, "exit_code": 2}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refusal.status == 413:
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    await send(_hardened({"type": "http.response.start", "status": refusal.status, "headers": headers}))
    await send({"type": "http.response.body", "body": body})
