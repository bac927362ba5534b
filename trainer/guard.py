"""Gate: who may see the page. Host, Origin and key are checked before anything else runs."""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs

Scope = MutableMapping[str, Any]

Message = MutableMapping[str, Any]

Receive = Callable[[], Awaitable[Message]]

Send = Callable[[Message], Awaitable[None]]

App = Callable[[Scope, Receive, Send], Awaitable[None]]

COOKIE = "trainer_monitor"

MAX_FORM = 4096

WRONG_KEY_PAUSE_S = 0.5

HEADERS = [
    (
        b"content-security-policy",
        # NiceGUI needs inline scripts and eval, so escaping is the wall and this only a fence:
        # nothing is fetched from, sent to or framed by another place.
        b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
        b"style-src 'self' 'unsafe-inline'; img-src 'self' data:; font-src 'self' data:; "
        b"connect-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'; "
        b"frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
]

LOGIN = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>Key needed</title>
<style>body{font:16px system-ui;margin:20vh auto;max-width:22rem;padding:0 1rem;color-scheme:light
dark}input,button{font:inherit;width:100%;padding:.5rem;margin:.3rem 0;box-sizing:border-box}
</style><form method="post" action="/login"><label>Key of this page
<input name="key" type="password" autofocus autocomplete="current-password"></label>
<button>Open</button><p role="alert">NOTE</p></form></html>"""


class Gate:
    """ASGI middleware around everything, websockets included."""

    def __init__(self, app: App, *, hosts: frozenset[str], key: str | None) -> None:
        """Take what to guard.

        Args:
            hosts: names in the Host header that are answered (a name that somebody else's DNS
                points here is not among them).
            key: what visitors must give once; None: nothing.
        """
        self.app, self.hosts, self.key = app, hosts, key
        self._session = hmac.new(secrets.token_bytes(32), b"session", "sha256").hexdigest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, refuse, or pass on."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value for name, value in scope["headers"]}
        host = headers.get("host", b"").decode("latin-1")
        if _name_of(host) not in self.hosts:
            await _refuse(scope, send, 421, "this page is not served under that name")
        elif not self._is_own_origin(headers, host):
            await _refuse(scope, send, 403, "a page of another place may not ask here")
        elif self.key is None or self._has_session(headers):
            await self.app(scope, receive, _with_headers(send))
        else:
            await self._ask_for_key(scope, receive, send)

    @staticmethod
    def _is_own_origin(headers: dict[str, bytes], host: str) -> bool:
        """Browsers say which page asks, for every websocket and every form."""
        origin = headers.get("origin")
        if origin is None:
            return True
        return origin.decode("latin-1").partition("://")[2].lower() == host.lower()

    def _has_session(self, headers: dict[str, bytes]) -> bool:
        try:
            cookies = SimpleCookie(headers.get("cookie", b"").decode("latin-1"))
        except CookieError:
            return False
        found = cookies[COOKIE].value if COOKIE in cookies else ""
        return hmac.compare_digest(found.encode(), self._session.encode())

    async def _ask_for_key(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await _refuse(scope, send, 403, "a key is needed")
        elif scope["method"] == "POST" and scope["path"] == "/login":
            given = parse_qs((await _body(receive)).decode("utf-8", "replace")).get("key", [""])[0]
            if hmac.compare_digest(given.strip().encode(), (self.key or "").encode()):
                cookie = f"{COOKIE}={self._session}; HttpOnly; SameSite=Strict; Path=/"
                more = [(b"set-cookie", cookie.encode()), (b"location", b"/")]
                await _respond(send, 303, b"", more)
                return
            await asyncio.sleep(WRONG_KEY_PAUSE_S)  # guessing is slow
            page = LOGIN.replace("NOTE", "That is not the key of this page.")
            await _respond(send, 403, page.encode())
        else:
            await _respond(send, 401, LOGIN.replace("NOTE", "").encode())


def _name_of(host: str) -> str:
    """The name in a Host header, without port and brackets."""
    name = host.partition("]")[0].removeprefix("[") if host.startswith("[") else host.split(":")[0]
    return name.lower()


async def _body(receive: Receive) -> bytes:
    data, is_more = b"", True
    while is_more and len(data) <= MAX_FORM:
        message = await receive()
        data += message.get("body", b"")
        is_more = message.get("more_body", False)
    return data[:MAX_FORM]


async def _refuse(scope: Scope, send: Send, status: int, why: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": why})
    else:
        await _respond(send, status, why.encode(), [(b"content-type", b"text/plain")])


async def _respond(
    send: Send, status: int, body: bytes, more: list[tuple[bytes, bytes]] | None = None
) -> None:
    kinds = more or [(b"content-type", b"text/html; charset=utf-8")]
    headers = [*HEADERS, (b"content-length", str(len(body)).encode()), *kinds]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _with_headers(send: Send) -> Send:
    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *HEADERS]}
        await send(message)

    return wrapped
