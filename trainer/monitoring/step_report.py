"""What is told of a step: by our trainer's own record of it, or by the log of any HF Trainer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from trainer.monitoring.events import (
    CheckpointSaved,
    EvaluationDone,
    Observers,
    RowShown,
    RunEnded,
    RunStarted,
    StepDone,
)

RATE_MEMORY = 0.98
"""Weight of the past in the smoothed step time from which the ETA is made."""


def memory_gib() -> float:
    """Peak memory of the GPU that is used, or what the process holds now, in GiB."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return torch.cuda.max_memory_allocated() / 2**30
    return float(psutil.Process().memory_info().rss) / 2**30


@dataclass
class StepRecord:
    """What one optimizer step did, as plain numbers."""

    train_loss: float = 0.0
    grad_norm: float = 0.0
    learning_rate: float = 0.0
    num_tokens: int = 0
    num_trained_tokens: int = 0
    source_losses: dict[str, float] = field(default_factory=dict)
    """Loss of the tokens of each source, by its name; those of the step."""


@dataclass
class StepClock:
    """How long a step takes, pauses for previews, evaluation and checkpoints included."""

    began: float | None = None
    """When the first step began."""
    num_steps: int = 0
    _sum: float = 0.0
    _weight: float = 0.0
    _trained_s: float = 0.0
    _pause_s: float = 0.0

    def add(self, seconds: float, now: float) -> None:
        """Take a step of `seconds` that ended at `now`."""
        self.began = now - seconds if self.began is None else self.began
        self.num_steps += 1
        self._sum = RATE_MEMORY * self._sum + seconds
        self._weight = RATE_MEMORY * self._weight + 1
        self._trained_s += seconds
        self._pause_s = max(0.0, now - self.began - self._trained_s)

    @property
    def seconds_per_step(self) -> float:
        """Recent steps, and the mean pause of a step so far."""
        return self._sum / self._weight + self._pause_s / self.num_steps


class StepReport:
    """Tells of each step what the trainer noted of it, and now and then shows a training row."""

    def __init__(
        self,
        observers: Observers,
        *,
        row_interval: int = 0,
        row_of_step: Callable[[int], tuple[str, str]] | None = None,
    ) -> None:
        """Wait for the first record.

        Args:
            row_interval: steps between shown rows; 0 = none.
            row_of_step: step -> (prompt, golden answer) of one row of its batch.
        """
        self.observers = observers
        self.record: StepRecord | None = None
        self._row_interval, self._row_of_step = row_interval, row_of_step
        self._clock = StepClock()

    def note(self, record: StepRecord) -> None:
        """Take the figures of the step that is about to end, from the trainer."""
        self.record = record

    def begin(self, args: Any, state: Any, parts: dict[str, Any]) -> None:
        """Whoever runs the job tells that it begins."""

    def step_ended(self, state: Any, seconds: float) -> None:
        """Tell of the step that took `seconds`."""
        self._clock.add(seconds, time.perf_counter())
        self._tell(state, seconds)
        step = state.global_step
        if self._row_of_step is not None and self._row_interval and step % self._row_interval == 0:
            prompt, golden = self._row_of_step(step)
            self.observers.emit(RowShown(step=step, prompt=prompt, golden_answer=golden))

    def _tell(self, state: Any, seconds: float) -> None:
        step, record = state.global_step, self.record
        assert record is not None, "the trainer notes each step"
        self.observers.emit(
            StepDone(
                step=step,
                total_steps=state.max_steps,
                epoch=state.epoch,
                train_loss=record.train_loss,
                learning_rate=record.learning_rate,
                grad_norm=record.grad_norm,
                tokens_per_s=record.num_tokens / seconds if seconds > 0 else 0.0,
                num_tokens=record.num_tokens,
                num_trained_tokens=record.num_trained_tokens,
                step_time_s=seconds,
                eta_s=self._clock.seconds_per_step * (state.max_steps - step),
                memory_gib=memory_gib(),
                source_losses=record.source_losses,
            )
        )

    def logged(self, state: Any, logs: dict[str, Any]) -> None:
        """HF's own log says nothing that was not told."""

    def saved(self, args: Any, state: Any, seconds: float) -> None:
        """Whoever writes our checkpoints tells of them."""

    def ended(self, state: Any) -> None:
        """Whoever runs the job tells how it ended."""


class LoggedReport(StepReport):
    """Tells of a run of any HF Trainer what its log says: beginning, logged steps, end.

    A step is told of when HF logs it (`logging_steps`). Tokens are those that HF counts
    (`include_num_input_tokens_seen`), else 0; how many of them are trained is not known: 0.
    """

    def __init__(self, observers: Observers) -> None:
        """Nothing is known before training begins."""
        super().__init__(observers)
        self._seconds = 0.0
        self._num_steps = 0
        self._tokens_seen = 0

    def begin(self, args: Any, state: Any, parts: dict[str, Any]) -> None:
        """Tell that the run begins; `parts` are what HF gives its callbacks."""
        model = parts.get("model")
        config = getattr(model, "config", None)
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.observers.emit(
            RunStarted(
                model_name=getattr(config, "_name_or_path", "") or type(model).__name__,
                total_steps=state.max_steps,
                start_step=state.global_step,
                num_epochs=float(state.num_train_epochs),
                num_train_rows=_num_rows(parts.get("train_dataloader")),
                num_validation_rows=_num_rows(parts.get("eval_dataloader")),
                context_window=getattr(config, "max_position_embeddings", 0) or 0,
                effective_batch_size=batch,
                output_dir=str(args.output_dir),
            )
        )

    def step_ended(self, state: Any, seconds: float) -> None:
        """Count it; HF logs it later."""
        self._clock.add(seconds, time.perf_counter())
        self._seconds, self._num_steps = self._seconds + seconds, self._num_steps + 1

    def logged(self, state: Any, logs: dict[str, Any]) -> None:
        """Tell of the mean of the steps since the last log, or of an evaluation."""
        if "eval_loss" in logs:
            self.observers.emit(
                EvaluationDone(
                    step=state.global_step,
                    val_loss=logs["eval_loss"],
                    train_loss=self.record.train_loss if self.record is not None else None,
                    num_rows=0,
                    num_trained_tokens=0,
                    duration_s=logs.get("eval_runtime", 0.0),
                )
            )
        if "loss" not in logs or not self._num_steps:
            return
        steps, seen = self._num_steps, int(state.num_input_tokens_seen)
        self.note(
            StepRecord(
                train_loss=logs["loss"],
                grad_norm=float(logs.get("grad_norm", math.nan)),
                learning_rate=logs.get("learning_rate", math.nan),
                num_tokens=(seen - self._tokens_seen) // steps,
            )
        )
        seconds, self._seconds = self._seconds / steps, 0.0
        self._num_steps, self._tokens_seen = 0, seen
        self._tell(state, seconds)

    def saved(self, args: Any, state: Any, seconds: float) -> None:
        """Tell of HF's checkpoint, written within `seconds` of the end of its step."""
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self.observers.emit(
            CheckpointSaved(step=state.global_step, path=str(path), duration_s=seconds)
        )

    def ended(self, state: Any) -> None:
        """Tell that the run is over; of one that raises, readers see that its process is gone."""
        is_whole = state.global_step >= state.max_steps
        self.observers.emit(
            RunEnded(state="completed" if is_whole else "stopped", step=state.global_step)
        )


def _num_rows(loader: Any) -> int:
    """Rows behind a DataLoader; 0 for none, and for a stream, whose length nobody knows."""
    try:
        return len(loader.dataset)
    except (AttributeError, TypeError):
        return 0
