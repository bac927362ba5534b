"""A run that could not show a single answer is complete, and says so where one looks last."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.preview.local import LocalPreviewBackend
from trainer.views.words import preview_failure_words

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def dead_server() -> dict[str, Any]:
    url = f"http://127.0.0.1:{free_port()}/v1"
    return {"preview_backend": "openai", "openai_base_url": url, "openai_model": "m"}


def test_a_run_whose_server_was_never_there_says_so(train: Callable[..., Any]) -> None:
    result = train(monitoring={**dead_server(), "num_eval_samples": 2})
    assert (result.success, result.exit_code, result.state) == (True, 0, "completed")
    counts = result.summary["previews"]
    assert (counts["all_failed"], counts["done"], counts["verified"]) == (True, 0, 0)
    assert counts["asked"] == counts["failed"] + counts["superseded"] > 0
    words = preview_failure_words(result.summary) or ""
    assert words.startswith(f"all {counts['failed']} previews failed")
    assert "cannot be reached" in words


def test_a_run_whose_own_previews_fail_says_so(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(LocalPreviewBackend, "_answer", out_of_memory)
    result = train(monitoring={"num_eval_samples": 2, "final_eval_prompts": 2})
    assert (result.success, result.summary["previews"]["all_failed"]) == (True, True)
    words = preview_failure_words(result.summary) or ""
    assert "out of memory" in words
    assert "all 2 answers of the final evaluation failed" in words


def test_a_backend_that_raises_does_not_end_training(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = LocalPreviewBackend.preview_batch

    def raises_at_the_end(self: Any, requests: Any, step: int, **more: Any) -> Any:
        if step == 12:
            raise RuntimeError("no idea")
        return answered(self, requests, step, **more)

    monkeypatch.setattr(LocalPreviewBackend, "preview_batch", raises_at_the_end)
    result = train()
    counts = result.summary["previews"]
    assert (result.success, counts["all_failed"], counts["last_step_failed"]) == (True, False, True)
    words = preview_failure_words(result.summary)
    assert words == "all previews of the last step failed: RuntimeError: no idea"


def test_runs_without_failures_or_without_previews_say_nothing(train: Callable[..., Any]) -> None:
    assert preview_failure_words(train("a").summary) is None
    assert preview_failure_words(train("b", monitoring={"inference_interval": 0}).summary) is None


@pytest.mark.parametrize("display", ["plain", pytest.param("json", marks=pytest.mark.long)])
def test_the_last_line_of_the_terminal_says_it_and_no_artefact_has_the_password(
    cli: Callable[..., Any], qa_file: Path, tmp_path: Path, display: str
) -> None:
    out, secret = tmp_path / "out", "s3cr3t-passw0rd"
    url = f"http://me:{secret}@127.0.0.1:{free_port()}/v1?api_key={secret}-2"
    words = ["train", "--dataset", qa_file, "--model", "tiny", "--max-steps", "2", "--fp32"]
    words += ["--preview-backend", "openai", "--monitoring.openai_base_url", url]
    words += ["--monitoring.openai_model", "m", "--monitoring.display", display, "--output", out]
    done = cli(*map(str, words))
    assert done.returncode == 0, done.stderr
    last = done.stdout.strip().splitlines()[-1]
    if display == "json":
        assert json.loads(last)["summary"]["previews"]["all_failed"] is True
    else:
        assert "previews failed" in last
    assert secret not in done.stdout + done.stderr
    texts = [path.read_bytes() for path in out.rglob("*") if path.is_file()]
    assert len(texts) > 5
    assert not any(secret.encode() in text for text in texts)
    assert any(b"//***@127.0.0.1" in text for text in texts)
