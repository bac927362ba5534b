"""Events of a made-up run; each fixture is a function that makes one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from trainer.monitoring.events import EvaluationDone, PreviewsDone, RunStarted, StepDone
from trainer.preview.base import PreviewResult


@pytest.fixture
def started() -> Callable[..., RunStarted]:
    def make(**changes: Any) -> RunStarted:
        values: dict[str, Any] = {
            "model_name": "tiny",
            "total_steps": 100,
            "start_step": 0,
            "num_epochs": 1.0,
            "num_train_rows": 800,
            "num_validation_rows": 40,
            "context_window": 128,
            "effective_batch_size": 8,
            "output_dir": "outputs",
        }
        return RunStarted(**{**values, **changes})

    return make


@pytest.fixture
def step_done() -> Callable[..., StepDone]:
    def make(step: int, **changes: Any) -> StepDone:
        values: dict[str, Any] = {
            "step": step,
            "total_steps": 100,
            "epoch": step / 100,
            "train_loss": 2.5,
            "learning_rate": 1e-3,
            "grad_norm": 0.5,
            "tokens_per_s": 12345.0,
            "num_tokens": 900,
            "num_trained_tokens": 300,
            "step_time_s": 0.1,
            "eta_s": 180.0,
            "memory_gib": 1.25,
        }
        return StepDone(**{**values, **changes})

    return make


@pytest.fixture
def evaluated() -> Callable[..., EvaluationDone]:
    def make(step: int, val_loss: float, train_loss: float | None = None) -> EvaluationDone:
        return EvaluationDone(
            step=step,
            val_loss=val_loss,
            train_loss=train_loss,
            num_rows=40,
            num_trained_tokens=1000,
            duration_s=0.5,
        )

    return make


@pytest.fixture
def previews() -> Callable[..., PreviewsDone]:
    """Previews of a step: one for each value of `matches`, with changes to all of them."""

    def make(step: int, matches: list[bool | None], **changes: Any) -> PreviewsDone:
        values = {"prompt": "max of 4 and 2?", "text": "4", "golden_answer": "4", **changes}
        results = tuple(
            PreviewResult(step=step, matches=value, prompt_id=f"validation-{i}", **values)
            for i, value in enumerate(matches)
        )
        return PreviewsDone(step=step, results=results, duration_s=0.1)

    return make
