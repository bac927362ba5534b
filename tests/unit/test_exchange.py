"""One exchange has an end and a size, whatever the server does with bytes, headers and time."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from trainer.errors import ConfigError, PreviewError
from trainer.exchange import BoundedClient, RefusedError, TooSlowError
from trainer.preview.base import PreviewRequest
from trainer.preview.openai import OpenAIPreviewBackend

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
Answer = Callable[[socket.socket, bytes], None]


@pytest.fixture
def raw() -> Iterator[Callable[[Answer], str]]:
    """A function that starts a server on the level of bytes, and returns its address."""
    listeners: list[socket.socket] = []

    def start(answer: Answer) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def serve(connection: socket.socket) -> None:
            try:
                answer(connection, connection.recv(65536))
            except OSError:
                pass  # the client went away, as it should
            finally:
                connection.close()

        def listen() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

        threading.Thread(target=listen, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield start
    for listener in listeners:
        listener.close()


def whole(body: bytes, *headers: bytes) -> bytes:
    lines = b"".join(header + b"\r\n" for header in headers)
    return OK + lines + b"Content-Length: %d\r\n\r\n" % len(body) + body


def client(url: str, **options: Any) -> BoundedClient:
    return BoundedClient(url, None, timeout_s=1.0, timeout_name="time-out", **options)


def drip_status(connection: socket.socket, _: bytes) -> None:
    for byte in b"HTTP/1.1 200 OK\r\n" * 1000:
        connection.sendall(bytes([byte]))
        time.sleep(0.2)


def drip_header(connection: socket.socket, _: bytes) -> None:
    connection.sendall(OK + b"X-A: ")
    while True:
        connection.sendall(b"a")
        time.sleep(0.2)


def drip_headers(connection: socket.socket, _: bytes) -> None:
    connection.sendall(OK)
    while True:
        connection.sendall(b"X-A: b\r\n")
        time.sleep(0.2)


def drip_body(connection: socket.socket, _: bytes) -> None:
    connection.sendall(OK + b"Transfer-Encoding: chunked\r\n\r\n")
    while True:
        connection.sendall(b"1\r\n \r\n")
        time.sleep(0.2)


def say_nothing(connection: socket.socket, _: bytes) -> None:
    time.sleep(60)


@pytest.mark.parametrize("fault", [drip_status, drip_header, drip_headers, drip_body, say_nothing])
def test_every_kind_of_slowness_ends_with_the_deadline_and_the_next_one_is_asked(
    raw: Callable[[Answer], str], fault: Answer
) -> None:
    is_slow = [True]

    def answer(connection: socket.socket, asked: bytes) -> None:
        if is_slow.pop() if is_slow else False:
            fault(connection, asked)
        connection.sendall(whole(b'{"a": 1}'))

    made = client(raw(answer))
    with pytest.raises(TooSlowError, match="did not answer within 1 s"):
        made.call("GET", "/x", time.monotonic() + 1.0)
    assert made.call("GET", "/x", time.monotonic() + 20.0) == (200, {"a": 1})
    made.close()


def test_a_drip_at_the_start_does_not_hold_training_up(
    raw: Callable[[Answer], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.preview.openai.START_TIMEOUT_S", 0.5)
    backend = OpenAIPreviewBackend(base_url=f"{raw(drip_header)}/v1", timeout=0.5)
    with pytest.raises(TooSlowError):
        backend.check()
    [result] = backend.preview_batch([PreviewRequest(prompt="hi")], 1)
    assert "did not answer" in (result.error_message or "")


def test_no_packing_is_asked_for(raw: Callable[[Answer], str]) -> None:
    seen: list[bytes] = []

    def answer(connection: socket.socket, asked: bytes) -> None:
        seen.append(asked.lower())
        connection.sendall(whole(b"{}"))

    client(raw(answer)).call("GET", "/x", time.monotonic() + 20.0)
    assert b"accept-encoding: identity\r\n" in seen[0]


@pytest.mark.parametrize(
    ("name", "packed"),
    [(b"gzip", gzip.compress(b'{"a": 1}')), (b"deflate", zlib.compress(b'{"a": 1}'))],
    ids=["gzip", "deflate"],  # packed bytes hold the time
)
def test_an_answer_that_is_packed_all_the_same_is_read(
    raw: Callable[[Answer], str], name: bytes, packed: bytes
) -> None:
    url = raw(lambda connection, _: connection.sendall(whole(packed, b"Content-Encoding: " + name)))
    assert client(url).call("GET", "/x", time.monotonic() + 20.0) == (200, {"a": 1})


@pytest.mark.parametrize(
    ("body", "header", "words"),
    [
        (
            gzip.compress(b" " * 3_000_000, mtime=0),
            b"Content-Encoding: gzip",
            "more than 1048576 bytes",
        ),
        (b"{}", b"Content-Encoding: gzip", "is no gzip"),
        (b"{}", b"Content-Encoding: br", "'br', which was not asked for"),
        (b"x" * 2_000_000, b"X-A: b", "more than 1048576 bytes"),
    ],
)
def test_what_cannot_be_read_is_an_error_of_bounded_size(
    raw: Callable[[Answer], str], body: bytes, header: bytes, words: str
) -> None:
    url = raw(lambda connection, _: connection.sendall(whole(body, header)))
    with pytest.raises(PreviewError, match=words):
        client(url).call("GET", "/x", time.monotonic() + 20.0)


def test_a_page_instead_of_a_reason_is_a_refusal_with_its_status(
    raw: Callable[[Answer], str],
) -> None:
    page = b"<html><body><h1>502 Bad Gateway</h1></body></html>"
    answer = b"HTTP/1.1 502 Bad\r\nContent-Length: %d\r\n\r\n" % len(page) + page
    url = raw(lambda connection, _: connection.sendall(answer))
    with pytest.raises(RefusedError, match="502 Bad Gateway") as caught:
        client(url).call("GET", "/x", time.monotonic() + 20.0)
    assert caught.value.status == 502


@pytest.mark.parametrize("body", [b"not json", json.dumps([1]).encode(), b'{"data": [1]}'])
def test_a_list_of_models_that_is_none_stops_the_start(
    raw: Callable[[Answer], str], body: bytes
) -> None:
    url = raw(lambda connection, _: connection.sendall(whole(body)))
    with pytest.raises(ConfigError, match="OpenAI-compatible"):
        OpenAIPreviewBackend(base_url=f"{url}/v1").check()
