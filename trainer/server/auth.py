"""Who may ask what of the preview server: keys, scopes, and the size of a body. No routes here."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from starlette.exceptions import HTTPException

from trainer.guard import Guard, Receive, Refusal, Scope, Send, answer, is_same_secret
from trainer.publish.wire import MAX_BODY
from trainer.server.problems import problem_body

MAX_JSON = 16 << 20
"""Longest body that is no part of weights: parsing it holds the whole server up (16 MiB are about
two million token ids)."""

MAX_HELD = 64 << 20
"""Bytes of large request bodies that are held at once, until they are answered."""

SMALL_BODY = 256 << 10
"""A body up to this size is not counted: it is taken while others are large."""

KEY_SCOPE = "trainer.key_scope"
"""Where the routes find, in a request's scope, what its key may do: `generate` or `publish`."""

OPEN_PATHS = frozenset({"/health"})

PUBLISH_PREFIXES = ("/weights", "/models/set_active", "/models/register")


def scope_of(path: str) -> str | None:
    """The scope a path needs; None: open to everyone."""
    if path in OPEN_PATHS:
        return None
    is_publish = any(path == p or path.startswith(p + "/") for p in PUBLISH_PREFIXES)
    return "publish" if is_publish else "generate"


@dataclass
class KeyDoor:
    """Checks key and length, then counts the body while it streams."""

    app: Any
    keys: dict[str, str] = field(default_factory=dict)
    max_body: int = MAX_BODY
    max_json: int = MAX_JSON
    max_held: int = MAX_HELD
    held: int = field(default=0, init=False)
    """Bytes of large bodies that are held now."""

    async def __call__(
        self, scope: Scope, headers: dict[str, str], receive: Receive, send: Send
    ) -> None:
        """Answer, or pass on."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        path = scope["path"]
        refusal = self.refusal(path, headers)
        if refusal is not None:
            await refuse(scope, send, refusal)
            return
        held = self._scope_held(headers.get("authorization", ""))
        scope[KEY_SCOPE] = held if self.keys else "publish"
        body = _Body(self, self.longest(path), is_kept=not _is_part(path))
        try:
            await self.app(scope, body.counted(receive), send)
        finally:
            self.held -= body.counts

    def refusal(self, path: str, headers: dict[str, str]) -> Refusal | None:
        """Why this request is not let in, by its key and its length; None where it is."""
        needed = scope_of(path)
        if needed is not None and self.keys:
            held = self._scope_held(headers.get("authorization", ""))
            if held is None:
                return Refusal(401, "key", "a key is needed: Authorization: Bearer KEY")
            if needed == "publish" and held != "publish":
                return Refusal(403, "scope", "this key has the scope generate; publish is required")
        length = headers.get("content-length", "0")
        most = self.longest(path)
        if not length.isdigit() or int(length) > most:
            return Refusal(413, "too_large", f"a body may have at most {most} bytes")
        return None

    def longest(self, path: str) -> int:
        """Most bytes of a body for this path."""
        return self.max_body if _is_part(path) else min(self.max_body, self.max_json)

    def _scope_held(self, header: str) -> str | None:
        kind, _, given = header.partition(" ")
        held = None
        for key, scope in self.keys.items():  # all of them, so that the time says nothing
            if is_same_secret(given, key) and kind.lower() == "bearer":
                held = scope
        return held


@dataclass
class _Body:
    """The bytes of one request's body."""

    door: KeyDoor
    most: int
    """Its longest length."""
    is_kept: bool
    """False where it is written to a file as it comes."""
    seen: int = 0
    counts: int = 0
    """How much of `KeyDoor.held` it is."""

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
        if self.door.held and self.door.held - self.counts + self.seen > self.door.max_held:
            raise HTTPException(
                503,
                "too many large requests at once",
                {"Connection": "close", "Retry-After": "5"},
            )
        self.door.held += self.seen - self.counts
        self.counts = self.seen


def guarded(door: KeyDoor, hosts: frozenset[str] = frozenset()) -> Guard:
    """The server's routes behind their guard.

    Args:
        hosts: names in the Host header that are answered, besides addresses.
    """
    return Guard(door, hosts=hosts, refuse=refuse, takes_addresses=True)


async def refuse(scope: Scope, send: Send, refusal: Refusal) -> None:
    """Say no in the shape of all errors of this server."""
    body = problem_body(scope["path"], refusal.status, refusal.detail, refusal.code)
    headers = [(b"content-type", b"application/json")]
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if refusal.status == 413:
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    await answer(send, refusal.status, json.dumps(body).encode(), headers)


def _is_part(path: str) -> bool:
    return path.startswith("/weights/") and "/parts/" in path
