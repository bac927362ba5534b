"""Guard: nothing reaches a web application of this program that this has not let through.

Names in Host and Origin are checked here, for the preview server and for the live page alike. What
a visitor must show is the business of a door: a function of (scope, headers, receive, send) that
answers or passes on.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from trainer.net import is_loopback

Scope = MutableMapping[str, Any]

Receive = Callable[[], Awaitable[Scope]]

Send = Callable[[Scope], Awaitable[None]]

App = Callable[[Scope, Receive, Send], Awaitable[None]]

Door = Callable[[Scope, dict[str, str], Receive, Send], Awaitable[None]]


class Refusal(NamedTuple):
    """Why somebody is not let through."""

    status: int
    code: str
    detail: str


@dataclass
class Guard:
    """ASGI middleware around everything."""

    door: Door
    hosts: frozenset[str]
    """Names in the Host header that are answered: a name that somebody else's DNS points here is
    not among them."""
    refuse: Callable[[Scope, Send, Refusal], Awaitable[None]]
    """Writes a refusal in the words and form of the application."""
    takes_addresses: bool = False
    """Whether any IP address will do as Host: unlike a name, it cannot be rebound."""
    has_websockets: bool = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or hand over to the door."""
        if scope["type"] == "lifespan":
            await self.door(scope, {}, receive, send)
            return
        if scope["type"] != "http" and not self.has_websockets:
            return
        pairs = [(name.decode("latin-1").lower(), value) for name, value in scope["headers"]]
        headers = {name: value.decode("latin-1") for name, value in pairs}
        refusal = self._refusal([name for name, _ in pairs], headers)
        if refusal is not None:
            await self.refuse(scope, send, refusal)
        else:
            await self.door(scope, headers, receive, send)

    def _refusal(self, names: list[str], headers: dict[str, str]) -> Refusal | None:
        if names.count("host") > 1 or names.count("authorization") > 1:
            return Refusal(421, "host", "a Host or Authorization header that comes twice")
        host = headers.get("host", "")
        if not self._is_ours(host_name(host)):
            return Refusal(421, "host", "this Host is not served here")
        origin = headers.get("origin")
        # Browsers say which page asks, for every websocket and every form.
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            return Refusal(403, "origin", "requests from other web pages are refused")
        return None

    def _is_ours(self, name: str) -> bool:
        if name in self.hosts:
            return True
        return self.takes_addresses and (is_loopback(name) or _is_address(name))


def host_name(header: str) -> str:
    """The name in a Host header, without port and brackets."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower()


def is_same_secret(given: str, secret: str) -> bool:
    """Compare in a time that says nothing of where they differ."""
    return hmac.compare_digest(given.encode(), secret.encode())


async def answer(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    """Send a whole response; its length is added to `headers`."""
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
