"""A run that needs more than there is says so before it loads its weights, as the dry run does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from trainer.core import TrainerEngine, dry_run
from trainer.monitoring.events import Notice, PhaseChanged

SMALL = 1 << 20


class Kept:
    def __init__(self) -> None:
        self.events: list[Any] = []

    def on_event(self, event: Any) -> None:
        self.events.append(event)


def test_too_little_memory_is_a_warning_with_what_to_change_in_both(
    job: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = job(hyperparams={"max_steps": 1, "batch_size": 8})
    engine = TrainerEngine()
    monkeypatch.setattr(dry_run, "device_memory", lambda device: SMALL)
    told = engine.dry_run(config).warning
    assert told is not None
    assert "this run needs about" in told
    assert "hyperparams." in told
    kept = Kept()
    assert TrainerEngine(observers=[kept]).run_job(config).success
    texts = [e.text for e in kept.events if isinstance(e, Notice | PhaseChanged)]
    at = texts.index(told)
    assert at < texts.index(f"loading {config.model.model_path}")
    assert (
        kept.events[[getattr(e, "text", None) for e in kept.events].index(told)].level == "warning"
    )


def test_where_there_is_plenty_no_sum_is_made(
    job: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run, "estimate_memory", lambda *_: pytest.fail("summed up"))
    config = job(hyperparams={"max_steps": 1}, monitoring={"inference_interval": 0})
    result = TrainerEngine().run_job(config)
    assert result.success, result.error_message
    fit = dry_run.Fit("cpu", 1 << 40, 8, 1, 0)
    assert dry_run.too_much(1 << 30, fit) is None
    assert torch.device(fit.device).type == "cpu"
