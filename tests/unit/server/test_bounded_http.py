"""Limits of HTTP itself, before keys and routes: heads, time, connections."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import uvicorn

from trainer.server import bounded_http
from trainer.server.auth import KeyDoor, guarded

OK = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Reads the body, and answers with its length."""
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    if scope["path"] == "/slow":
        await asyncio.sleep(0.6)
    body = str(size).encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
def port() -> Iterator[int]:
    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(512)
        config = uvicorn.Config(
            guarded(KeyDoor(app)),
            http=bounded_http.BoundedProtocol,
            ws="none",
            lifespan="off",
            log_level="error",
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join()


def ask(port: int, data: bytes, then: bytes = b"") -> bytes:
    """Send bytes and read until the other side closes or answers."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
        try:
            raw.sendall(data)
            if then:
                raw.sendall(then)
            return raw.recv(65536)
        except (ConnectionError, BrokenPipeError):
            return b"reset"


def is_well(port: int) -> bool:
    return ask(port, OK).startswith(b"HTTP/1.1 200")


def endless(port: int, first: bytes, piece: bytes, times: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
        try:
            raw.sendall(first)
            for _ in range(times):
                raw.sendall(piece)
            return raw.recv(65536)
        except (ConnectionError, BrokenPipeError):
            return b"reset"


HEAD = b"POST /x HTTP/1.1\r\nHost: 127.0.0.1\r\n"
ENDLESS = {
    "headers": (HEAD, b"X-A: " + b"a" * 8000 + b"\r\n"),
    "one header": (HEAD + b"X-A: ", b"a" * 65536),
    "a header's name": (HEAD, b"a" * 65536),
    "the address": (b"GET /", b"a" * 65536),
    "the query": (b"GET /x?", b"a" * 65536),
    "the method": (b"", b"A" * 65536),
    "trailers": (
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n",
        b"X-A: " + b"a" * 8000 + b"\r\n",
    ),
    "one trailer": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nX-A: ", b"a" * 65536),
    "a chunk's extension": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;", b"a" * 65536),
    "requests at once": (b"", HEAD.replace(b"/x", b"/slow") + b"Content-Length: 0\r\n\r\n" * 1),
}


@pytest.mark.parametrize("what", ENDLESS)
def test_nothing_without_end_is_read_to_the_end(port: int, what: str) -> None:
    first, piece = ENDLESS[what]
    before = psutil.Process().memory_info().rss
    answer = endless(port, first, piece, max(1, (32 << 20) // len(piece)))
    assert answer == b"reset" or answer[9:12] in (b"431", b"400", b"200"), answer[:200]
    assert psutil.Process().memory_info().rss - before < 12 << 20
    assert is_well(port)


def test_a_head_just_below_the_limit_is_read(port: int) -> None:
    big = b"X-A: " + b"a" * (bounded_http.MAX_HEAD - 200) + b"\r\n"
    assert ask(port, OK[:-2] + big + b"\r\n").startswith(b"HTTP/1.1 200")
    over = b"X-A: " + b"a" * bounded_http.MAX_HEAD + b"\r\n"
    answer = ask(port, OK[:-2] + over + b"\r\n")
    assert answer.startswith(b"HTTP/1.1 431")
    assert b"application/json" in answer


@pytest.mark.parametrize("data", [b"", b"GET /x HTTP/1.1\r\nX-", b"\r\n"])
def test_a_head_that_does_not_come_ends_the_connection(
    port: int, monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    monkeypatch.setattr(bounded_http, "HEAD_TIMEOUT_S", 0.3)
    answer = ask(port, data)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 408")


def test_a_head_that_comes_byte_by_byte_has_the_same_time(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded_http, "HEAD_TIMEOUT_S", 0.4)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
        sent = 0
        with contextlib.suppress(ConnectionError, BrokenPipeError):
            for byte in b"GET /x HTTP/1.1\r\nX-A: " + b"a" * 500:
                raw.sendall(bytes([byte]))
                sent += 1
                time.sleep(0.05)
                raw.settimeout(0.001)
                with contextlib.suppress(TimeoutError):
                    assert raw.recv(100)
                    break
                raw.settimeout(10)
    assert sent < 100


def test_a_body_that_stops_coming_ends_the_connection(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded_http, "BODY_IDLE_S", 0.3)
    assert ask(port, HEAD + b"Content-Length: 100\r\n\r\nabc") in (b"", b"reset")
    assert is_well(port)


def test_a_slow_answer_is_waited_for(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_http, "HEAD_TIMEOUT_S", 0.2)
    monkeypatch.setattr(bounded_http, "BODY_IDLE_S", 0.2)
    answer = ask(port, HEAD.replace(b"/x", b"/slow") + b"Content-Length: 2\r\n\r\nab")
    assert answer.startswith(b"HTTP/1.1 200")


def test_connections_that_ask_nothing_make_room_for_one_that_does(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded_http, "MAX_CONNECTIONS", 20)
    files = psutil.Process().num_fds()
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            one = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5))
            with contextlib.suppress(ConnectionError):
                one.sendall(b"GET /x HTTP/1.1\r\nX-")
        assert is_well(port)
        assert psutil.Process().num_fds() - files <= 100 + 20 + 5


def test_requests_one_behind_the_other_on_one_connection_are_answered(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
        for size in (0, 5, 100_000, 3):
            raw.sendall(HEAD + f"Content-Length: {size}\r\n\r\n".encode() + b"x" * size)
            answer = raw.recv(65536)
            assert answer.endswith(str(size).encode())
        chunks = b"3\r\nabc\r\n" * 3 + b"0\r\n\r\n"
        raw.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + OK)
        time.sleep(0.3)
        assert raw.recv(65536).count(b"HTTP/1.1 200") == 2


def test_large_bodies_share_a_budget_and_small_ones_are_taken_beside_them() -> None:
    """What is held is given back, however a request ends."""
    door = KeyDoor(app, max_held=1 << 20)
    guard = guarded(door)

    async def once(sizes: list[int]) -> list[Any]:
        async def ask(size: int) -> Any:
            left, sent = [size], []

            async def receive() -> Any:
                await asyncio.sleep(0.01)
                piece = min(left[0], 100_000)
                left[0] -= piece
                return {"type": "http.request", "body": b"x" * piece, "more_body": left[0] > 0}

            async def send(message: Any) -> None:
                sent.append(message)

            headers = [(b"host", b"127.0.0.1")]
            scope = {"type": "http", "path": "/slow", "headers": headers}
            try:
                await guard(scope, receive, send)
            except Exception as error:
                return getattr(error, "status_code", error)
            return sent[0]["status"]

        return await asyncio.gather(*map(ask, sizes))

    assert asyncio.run(once([900_000, 900_000, 10_000])).count(503) == 1
    assert door.held == 0
    assert asyncio.run(once([900_000, 10_000])) == [200, 200]


@pytest.mark.parametrize(
    ("path", "size", "status"),
    [
        ("/previews", 17 << 20, 413),  # parsing so much JSON would hold everybody up
        ("/v1/chat/completions", 17 << 20, 413),
        ("/weights", 17 << 20, 413),
        ("/weights/u1/parts/0", 17 << 20, None),
        ("/weights/u1/parts/0", (64 << 20) + 1, 413),
        ("/previews", 15 << 20, None),
    ],
)
def test_only_parts_of_weights_may_be_long(path: str, size: int, status: int | None) -> None:
    headers = {"host": "127.0.0.1", "content-length": str(size)}
    refusal = KeyDoor(app).refusal(path, headers)
    assert (refusal.status if refusal is not None else None) == status
