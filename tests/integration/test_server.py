"""`trainer serve` with real processes on loopback."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.serving import Server, command, running_server
from trainer.child import usable_cores
from trainer.config.training_sections import ModelSection
from trainer.models.load import load_model, load_tokenizer
from trainer.preview.base import PreviewRequest
from trainer.preview.http import Remote3090Backend
from trainer.preview.local import LocalPreviewBackend
from trainer.server.inference_process import EngineProcess

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server("--model", "tiny") as found:
        yield found


@pytest.fixture(scope="module")
def local() -> LocalPreviewBackend:
    import torch

    section = ModelSection(model_path="tiny")
    return LocalPreviewBackend(
        model=load_model(section, dtype=torch.float32),
        tokenizer=load_tokenizer(section),
        max_new_tokens=12,
        temperature=0.0,
    )


def test_the_remote_backend_says_what_the_local_one_says(
    server: Server, local: LocalPreviewBackend
) -> None:
    remote = Remote3090Backend(
        host="127.0.0.1", port=server.port, max_new_tokens=12, temperature=0.0
    )
    requests = [
        PreviewRequest(prompt="max of 42 and 17?"),
        PreviewRequest(prompt="rev", prompt_token_ids=(5, 6, 7)),
    ]
    theirs, ours = (
        remote.preview_batch(requests, 3),
        [local.preview_batch([request], 3)[0] for request in requests],
    )
    assert [r.error_message for r in theirs] == [None, None]
    assert [r.raw_text for r in theirs] == [r.raw_text for r in ours]
    assert len(theirs[0].weights_id or "") == 64


def test_health_is_open_and_info_names_the_weights(server: Server) -> None:
    assert httpx.get(server.url + "/health").json() == {"status": "ok"}
    info = httpx.get(server.url + "/info").json()
    assert info["model_id"] == "tiny"
    assert info["active"]["weights_id"][:12] in server.line


def test_a_job_can_be_polled_and_cancelled(server: Server) -> None:
    body: dict[str, Any] = {"prompt_token_ids": [5, 6], "max_new_tokens": 4}
    answer = httpx.post(server.url + "/generate?wait=0", json=body)
    assert answer.status_code == 202
    job = httpx.get(f"{server.url}/jobs/{answer.json()['job_id']}?wait=20").json()
    assert job["status"] == "done"
    assert job["result"]["tokens_generated"] == 4
    long = httpx.post(server.url + "/generate?wait=0", json={**body, "max_new_tokens": 2000})
    httpx.delete(f"{server.url}/jobs/{long.json()['job_id']}")
    job = httpx.get(f"{server.url}/jobs/{long.json()['job_id']}?wait=10").json()
    assert job["status"] == "cancelled"


def test_unknown_fields_and_ids_are_refused(server: Server) -> None:
    for body in (
        {"prompt": "a", "path": "/etc/passwd"},
        {"prompt_token_ids": [10**6]},
        {"prompt": "a", "prompt_token_ids": [1]},
        {},
    ):
        assert httpx.post(server.url + "/generate", json=body).status_code == 422


def test_start_errors_are_one_line_and_exit_code_2(server: Server, tmp_path: Path) -> None:
    short = tmp_path / "key"
    short.write_text("short\n")
    for words, expected in (
        (["--port", str(server.port)], "cannot listen"),
        (["--host", "0.0.0.0"], "no key is set"),
        (["--api-key-file", str(short)], "at least 16"),
        (["--port", "0", "--model", "./nowhere"], "no such folder"),
    ):
        done = subprocess.run(command(*words), capture_output=True, text=True, timeout=120)
        assert done.returncode == 2, done.stderr
        assert expected in done.stderr
        assert "Traceback" not in done.stderr


def test_a_cpu_server_computes_with_the_threads_that_it_was_given_and_says_so() -> None:
    # The environment of these servers says 1; more threads than cores are not made.
    wanted = "2 threads" if usable_cores() > 1 else "1 thread"
    with running_server("--model", "tiny", "--threads", "2") as two:
        assert f" on cpu in fp32 with {wanted}, " in two.line


def test_a_server_takes_half_of_the_cores_where_nobody_says_how_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[dict[str, str]] = []

    class NoChild:
        def __init__(self, *_: object, environment: dict[str, str], **__: object) -> None:
            asked.append(environment)
            raise EOFError

    monkeypatch.setattr("trainer.server.inference_process.Child", NoChild)
    monkeypatch.setattr("trainer.child.usable_cores", lambda: 8)

    def threads(**options: int) -> str:
        with pytest.raises(EOFError):
            EngineProcess("tiny", "cpu", **options).start()  # type: ignore[arg-type]
        return asked[-1]["OMP_NUM_THREADS"]

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert threads() == "4"
    assert asked[-1]["OMP_WAIT_POLICY"] == "PASSIVE"
    assert threads(num_threads=3) == "3"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert threads() == "5"
    assert threads(num_threads=2) == "2"
