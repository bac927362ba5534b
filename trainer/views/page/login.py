"""The door of the live page: a key that is asked for once, then a cookie."""

from __future__ import annotations

import asyncio
import hmac
import secrets
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs

from trainer.guard import App, Guard, Receive, Refusal, Scope, Send, answer, is_same_secret

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

HTML = (b"content-type", b"text/html; charset=utf-8")

LOGIN = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>Key needed</title>
<style>body{font:16px system-ui;margin:20vh auto;max-width:22rem;padding:0 1rem;color-scheme:light
dark}input,button{font:inherit;width:100%;padding:.5rem;margin:.3rem 0;box-sizing:border-box}
</style><form method="post" action="/login"><label>Key of this page
<input name="key" type="password" autofocus autocomplete="current-password"></label>
<button>Open</button><p role="alert">NOTE</p></form></html>"""


class LoginDoor:
    """Lets in whoever has given the key in this browser; everybody where there is no key."""

    def __init__(self, app: App, key: str | None) -> None:
        self.app, self.key = app, key
        self._session = hmac.new(secrets.token_bytes(32), b"session", "sha256").hexdigest()

    async def __call__(
        self, scope: Scope, headers: dict[str, str], receive: Receive, send: Send
    ) -> None:
        """Pass on, or ask for the key."""
        if self.key is None or self._has_session(headers):
            await self.app(scope, receive, _with_headers(send))
        else:
            await self._ask_for_key(scope, receive, send)

    def _has_session(self, headers: dict[str, str]) -> bool:
        try:
            cookies = SimpleCookie(headers.get("cookie", ""))
        except CookieError:
            return False
        return is_same_secret(cookies[COOKIE].value if COOKIE in cookies else "", self._session)

    async def _ask_for_key(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await refuse(scope, send, Refusal(403, "key", "a key is needed"))
        elif scope["method"] == "POST" and scope["path"] == "/login":
            given = parse_qs((await _body(receive)).decode("utf-8", "replace")).get("key", [""])[0]
            if is_same_secret(given.strip(), self.key or ""):
                cookie = f"{COOKIE}={self._session}; HttpOnly; SameSite=Strict; Path=/"
                more = [(b"set-cookie", cookie.encode()), (b"location", b"/")]
                await answer(send, 303, b"", [*HEADERS, *more])
                return
            await asyncio.sleep(WRONG_KEY_PAUSE_S)  # guessing is slow
            page = LOGIN.replace("NOTE", "That is not the key of this page.")
            await answer(send, 403, page.encode(), [*HEADERS, HTML])
        else:
            await answer(send, 401, LOGIN.replace("NOTE", "").encode(), [*HEADERS, HTML])


def guarded_page(app: App, *, hosts: frozenset[str], key: str | None) -> Guard:
    """The pages behind their guard.

    Args:
        hosts: names in the Host header that are answered.
        key: what visitors must give once; None: nothing.
    """
    return Guard(LoginDoor(app, key), hosts=hosts, refuse=refuse, has_websockets=True)


async def refuse(scope: Scope, send: Send, refusal: Refusal) -> None:
    """Say no in plain text; a websocket is closed."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": refusal.detail})
    else:
        plain = (b"content-type", b"text/plain")
        await answer(send, refusal.status, refusal.detail.encode(), [*HEADERS, plain])


async def _body(receive: Receive) -> bytes:
    data, is_more = b"", True
    while is_more and len(data) <= MAX_FORM:
        message = await receive()
        data += message.get("body", b"")
        is_more = message.get("more_body", False)
    return data[:MAX_FORM]


def _with_headers(send: Send) -> Send:
    async def wrapped(message: Scope) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *HEADERS]}
        await send(message)

    return wrapped
