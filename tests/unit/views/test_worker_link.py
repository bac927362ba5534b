"""Asking the worker of a run; a run folder is trusted with this machine only."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import PreviewError
from trainer.preview.base import ServerAnswer
from trainer.views.page.worker_link import (
    WorkerAddress,
    absence_words,
    ask_worker,
    check_own,
    find_worker,
    whose_words,
)

KEY = "0123456789abcdef"


class Place(HTTPServer):
    """A server on loopback that remembers what it was asked and answers as it was told."""

    status, answer, headers = 200, b'{"text": "4", "step": 7}', {}  # type: ignore[var-annotated]

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, str], Any]] = []
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def worker(self) -> WorkerAddress:
        return WorkerAddress(url=f"http://127.0.0.1:{self.server_port}")


class Handler(BaseHTTPRequestHandler):
    server: Place

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.asked.append((self.path, dict(self.headers), json.loads(body)))
        self.send_response(self.server.status)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(self.server.answer)

    def log_message(self, *words: object) -> None:
        """Say nothing."""


@pytest.fixture
def place() -> Iterator[Place]:
    server = Place()
    yield server
    server.shutdown()
    server.server_close()


def test_a_prompt_goes_out_with_the_key_of_the_file(place: Place, tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    for content in (KEY + "\n", f"publish: other-key-0123456\ngenerate: {KEY}\n"):
        key_file.write_text(content)
        worker = place.worker.model_copy(update={"key_file": str(key_file), "system_prompt": "Be."})
        reply = ask_worker(worker, "2+2?", max_new_tokens=9, temperature=0.5)
        assert (reply.text, reply.step) == ("4", 7)
        path, headers, body = place.asked[-1]
        assert path == "/generate"
        assert headers["Authorization"] == f"Bearer {KEY}"
        assert body == {
            "prompt": "2+2?",
            "system_prompt": "Be.",
            "max_new_tokens": 9,
            "temperature": 0.5,
        }


def test_a_file_that_is_no_key_file_is_sent_nowhere(place: Place, tmp_path: Path) -> None:
    secret = tmp_path / "id_rsa"
    secret.write_text("-----BEGIN PRIVATE KEY-----\nabc\n-----END PRIVATE KEY-----\n")
    worker = place.worker.model_copy(update={"key_file": str(secret)})
    with pytest.raises(PreviewError, match="a key file holds one line"):
        ask_worker(worker, "hi")
    assert place.asked == []


@pytest.mark.parametrize(
    ("status", "answer", "words"),
    [
        (429, b"{}", "busy"),
        (503, b"{}", "busy"),
        (401, b"{}", "refuses the key"),
        (500, b"oh no", r"HTTP 500\): oh no"),
        (200, b"not json", "HTTP 200"),
        (200, b'{"no": "text"}', "HTTP 200"),
        (200, b"x" * (2 << 20), "more than"),
        (302, b"", "HTTP 302"),
    ],
)
def test_what_goes_wrong_is_said(place: Place, status: int, answer: bytes, words: str) -> None:
    place.status, place.answer = status, answer
    place.headers = {"location": "http://192.0.2.1/"} if status == 302 else {}
    with pytest.raises(PreviewError, match=words):
        ask_worker(place.worker, "hi")


def test_nobody_there_is_said(place: Place) -> None:
    worker = place.worker
    place.shutdown()
    place.server_close()
    with pytest.raises(PreviewError, match="cannot be reached"):
        ask_worker(worker, "hi")
    place.serve_forever = lambda: None  # type: ignore[method-assign]


def reason_of(folder: Path, content: Any, *hosts: str) -> str:
    (folder / "worker.json").write_text(json.dumps(content))
    return find_worker(folder, hosts).reason


def test_why_nobody_can_be_asked(tmp_path: Path) -> None:
    assert "names no preview server" in find_worker(tmp_path).reason
    assert "is not a valid worker file" in reason_of(tmp_path, ["x"])
    assert "is not a valid worker file" in reason_of(tmp_path, {"url": "http://127.0.0.1:99999999"})
    assert "no usable address" in reason_of(tmp_path, {"url": "file:///etc/passwd"})
    assert "no usable address" in reason_of(tmp_path, {"url": "http://u:p@127.0.0.1:1"})
    remote = {"url": "http://192.168.1.20:8765"}
    assert "--allow-worker 192.168.1.20" in reason_of(tmp_path, remote)
    assert reason_of(tmp_path, remote, "192.168.1.20") == ""
    ended = {"url": "http://127.0.0.1:8765", "pid": 2**22 + 1}
    assert "has ended" in reason_of(tmp_path, ended)
    assert reason_of(tmp_path, {**ended, "pid": os.getpid()}) == ""


def config_of(folder: Path, backend: str) -> None:
    config = {"monitoring": {"preview_backend": backend}}
    (folder / "run.json").write_text(json.dumps({"config": config}))


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        ("local", "made in the training process"),
        ("sidecar", "(sidecar) is not ready yet"),
        ("remote_3090", "(remote_3090) is not ready yet"),
        ("openai", "does not have this run's weights"),
    ],
)
def test_who_answers_while_a_run_trains_is_said(
    made_up_run: Callable[..., Any], backend: str, words: str
) -> None:
    run = made_up_run()
    run.step(1)
    config_of(run.folder, backend)
    assert words in absence_words(run.read())


def test_a_run_that_ended_names_the_command_that_asks_its_weights(
    made_up_run: Callable[..., Any],
) -> None:
    run = made_up_run()
    config_of(run.folder, "sidecar")
    run.end("completed", 9)
    assert absence_words(run.read()) == "the run has ended, and its sidecar with it; " + (
        "it left no weights"
    )
    (run.folder / "final_model").mkdir()
    assert absence_words(run.reader).endswith(
        f"ask its weights with: trainer chat {run.folder}, "
        f"or here after: trainer monitor {run.folder} --ask"
    )


def test_an_answer_by_weights_of_another_run_is_refused(
    made_up_run: Callable[..., Any],
) -> None:
    run = made_up_run()
    run.preview(10, [True], weights_id="a" * 64)
    run.step(30)
    reader = run.read()
    worker = WorkerAddress(url="http://127.0.0.1:8765", run="mine-1")

    def reply(name: str | None, weights_id: str | None) -> ServerAnswer:
        return ServerAnswer(text="4", run=name, step=2, weights_id=weights_id)

    check_own(worker, reply("mine-1", "b" * 64), reader)
    check_own(worker, reply(None, "b" * 64), reader)  # weights that nobody published
    check_own(worker, reply("mine-0", "a" * 64), reader)  # of this run before it was resumed
    with pytest.raises(PreviewError, match=r"another run now \(other-1, step 2\).*ask again when"):
        check_own(worker, reply("other-1", "b" * 64), reader)
    unnamed = worker.model_copy(update={"run": None})
    for weights_id in ("b" * 64, None):
        with pytest.raises(PreviewError, match="another run now"):
            check_own(unnamed, reply("other-1", weights_id), reader)
    run.end("completed", 30)
    (run.folder / "final_model").mkdir()
    with pytest.raises(PreviewError, match=r"has ended; ask its weights with: trainer chat"):
        check_own(worker, reply("other-1", "b" * 64), run.read())


def test_the_step_of_the_weights_is_set_beside_where_the_run_is(
    made_up_run: Callable[..., Any],
) -> None:
    run = made_up_run()
    run.step(30)
    reply = ServerAnswer(text="4", run="mine-1", step=20, weights_id="b" * 64)
    words = "Answered by the weights of step 20 (weights bbbbbbbbbbbb)"
    assert whose_words(reply, run.read()) == f"{words}; training is at step 30."
    run.end("completed", 30)
    assert whose_words(reply, run.read()) == f"{words}; the run ended at step 30."
    at_end = reply.model_copy(update={"step": 30})
    assert whose_words(at_end, run.reader) == f"{words.replace('20', '30')}."
