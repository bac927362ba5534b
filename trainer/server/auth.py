"""Who may ask what: keys, scopes, Host and Origin, and the size of a body. No routes here."""

from __future__ import annotations

import hmac
import ipaddress
import json
from dataclasses import dataclass, field
from typing import Any

from starlette.exceptions import HTTPException

from trainer.net import is_loopback
from trainer.publish.wire import MAX_BODY
from trainer.server.problems import problem_body

MAX_JSON = 16 << 20
"""Longest body that is no part of weights: parsing it holds the whole server up (16 MiB are about
two million token ids)."""

MAX_HELD = 64 << 20
"""Bytes of large request bodies that are held at once, until they are answered."""

SMALL_BODY = 256 << 10
"""A body up to this size is not counted: it is taken while others are large."""

OPEN_PATHS = frozenset({"/health"})

PUBLISH_PREFIXES = ("/weights", "/models/set_active", "/models/register")


def scope_of(path: str) -> str | None:
    """The scope a path needs; None: open to everyone."""
    if path in OPEN_PATHS:
        return None
    is_publish = any(path == p or path.startswith(p + "/") for p in PUBLISH_PREFIXES)
    return "publish" if is_publish else "generate"


@dataclass
class Guard:
    """ASGI middleware: nothing reaches a route that this has not let through."""

    app: Any
    keys: dict[str, str] = field(default_factory=dict)
    hosts: frozenset[str] = frozenset()
    max_body: int = MAX_BODY
    max_json: int = MAX_JSON
    max_held: int = MAX_HELD
    held: int = field(default=0, init=False)
    """Bytes of large bodies that are held now."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Check Host, Origin, key and length, then count the body while it streams."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        names = [name.decode("latin-1") for name, _ in scope["headers"]]
        values = [value.decode("latin-1") for _, value in scope["headers"]]
        headers = dict(zip(names, values, strict=True))
        refusal = self._refusal(scope["path"], headers)
        if names.count("host") > 1 or names.count("authorization") > 1:
            refusal = 421, "host", "a Host or Authorization header that comes twice"
        if refusal is not None:
            await _answer(send, scope["path"], *refusal)
            return
        body = _Body(self, self.longest(scope["path"]), is_kept=not _is_part(scope["path"]))
        try:
            await self.app(scope, body.counted(receive), send)
        finally:
            self.held -= body.counts

    def _refusal(self, path: str, headers: dict[str, str]) -> tuple[int, str, str] | None:
        host = _host_name(headers.get("host", ""))
        if not (host in self.hosts or is_loopback(host) or _is_address(host)):
            return 421, "host", "this Host is not served here"
        origin = headers.get("origin")
        if origin is not None and origin != f"http://{headers.get('host')}":
            return 403, "origin", "requests from other web pages are refused"
        needed = scope_of(path)
        if needed is not None and self.keys:
            held = self._scope_held(headers.get("authorization", ""))
            if held is None:
                return 401, "key", "a key is needed: Authorization: Bearer KEY"
            if needed == "publish" and held != "publish":
                return 403, "scope", "this key may generate, not publish"
        length = headers.get("content-length", "0")
        most = self.longest(path)
        if not length.isdigit() or int(length) > most:
            return 413, "too_large", f"a body may have at most {most} bytes"
        return None

    def longest(self, path: str) -> int:
        """Most bytes of a body for this path."""
        return self.max_body if _is_part(path) else min(self.max_body, self.max_json)

    def _scope_held(self, header: str) -> str | None:
        kind, _, given = header.partition(" ")
        held = None
        for key, scope in self.keys.items():  # all of them, so that the time says nothing
            if hmac.compare_digest(given.encode(), key.encode()) and kind.lower() == "bearer":
                held = scope
        return held


@dataclass
class _Body:
    """The bytes of one request's body."""

    guard: Guard
    most: int
    """Its longest length."""
    is_kept: bool
    """False where it is written to a file as it comes."""
    seen: int = 0
    counts: int = 0
    """How much of `Guard.held` it is."""

    def counted(self, receive: Any) -> Any:
        """`receive`, refusing what is too much for one body or for all together."""

        async def counted() -> Any:
            message = await receive()
            self._take(len(message.get("body", b"")))
            return message

        return counted

    def _take(self, count: int) -> None:
        self.seen += count
        # The rest of a refused body is not read.
        if self.seen > self.most:
            limit = f"a body may have at most {self.most} bytes"
            raise HTTPException(413, limit, {"Connection": "close"})
        if not (self.is_kept and self.seen > SMALL_BODY):
            return
        if self.guard.held and self.guard.held - self.counts + self.seen > self.guard.max_held:
            raise HTTPException(
                503,
                "too many large bodies at once",
                {"Connection": "close", "Retry-After": "5"},
            )
        self.guard.held += self.seen - self.counts
        self.counts = self.seen


def _is_part(path: str) -> bool:
    return path.startswith("/weights/") and "/parts/" in path


def _host_name(header: str) -> str:
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower()


def _is_address(host: str) -> bool:
    """An address cannot be rebound to another machine, a name can."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


async def _answer(send: Any, path: str, status: int, code: str, detail: str) -> None:
    body = json.dumps(problem_body(path, status, detail, code)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if status == 413:
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
