"""The client of a preview server: every failure is a result, in time, and says what to do."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from trainer.monitoring.preview_backend import create_preview_backend
from trainer.preview.base import PreviewBackend, PreviewRequest, PreviewResult
from trainer.preview.http import Remote3090Backend

Handle = Callable[[BaseHTTPRequestHandler], None]


@pytest.fixture
def serve() -> Iterator[Callable[[Handle], int]]:
    """A function that starts a real HTTP server on loopback and returns its port."""
    servers: list[ThreadingHTTPServer] = []

    def start(handle: Handle) -> int:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers.get("content-length", 0))
                self.body = json.loads(self.rfile.read(length) or b"null")
                handle(self)

            do_GET = do_DELETE = do_POST  # noqa: N815

            def log_message(self, *_: Any) -> None: ...

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return int(server.server_address[1])

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def reply(
    handler: Any, body: Any, status: int = 200, headers: dict[str, str] | None = None
) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(status)
    for name, value in {"content-length": str(len(data)), **(headers or {})}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(data)


def ask(port: int, **options: Any) -> PreviewResult:
    backend = Remote3090Backend(host="127.0.0.1", port=port, **{"timeout": 2, **options})
    try:
        return backend.preview("hi", "hello", 7, max_new_tokens=5)
    finally:
        backend.close()


def test_an_answer_becomes_a_result(serve: Callable[[Handle], int]) -> None:
    seen: dict[str, Any] = {}

    def handle(handler: Any) -> None:
        seen.update(handler.body, auth=handler.headers["authorization"], path=handler.path)
        reply(handler, {"text": "hello", "tokens_generated": 3, "generation_time_sec": 0.5})

    result = ask(
        serve(handle), api_key="k1", stop=("##",), compare=lambda a, b: a == b, model_id="m"
    )
    assert (result.text, result.step, result.matches) == ("hello", 7, True)
    assert (result.tokens_generated, result.tokens_per_sec) == (3, 6.0)
    assert result.weights_id is None  # unverified: the server did not say
    assert (seen["path"], seen["prompt"], seen["max_new_tokens"]) == ("/generate", "hi", 5)
    assert (seen["auth"], seen["stop"], seen["model_id"]) == ("Bearer k1", ["##"], "m")


def test_exact_ids_are_sent_as_ids(serve: Callable[[Handle], int]) -> None:
    seen: list[Any] = []

    def handle(handler: Any) -> None:
        seen.append(handler.body)
        reply(handler, {"text": "x", "weights_id": "abc"})

    backend = Remote3090Backend(host="127.0.0.1", port=serve(handle))
    request = PreviewRequest(prompt="shown", prompt_token_ids=(4, 5), prompt_id="validation-1")
    [result] = backend.preview_batch([request], 3)
    assert seen[0]["prompt_token_ids"] == [4, 5]
    assert "prompt" not in seen[0]
    assert (result.weights_id, result.prompt_id) == ("abc", "validation-1")
    backend.close()


def test_a_job_is_polled_until_it_is_done(serve: Callable[[Handle], int]) -> None:
    polls: list[str] = []

    def handle(handler: Any) -> None:
        if handler.command == "POST":
            return reply(handler, {"job_id": "j-1", "status": "queued"}, 202)
        polls.append(handler.path)
        state = {"status": "running"}
        if len(polls) > 2:
            state = {"status": "done", "result": {"text": "late"}}  # type: ignore[dict-item]
        return reply(handler, state)

    assert ask(serve(handle)).text == "late"
    assert len(polls) == 3
    assert polls[0].startswith("/jobs/j-1?wait=")


def test_a_job_that_never_ends_is_given_up_in_time_and_cancelled(
    serve: Callable[[Handle], int],
) -> None:
    deleted = threading.Event()

    def handle(handler: Any) -> None:
        if handler.command == "POST":
            return reply(handler, {"job_id": "j1"}, 202)
        if handler.command == "DELETE":
            deleted.set()
        return reply(handler, {"status": "running"})

    result = ask(serve(handle), timeout=0.5)
    assert "did not answer within 0.5 s" in (result.error_message or "")
    assert deleted.wait(5)


def test_a_busy_server_is_asked_again_when_it_says_so(serve: Callable[[Handle], int]) -> None:
    calls: list[float] = []

    def handle(handler: Any) -> None:
        calls.append(time.monotonic())
        if len(calls) == 1:
            return reply(handler, {}, 503, {"retry-after": "0.3"})
        return reply(handler, {"text": "ok"})

    assert ask(serve(handle), timeout=10).text == "ok"
    assert calls[1] - calls[0] >= 0.3


CASES: dict[str, tuple[Handle, str]] = {
    "garbage": (lambda h: reply(h, b"<html>"), "not JSON"),
    "wrong schema": (lambda h: reply(h, {"answer": "x"}), "another shape"),
    "wrong type": (lambda h: reply(h, {"text": 5}), "another shape"),
    "a list": (lambda h: reply(h, [1]), "another shape"),
    "deep nesting": (lambda h: reply(h, b"[" * 100_000), "not JSON"),
    "wrong key": (lambda h: reply(h, {}, 401), "ULTIMATE_TRAINER_KEY"),
    "refused": (lambda h: reply(h, {"detail": "other tokenizer"}, 422), "other tokenizer"),
    "server error": (lambda h: reply(h, {"detail": "boom"}, 500), "boom"),
    "redirect": (lambda h: reply(h, b"", 307, {"location": "http://127.0.0.1:1/"}), "redirect"),
    "too busy": (lambda h: reply(h, {}, 429, {"retry-after": "3600"}), "busy"),
    "no job id": (lambda h: reply(h, {"job_id": "../../etc"}, 202), "no usable job_id"),
    "large": (lambda h: reply(h, b'"' + b"x" * (2 << 20) + b'"'), "more than 1048576 bytes"),
    "hangs up": (lambda h: h.connection.close(), "cannot be reached"),
}


@pytest.mark.parametrize("case", CASES)
def test_every_failure_is_a_result_that_says_what_to_do(
    serve: Callable[[Handle], int], case: str
) -> None:
    handle, words = CASES[case]
    result = ask(serve(handle))
    assert not result.ok
    assert words in (result.error_message or "")
    assert (result.text, result.finish_reason, result.golden_answer) == ("", "error", "hello")


@pytest.mark.parametrize("trickle", [False, True], ids=["silent", "trickles"])
def test_a_server_that_never_finishes_is_given_up_in_time(
    serve: Callable[[Handle], int], trickle: bool
) -> None:
    def handle(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("content-length", "100000")
        handler.end_headers()
        for _ in range(100):
            time.sleep(0.1)
            if trickle:
                handler.wfile.write(b" ")

    started = time.monotonic()
    result = ask(serve(handle), timeout=0.6)
    assert "did not answer within" in (result.error_message or "")
    assert time.monotonic() - started < 8


def test_a_dead_server_is_asked_once_for_a_whole_batch() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    backend = create_preview_backend("remote_3090", host="127.0.0.1", port=port)
    assert isinstance(backend, PreviewBackend)
    results = backend.preview_batch([PreviewRequest(prompt=str(n)) for n in range(3)], 1)
    assert [result.prompt for result in results] == ["0", "1", "2"]
    assert all("cannot be reached" in (result.error_message or "") for result in results)
    backend.close()


def test_the_key_comes_from_the_environment(
    serve: Callable[[Handle], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def handle(handler: Any) -> None:
        seen.append(handler.headers["authorization"])
        reply(handler, {"text": "x"})

    monkeypatch.setenv("ULTIMATE_TRAINER_KEY", "from-env")
    ask(serve(handle))
    assert seen == ["Bearer from-env"]
