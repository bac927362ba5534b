"""What the publisher asks of drift, and what it believes."""

from __future__ import annotations

import io
import json
import queue
from pathlib import Path
from typing import Any

import pytest

from trainer.exchange import RefusedError
from trainer.preview.drift import BaseAnswer, Drift, load_base, of_base
from trainer.preview.samples import sample_seed
from trainer.publish.publisher import Give, Publisher, Setup, Tries
from trainer.publish.wire import PreviewsRequest, PreviewsResult

PROMPTS = [[5, 6], [7]]
BASE = [
    BaseAnswer(answer_ids=[1], text="a", top_ids=[[1, 2]], top_logprobs=[[-0.1, -2.4]])
    for _ in PROMPTS
]
ID = "0" * 64
HASHES = {"config_hash": ID, "tokenizer_hash": ID, "chat_template_hash": ID}


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    values = {
        **{"url": "http://127.0.0.1:9", "run": "r", "transport": "http", "timeout_s": 1.0},
        **{"folder": str(tmp_path), "hashes": HASHES, "drift_prompts": PROMPTS},
        "previews": {"prompts": [{"prompt": "p", "prompt_token_ids": [1]}]},
        "drift_path": str(tmp_path / "base.json"),
    }
    return Publisher(Setup.model_validate(values), queue.Queue(), io.BytesIO())


def told(publisher: Publisher, step: int, drift: Drift | None) -> Any:
    """What the trainer is told when a server answers this."""
    found = PreviewsResult(run="r", step=step, weights_id=ID, results=[], drift=drift)
    give = Give(step=step, slot=0, path="p", is_kept=False)
    publisher.out = io.BytesIO()
    publisher._report(give, Tries(), ID, found)
    return json.loads(publisher.out.getvalue())["drift"]


def test_each_sample_is_a_batch_that_differs_by_its_seed_alone(publisher: Publisher) -> None:
    """So that any server can be asked for samples, one of before them too."""
    previews = {**publisher.setup.previews, "seed": 7, "golden_logprobs": True, "canary": [0]}
    publisher.setup = publisher.setup.model_copy(
        update={"previews": previews, "num_samples": 3, "evaluation": [{"prompts": []}]}
    )
    give = Give(step=0, slot=0, path="p", is_kept=False)
    quiet = {**previews, "golden_logprobs": False, "canary": None}
    expected = [previews, *({**quiet, "seed": sample_seed(7, sample)} for sample in (1, 2))]
    assert publisher._bodies(give) == expected
    evaluated = give.model_copy(update={"is_evaluated": True})
    assert publisher._bodies(evaluated) == [*expected, {"prompts": []}]


def test_step_0_gives_the_base_and_later_steps_are_asked_by_it(publisher: Publisher) -> None:
    asked = publisher._drift(0)
    assert asked is not None
    assert (asked.prompts, asked.base) == (PROMPTS, None)
    first = told(publisher, 0, of_base(BASE).model_copy(update={"base": BASE}))
    assert (first["kl"], "base" in first) == ([0.0, 0.0], False)
    path = Path(publisher.setup.drift_path or "")
    assert load_base(path, PROMPTS) == BASE
    publisher.base_answers = None  # another publisher process goes on
    again = publisher._drift(3)
    assert again is not None
    assert again.base == BASE


def test_without_the_answers_of_step_0_nothing_is_asked_and_that_is_told(
    publisher: Publisher,
) -> None:
    assert publisher._drift(3) is None
    assert "were not asked" in told(publisher, 3, None)["error"]


def test_base_answers_that_nobody_asked_for_are_not_kept(publisher: Publisher) -> None:
    publisher.base_answers = BASE
    other = [one.model_copy(update={"text": "b"}) for one in BASE]
    told(publisher, 3, Drift(kl=[0.1, 0.2], is_changed=[True, False], base=other))
    assert publisher.base_answers == BASE
    wrong = told(publisher, 3, Drift(kl=[-1.0, 0.2], is_changed=[True, False]))
    assert "something else" in wrong["error"]


def test_an_older_server_is_asked_without_drift_from_then_on(publisher: Publisher) -> None:
    """A server of before this question cannot be started here: its refusal is made up."""
    asked: list[PreviewsRequest] = []

    def previews(request: PreviewsRequest, *, part: int, timeout_s: float) -> PreviewsResult:
        asked.append(request)
        if "drift" in request.model_dump(mode="json"):
            raise RefusedError("drift: Extra inputs are not permitted", 422)
        return PreviewsResult(run="r", step=0, weights_id=ID, results=[])

    publisher.client.previews = previews  # type: ignore[method-assign]
    request = PreviewsRequest.model_validate(
        {**publisher.setup.previews, "run": "r", "step": 0, "weights_id": ID, "drift": None}
    )
    assert "drift" not in request.model_dump(mode="json")
    found = publisher._ask(request.model_copy(update={"drift": publisher._drift(0)}), 0, 1.0)
    assert len(asked) == 2
    assert "refuses to measure it" in told(publisher, 0, found.drift)["error"]
    assert publisher._drift(1) is None
