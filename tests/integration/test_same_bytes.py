"""The prompt of a preview is the exact prefix of its row's training ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trainer.core import TrainerEngine


def test_preview_prompt_ids_are_the_prefix_of_the_rows_training_ids(
    job: Callable[..., Any],
) -> None:
    engine = TrainerEngine()
    config = job(profile={"system_prompt": "Answer briefly."})
    data = engine.prepare_dataset(config)
    assert data.validation is not None
    rows = [data.validation[i]["input_ids"].tolist() for i in range(len(data.validation))]
    monitor, *_ = engine.build_callbacks(config)
    requests = monitor.previews.scheduler.requests
    assert len(requests) == config.monitoring.num_eval_samples
    for request in requests:
        ids = list(request.prompt_token_ids or ())
        assert ids
        [row] = [row for row in rows if row[: len(ids)] == ids]
        answer = data.encoder.tokenizer.decode(row[len(ids) :])
        assert answer.startswith(request.golden_answer or "?")
