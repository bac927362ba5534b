"""A preview backend of one's own answers a run as the built-in ones do."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from trainer.core import TrainerEngine
from trainer.monitoring import preview_backend
from trainer.preview import PreviewBackend, PreviewRequest, PreviewResult

pytestmark = pytest.mark.slow


class EchoBackend(PreviewBackend):
    """A backend with weights of its own: it repeats the prompt."""

    backend_type = "echo"

    def __init__(self, **options: Any) -> None:
        """It has no options."""

    def preview_batch(self, requests: list[PreviewRequest], step: int) -> list[PreviewResult]:
        return [
            PreviewResult(step=step, prompt=one.prompt, text=one.prompt, backend_type="echo")
            for one in requests
        ]


def test_a_backend_that_is_added_to_the_registry_is_asked_by_a_run(
    job: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(preview_backend.BACKENDS, "echo", EchoBackend)
    config = job()
    monitoring = config.monitoring.model_copy(update={"preview_backend": "echo"})
    result = TrainerEngine().run_job(config.model_copy(update={"monitoring": monitoring}))
    assert result.success, result.error_message
    lines = (result.output_dir / "previews.jsonl").read_text().splitlines()
    answers = [json.loads(line) for line in lines]
    assert answers
    assert all(one["text"] == one["prompt"] for one in answers if not one["error_message"])
    assert max(one["step"] for one in answers if not one["error_message"]) == result.global_step
