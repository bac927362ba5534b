"""What a run tells its observers (status file, terminal, trackers): plain frozen values.

An observer has one method, `on_event(event)`. No torch and no file access here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from trainer.preview.base import PreviewResult

RunState = Literal["loading", "training", "saving", "completed", "stopped", "failed"]


@dataclass(frozen=True, kw_only=True)
class RunStarted:
    """The first optimizer step is about to be made."""

    model_name: str
    total_steps: int
    start_step: int
    """Above 0 after a resume."""
    num_epochs: float
    """Passes over the training rows that `total_steps` make."""
    num_train_rows: int
    num_validation_rows: int
    context_window: int
    effective_batch_size: int
    output_dir: str


@dataclass(frozen=True, kw_only=True)
class PhaseChanged:
    """A named stretch of work begins: loading, encoding, training, saving ..."""

    state: RunState
    text: str
    """In words, such as `loading Qwen/Qwen3-0.6B`."""
    is_pause: bool = False
    """Between two steps, as previews and evaluations are, or the end of such a pause."""


@dataclass(frozen=True, kw_only=True)
class CardShown:
    """A card of labelled lines, such as the data card before step 1."""

    title: str
    lines: tuple[tuple[str, str], ...]
    """(label, value) pairs."""
    sample: tuple[tuple[str, bool], ...] = ()
    """One row as (text, is trained) stretches."""


@dataclass(frozen=True, kw_only=True)
class StepDone:
    """One optimizer step was made."""

    step: int
    total_steps: int
    epoch: float
    train_loss: float
    """Mean nats per trained token over the whole step."""
    learning_rate: float
    grad_norm: float
    tokens_per_s: float
    """Real tokens (padding excluded) per second of training, previews and evaluation excluded."""
    num_tokens: int
    num_trained_tokens: int
    step_time_s: float
    eta_s: float
    """Until the last step, at the pace of the steps and pauses so far."""
    memory_gib: float
    """Peak device memory, or the resident memory of the process on CPU."""


@dataclass(frozen=True, kw_only=True)
class EvaluationDone:
    """The loss on held-out rows was measured."""

    step: int
    val_loss: float
    """Mean nats per trained token."""
    train_loss: float | None
    num_rows: int
    num_trained_tokens: int
    duration_s: float


@dataclass(frozen=True, kw_only=True)
class PreviewsDone:
    """Prompts were answered with the weights of `step`."""

    step: int
    results: tuple[PreviewResult, ...]
    duration_s: float
    """Seconds that training waited for them."""

    @property
    def common_error(self) -> str | None:
        """Why nothing was answered, where all prompts have the same reason."""
        reasons = {result.error_message for result in self.results}
        return reasons.pop() if len(reasons) == 1 else None

    @property
    def is_superseded(self) -> bool:
        """Whether a newer step took this one's place: there is nothing to show."""
        return all(result.is_superseded for result in self.results)


@dataclass(frozen=True, kw_only=True)
class RowShown:
    """A copy of one row of the batch just trained, without generation."""

    step: int
    prompt: str
    golden_answer: str


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved:
    """A checkpoint was written and verified."""

    step: int
    path: str
    duration_s: float


@dataclass(frozen=True, kw_only=True)
class Notice:
    """Something the user should know: a warning, a choice made, a thing not done."""

    text: str
    level: Literal["info", "warning", "error"] = "info"


@dataclass(frozen=True, kw_only=True)
class RunEnded:
    """The run is over; the last event."""

    state: RunState
    step: int
    error_type: str | None = None
    error_message: str | None = None
    summary: dict[str, Any] = field(default_factory=dict)


Event = (
    RunStarted
    | PhaseChanged
    | CardShown
    | StepDone
    | EvaluationDone
    | PreviewsDone
    | RowShown
    | CheckpointSaved
    | Notice
    | RunEnded
)


class Observer(Protocol):
    """Receives every event in order, in the training process; must be quick."""

    def on_event(self, event: Event) -> None:
        """Take note of one event; an exception is logged and does not stop training."""
        ...

    def close(self) -> None:
        """Flush and let go; may be called twice."""
        ...
