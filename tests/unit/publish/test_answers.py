"""The canary decides what is shown; what the trainer knows itself is not taken from a worker."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainer.preview.base import PreviewRequest, PreviewResult, PreviewSample
from trainer.publish.identity import Canary, results_of
from trainer.publish.publisher import FAILURES_TO_OPEN, MAX_OPEN_PAUSE_S, Breaker

REQUEST = PreviewRequest(
    prompt="2+2?",
    golden_answer="4",
    prompt_id="validation-1",
    prompt_token_ids=(1, 2),
    golden_token_ids=(4, 5),
)


def judged(canary_value: float | None, *, mine: float | None = -3.0, **more: Any) -> PreviewResult:
    theirs = PreviewResult(step=9, prompt="other", text="4", golden_answer="5", **more)
    answer = {
        "weights_id": "a" * 64,
        "results": [theirs.model_dump()],
        "golden_logprobs": [[-1.0, -2.0]],
        "canary_logprob": canary_value,
    }
    canary = Canary((0,), 2, 1e-4, lambda: torch.zeros(2))
    [result] = results_of(
        answer,
        [REQUEST],
        9,
        canary=(canary if mine is not None else None, mine),
        matches=str.__eq__,
        parts_of=lambda ids: {"golden_tokens": tuple(map(str, ids))},
        backend_type="sidecar",
        visible_s=0.5,
    )
    return result


def test_samples_that_a_worker_made_up_are_left_out() -> None:
    made_up = (PreviewSample(text="4", matches=True),)
    assert judged(-3.0, samples=made_up).samples == ()


def test_an_agreeing_canary_verifies() -> None:
    result = judged(-3.0001)
    assert (result.weights, result.ok, result.matches) == ("verified", True, True)
    assert (result.prompt, result.golden_answer, result.step) == ("2+2?", "4", 9)
    assert (result.golden_tokens, result.golden_logprobs) == (("4", "5"), (-1.0, -2.0))


@pytest.mark.parametrize("value", [-3.01, None, float("nan"), float("inf")])
def test_a_canary_that_differs_hides_the_answer(value: float | None) -> None:
    result = judged(value)
    assert not result.ok
    assert (result.text, result.weights) == ("", "unverified")


def test_without_a_golden_row_an_answer_is_published_but_not_verified() -> None:
    assert judged(None, mine=None).weights == "published"


def test_impossible_counts_and_flags_of_a_worker_are_left_out() -> None:
    result = judged(
        -3.0,
        health=("empty", "<script>"),
        tokens_per_sec=float("nan"),
        generation_time_sec=float("inf"),
        tokens_generated=-5,
    )
    assert result.health == ("empty",)
    assert (result.tokens_per_sec, result.generation_time_sec, result.tokens_generated) == (0, 0, 0)


def test_the_breaker_opens_after_three_failures_and_waits_longer_each_time() -> None:
    breaker = Breaker()
    pauses = [breaker.failed() for _ in range(20)]
    assert breaker.is_open
    assert max(pauses[: FAILURES_TO_OPEN - 1]) < 2
    assert 20 < pauses[FAILURES_TO_OPEN - 1] < 40
    assert 0.8 * MAX_OPEN_PAUSE_S <= pauses[-1] <= 1.2 * MAX_OPEN_PAUSE_S
