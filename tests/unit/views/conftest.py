"""Run folders written by the real TrainingStatusWriter from made-up events."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.monitoring.events import (
    DriftMeasured,
    EvaluationDone,
    PreviewsDone,
    RunEnded,
    RunStarted,
    ScoreDecided,
    StepDone,
)
from trainer.monitoring.status_writer import TrainingStatusWriter
from trainer.preview.base import PreviewResult
from trainer.views.run_reader import RunReader


class MadeUpRun:
    """Writes what a run writes; `reader` reads it."""

    def __init__(self, folder: Path, *, start_step: int = 0, total_steps: int = 1000) -> None:
        """Begin a run in a folder, or go on with the one in it."""
        self.folder, self.total_steps = folder, total_steps
        self.writer = TrainingStatusWriter(None, run_dir=folder)
        self.reader = RunReader(folder)
        self.started = RunStarted(
            model_name="tiny",
            total_steps=total_steps,
            start_step=start_step,
            num_epochs=1.0,
            num_train_rows=800,
            num_validation_rows=40,
            context_window=128,
            effective_batch_size=8,
            output_dir=str(folder),
        )
        self.writer.on_event(self.started)

    def step(self, step: int, **changes: Any) -> None:
        """One optimizer step."""
        values: dict[str, Any] = {
            "step": step,
            "total_steps": self.total_steps,
            "epoch": step / 1000,
            "train_loss": 2.5,
            "learning_rate": 1e-3,
            "grad_norm": 0.5,
            "tokens_per_s": 1000.0,
            "num_tokens": 900,
            "num_trained_tokens": 300,
            "step_time_s": 0.1,
            "eta_s": 180.0,
            "memory_gib": 1.25,
        }
        self.writer.on_event(StepDone(**{**values, **changes}))

    def steps(self, first: int, last: int, **changes: Any) -> None:
        """Steps from `first` to `last`, both included."""
        for step in range(first, last + 1):
            self.step(step, **changes)

    def evaluate(self, step: int, val_loss: float) -> None:
        """A loss on held-out rows."""
        self.writer.on_event(
            EvaluationDone(
                step=step,
                val_loss=val_loss,
                train_loss=1.0,
                num_rows=40,
                num_trained_tokens=1000,
                duration_s=0.5,
            )
        )

    def preview(self, step: int, matches: list[bool | None], **changes: Any) -> None:
        """One answer per value of `matches`, each to a prompt of its own."""
        values = {"prompt": "max of 4 and 2?", "text": "4", "golden_answer": "4", **changes}
        results = tuple(
            PreviewResult(step=step, matches=value, prompt_id=f"validation-{i}", **values)
            for i, value in enumerate(matches)
        )
        self.writer.on_event(PreviewsDone(step=step, results=results, duration_s=0.1))

    def drift(self, step: int, kl: float, *, num_changed: int = 12) -> None:
        """How far the weights are from those before training."""
        self.writer.on_event(
            DriftMeasured(
                step=step,
                kl=kl,
                num_changed=num_changed,
                num_prompts=20,
                worst_prompt="Who wrote Hamlet?",
                worst_kl=2 * kl,
                duration_s=0.5,
            )
        )

    def decide(self, step: int, **changes: Any) -> None:
        """The evaluation of the step before is taken by a score that decides."""
        values: dict[str, Any] = {
            **{"evaluation_step": step - 20, "metric": "score.exact", "mean": 0.5},
            **{"is_best": False, "best_step": 20, "reference_step": 20, "num_without": 1},
            **{"patience": 3, "missing": None, "num_missing": 0, "waited_s": 2.0, **changes},
        }
        self.writer.on_event(ScoreDecided(step=step, **values))

    def end(self, state: Any = "completed", step: int = 1000, **changes: Any) -> None:
        """The run is over."""
        self.writer.on_event(RunEnded(state=state, step=step, **changes))

    def read(self) -> RunReader:
        """What the files say now."""
        self.reader.poll()
        return self.reader


@pytest.fixture
def made_up_run(tmp_path: Path) -> Callable[..., MadeUpRun]:
    """A function that begins a made-up run in the folder `run`."""

    def make(**options: Any) -> MadeUpRun:
        return MadeUpRun(tmp_path / "run", **options)

    return make
