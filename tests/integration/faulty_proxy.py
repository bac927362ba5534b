"""A proxy before a real preview server that does one thing wrong, at one place, once or always."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = Callable[["Exchange"], None]


class Exchange(BaseHTTPRequestHandler):
    """One request on its way; `relay` passes it on, faults do otherwise."""

    protocol_version = "HTTP/1.1"
    server: Proxy

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def _any(self) -> None:
        length = int(self.headers.get("content-length", 0))
        if self.server.fault_for(self) is reset_mid_body and length:
            self.rfile.read(length // 2)
            reset(self)
            return
        self.body = self.rfile.read(length)
        (self.server.fault_for(self, take=True) or Exchange.relay)(self)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = _any  # noqa: N815

    def relay(self) -> None:
        """Pass the request on and the answer back."""
        self.answer(*self.forward())

    def forward(self) -> tuple[int, bytes]:
        """What the real server answers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.server.target, timeout=60)
        headers = {k: v for k, v in self.headers.items() if k.lower() != "host"}
        connection.request(self.command, self.path, self.body, headers)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        return answer.status, data

    def answer(self, status: int, data: bytes, **headers: str) -> None:
        """Send an answer."""
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(data)


@dataclass(eq=False)
class Proxy(ThreadingHTTPServer):
    """Listens on a free port of loopback."""

    target: int
    pattern: str
    fault: Fault
    times: int
    hits: int = field(default=0, init=False)

    daemon_threads = True

    def __post_init__(self) -> None:
        ThreadingHTTPServer.__init__(self, ("127.0.0.1", 0), Exchange)
        self._lock = threading.Lock()

    def handle_error(self, *_: Any) -> None:
        """Clients that go away are expected here."""

    def fault_for(self, exchange: Exchange, *, take: bool = False) -> Fault | None:
        """The fault of this request, if it is still due."""
        with self._lock:
            name = f"{exchange.command} {exchange.path}"
            if not re.search(self.pattern, name) or self.hits >= self.times:
                return None
            self.hits += take or self.fault is reset_mid_body
            return self.fault


@contextlib.contextmanager
def faulty_proxy(target: int, pattern: str, fault: Fault, times: int = 10**6) -> Iterator[Proxy]:
    """A proxy to `target` with a fault in the requests that match `METHOD path`."""
    proxy = Proxy(target, pattern, fault, times)
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()


# ---- faults


def reset(exchange: Exchange) -> None:
    """Close the connection as a crashed machine does."""
    linger = struct.pack("ii", 1, 0)
    exchange.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    exchange.close_connection = True
    exchange.connection.close()


def reset_mid_body(exchange: Exchange) -> None:
    """Read half of the body, then close; done while reading."""


def hang(exchange: Exchange) -> None:
    """Never answer."""
    time.sleep(8)
    exchange.close_connection = True


def garbage(exchange: Exchange) -> None:
    """Bytes that are no JSON."""
    exchange.answer(200, b"\x00\xff<html>")


def wrong_schema(exchange: Exchange) -> None:
    """JSON of another kind."""
    exchange.answer(200, json.dumps({"results": [[["deep"]]], "weights_id": 7}).encode())


def redirect(exchange: Exchange) -> None:
    """Somewhere else."""
    exchange.answer(302, b"{}", location="http://127.0.0.1:1/")


def one_gibibyte(exchange: Exchange) -> None:
    """An answer without end; it counts how much was taken."""
    exchange.send_response(200)
    exchange.send_header("content-length", str(1 << 30))
    exchange.end_headers()
    with contextlib.suppress(OSError):
        for _ in range(1 << 10):
            exchange.wfile.write(bytes(1 << 20))
    exchange.close_connection = True


def flipped_bit(exchange: Exchange) -> None:
    """A part arrives with one bit changed; its digest does not."""
    changed = bytearray(exchange.body)
    changed[len(changed) // 2] ^= 1
    exchange.body = bytes(changed)
    exchange.relay()


def edited(**changes: Any) -> Fault:
    """The real answer with some values replaced (a function is applied to the old value)."""

    def fault(exchange: Exchange) -> None:
        status, data = exchange.forward()
        found = json.loads(data)
        for name, value in changes.items():
            found[name] = value(found[name]) if callable(value) else value
        exchange.answer(status, json.dumps(found).encode())

    return fault
