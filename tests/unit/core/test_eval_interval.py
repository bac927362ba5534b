"""How often the loss on held-out rows is measured where nobody said how often."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.config.docs import explain_rows
from trainer.config.loader import ConfigLoader
from trainer.config.schema import TrainerConfig
from trainer.core.evaluation import with_eval_interval


def interval(total: int, num_held_out: int, **sections: dict[str, Any]) -> int:
    config = TrainerConfig.model_validate(
        {"hyperparams": {"batch_size": 8, "gradient_accumulation": 1}, **sections}
    )
    return with_eval_interval(config, total, num_held_out).monitoring.micro_eval_interval


@pytest.mark.parametrize(
    ("total", "num_held_out", "expected"),
    [
        (100_000, 500, 200),
        (2_000, 500, 200),
        (500, 500, 50),
        (160, 500, 16),
        (100, 500, 14),  # 64 rows forward are as much as 2.7 steps of 8 rows: a fifth of 14
        (20, 500, 14),
        (20, 8, 2),
        (3, 1, 1),
        (20, 0, 200),
    ],
)
def test_short_runs_have_about_ten_measurements_that_take_a_fifth_of_the_time_at_most(
    total: int, num_held_out: int, expected: int
) -> None:
    assert interval(total, num_held_out) == expected


@pytest.mark.parametrize("value", [0, 200, 7])
def test_an_interval_that_is_set_stays(value: int) -> None:
    assert interval(100, 50, monitoring={"micro_eval_interval": value}) == value


def test_answers_for_scores_are_not_asked_for_more_often_than_the_default_says() -> None:
    assert interval(100, 50, monitoring={"num_score_prompts": 12, "scores": ["exact"]}) == 200


def test_a_resolved_config_keeps_what_was_chosen() -> None:
    chosen = with_eval_interval(TrainerConfig(), 100, 1)
    again = TrainerConfig.model_validate(chosen.model_dump(mode="json"))
    assert chosen.monitoring.micro_eval_interval == 10
    assert with_eval_interval(again, 50, 1) == again


def test_explain_says_that_a_default_interval_is_shorter_in_short_runs() -> None:
    def origin(*words: str) -> str:
        found = {key: where for key, _, where in explain_rows(ConfigLoader.load(flags=words))}
        return found["monitoring.micro_eval_interval"]

    assert "a tenth of the steps in shorter runs" in origin()
    assert origin("--monitoring.micro_eval_interval", "200").startswith("flag")
