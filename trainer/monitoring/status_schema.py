"""The content of status.json: one pydantic model, documented field by field in docs/status.md.

The text under a field is its meaning. No file access here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from trainer.monitoring.events import RunState
from trainer.preview.base import FinishReason, PreviewResult, WeightsProof
from trainer.scores.figures import ScoreFigure
from trainer.scores.statistics import paired_trend

# ---- how often previews matched their golden answers, and whether that is rising
#
# The trend compares the same prompts with themselves over preview steps. With many prompts a step,
# the last comparisons and those before them are other prompts of the same step and tell nothing.


Trend = Literal["rising", "falling", "flat"]
"""`flat` stands in status files of version 0.1 only: where a test cannot tell, nothing is said."""

SHORT_WINDOW = 20

LONG_WINDOW = 50


class MatchHistory:
    """Comparisons by step; results without one (no golden, error) do not count."""

    def __init__(self) -> None:
        self._by_step: dict[int, dict[str, bool]] = {}
        self._trend: Trend | None = None
        self._is_trend_known = True

    def add(self, results: Iterable[PreviewResult]) -> None:
        """Take note of results; a second answer to a prompt by the same step replaces the first."""
        self._is_trend_known = False
        for one in results:
            if one.matches is not None:
                prompts = self._by_step.setdefault(one.step, {})
                prompts[one.prompt_id or one.prompt] = bool(one.matches)

    def clear(self) -> None:
        """Forget everything; a resumed run tells its past again."""
        self._by_step.clear()
        self._is_trend_known = False

    def counts(self, window: int) -> tuple[int, int] | None:
        """Matches and comparisons among the last `window`; None when there are none."""
        newest: list[bool] = []
        for step in sorted(self._by_step, reverse=True):
            newest += reversed(self._by_step[step].values())
            if len(newest) >= window:
                break
        newest = newest[:window]
        return (sum(newest), len(newest)) if newest else None

    def trend(self) -> Trend | None:
        """The newest third of the preview steps against the third before, prompt by prompt.

        Returns:
            `rising` or `falling` where a two-sided sign test over the prompts that changed is
            below SIGNIFICANCE; None where it cannot tell (with fewer than six prompts never).
        """
        if not self._is_trend_known:  # asked for at every status, changed by previews only
            self._trend, self._is_trend_known = paired_trend(self._by_step), True
        return self._trend


# ---- the content of status.json: one pydantic model, documented field by field in docs/status.md


SCHEMA_VERSION = 1

NUM_NOTICES = 20
"""Notices kept in status.json; the oldest go first."""


class StatusPart(BaseModel):
    """What all parts share: unknown fields are errors, values cannot be changed in place."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class PreviewStatus(StatusPart):
    """One answer of the newest previews; its full text is in previews.jsonl."""

    step: int
    """The weights of this step wrote the answer."""
    prompt_id: str
    """Names the prompt over all steps of the run."""
    prompt: str
    """The user's turn."""
    golden_answer: str | None
    """What the data says the answer is; null for prompts without one."""
    text: str
    """The answer, without special tokens; empty after an error."""
    matches: bool | None
    """The profile's comparison of answer and golden; null without golden or after an error."""
    truncated: bool
    """True when prompt, golden_answer, text or error_message was cut to the writer's limit."""
    held_out: bool
    """False when the prompt is also trained on."""
    tokens_generated: int
    """Tokens of the answer, the stop token included."""
    tokens_per_sec: float | None
    """Speed at which the answer was generated."""
    finish_reason: FinishReason
    """`stop`, `length` or `error`."""
    health: tuple[str, ...]
    """What is visibly wrong with the text, such as `repeats` or `never_stopped`."""
    weights_id: str | None
    """Identity of the weights; null: the backend could not tell."""
    weights: WeightsProof = "unverified"
    """`in_process`, `verified`, `published` or `unverified`: what is known of these weights."""
    golden_probability: float | None = None
    """Mean probability of the golden answer's tokens under these weights; null: not measured."""
    scores: dict[str, float | None] = {}
    """By the names of `monitoring.scores`; null: the score says nothing of this answer."""
    received_step: int | None = None
    """The step training was at when the answer arrived."""
    visible_s: float | None = None
    """Seconds from the end of the step until the answer arrived."""
    backend_type: str
    """Who generated it, such as `local`."""
    error_message: str | None
    """Why there is no answer; null when there is one."""
    created_at: float
    """When it was made, in unix seconds."""


class AccuracyStatus(StatusPart):
    """Matches among the newest previews that have a golden answer."""

    num_matched: int
    """Answers that match."""
    num_previews: int
    """Answers compared; fewer than the window's size early in a run."""
    share: float
    """num_matched / num_previews, from 0 to 1."""


class DriftStatus(StatusPart):
    """How far the newest measured weights are from those before training."""

    step: int
    """The weights of this step were measured."""
    kl: float | None
    """KL of the next token, before training against now, along the answers of before; nats per
    token, the mean over the prompts."""
    num_changed: int
    """Prompts whose greedy answer is another one than before training."""
    num_prompts: int
    """Prompts of `monitoring.canary_set`."""
    worst_prompt: str
    """The prompt that drifted most."""
    worst_kl: float | None
    """Its own value."""
    duration_s: float
    """What measuring took."""


class DecidingStatus(StatusPart):
    """The newest evaluation that a score was to decide by, and where its rule stands."""

    step: int
    """The step training was at when it was taken."""
    evaluation_step: int
    """The weights of this step answered."""
    metric: str
    """Such as `score.exact`."""
    mean: float | None
    """Mean over the prompts; null: the evaluation is missing and decides nothing."""
    is_best: bool
    """Whether it is clearly above the best one before."""
    best_step: int
    """The best step whose weights are kept; 0: none yet."""
    reference_step: int | None
    """The step that later ones must rise above."""
    num_without: int
    """Evaluations since that step."""
    patience: int
    """Evaluations without a clear rise after which the run stops; 0: it does not."""
    missing: str | None
    """Why the evaluation decides nothing; null where it counts."""
    num_missing: int
    """Such evaluations so far."""
    waited_s: float
    """Seconds that training has waited for scores so far."""


class RowStatus(StatusPart):
    """One row of a batch that was trained on, as text."""

    step: int
    """The step that trained on it."""
    prompt: str
    """The row's user turn."""
    golden_answer: str
    """The row's answer."""
    truncated: bool
    """True when a text was cut to the writer's limit."""


class CheckpointStatus(StatusPart):
    """The newest verified checkpoint."""

    step: int
    """Its step."""
    path: str
    """Its folder."""
    saved_at: float
    """When it was done, in unix seconds."""


class NoticeStatus(StatusPart):
    """Something the user should know."""

    level: Literal["info", "warning", "error"]
    """How serious it is."""
    text: str
    """What it says."""
    created_at: float
    """When it was said, in unix seconds."""


class ErrorStatus(StatusPart):
    """Why the run failed."""

    type: str
    """Name of the error class."""
    message: str
    """What happened and what to do."""


class TrainingStatus(StatusPart):
    """Where a run stands. Fields are null until they are known."""

    schema_version: Literal[1] = 1
    """Raised whenever a field changes its meaning or goes away."""
    state: RunState = "loading"
    """`loading`, `training`, `saving`, `completed`, `stopped` or `failed`."""
    phase: str = ""
    """What is being done now, in words."""
    phase_progress: str = ""
    """How far that is, such as `120,000 rows, 9,300 rows/s, 40 s left`; empty where it is quick."""
    step: int = 0
    """Optimizer steps done."""
    total_steps: int | None = None
    """Optimizer steps of the whole run."""
    start_step: int = 0
    """The step this process began at; above 0 after a resume."""
    epoch: float = 0.0
    """Passes over the training rows done."""
    num_epochs: float | None = None
    """Passes planned."""
    train_loss: float | None = None
    """Mean nats per trained token over the last step."""
    val_loss: float | None = None
    """Mean nats per trained token on held-out rows, at the last evaluation."""
    val_step: int | None = None
    """The step of that evaluation."""
    val_gap: float | None = None
    """val_loss minus the training loss of the same step."""
    source_losses: dict[str, float | None] = {}
    """The newest train_loss of each source of the data, by its name on the data card; empty where
    there is only one, or the loss does not tell."""
    val_source_losses: dict[str, float | None] = {}
    """The same of val_loss."""
    learning_rate: float | None = None
    """Learning rate of the last step."""
    grad_norm: float | None = None
    """Gradient norm of the last step, before clipping."""
    tokens_per_s: float | None = None
    """Real tokens (padding excluded) per second of training."""
    eta_s: float | None = None
    """Seconds until the last step; null when the run is over."""
    memory_gib: float | None = None
    """Peak device memory, or resident memory of the process on CPU."""
    context_window: int | None = None
    """Longest row in tokens, prompt and answer together."""
    model_name: str | None = None
    """The model that is trained."""
    output_dir: str | None = None
    """Folder of the run."""
    num_train_rows: int | None = None
    """Rows trained on."""
    num_validation_rows: int | None = None
    """Rows held out."""
    effective_batch_size: int | None = None
    """Sequences per optimizer step, over all devices."""
    began_at: float | None = None
    """When the first process of the run began to report, in unix seconds; null in old files."""
    earlier_s: float = 0.0
    """Seconds that the processes before this one were at work; 0 unless the run was resumed."""
    started_at: float
    """When this process began to report, in unix seconds."""
    updated_at: float
    """When this file was written, in unix seconds."""
    pid: int
    """Process number of the training process on its machine."""
    last_previews: tuple[PreviewStatus, ...] = ()
    """The newest previews, in the order of the prompts."""
    accuracy_last_20: AccuracyStatus | None = None
    """Accuracy over the last 20 previews with golden; null before the first."""
    accuracy_last_50: AccuracyStatus | None = None
    """The same over the last 50."""
    accuracy_trend: Trend | None = None
    """The same prompts over preview steps, newest third against the third before; null where a
    test cannot tell."""
    drift: DriftStatus | None = None
    """Drift from the weights before training; null where it is not measured."""
    preview_scores: tuple[ScoreFigure, ...] = ()
    """Means over the newest previews: probability of golden tokens, and scores."""
    evaluation_scores: tuple[ScoreFigure, ...] = ()
    """The same over the prompts of `monitoring.num_score_prompts`."""
    deciding: DecidingStatus | None = None
    """The score that decides; null where none does, and before its first evaluation."""
    training_row: RowStatus | None = None
    """A row of a recent batch."""
    last_checkpoint: CheckpointStatus | None = None
    """The newest checkpoint; null before the first of this process."""
    notices: tuple[NoticeStatus, ...] = ()
    """The last 20 notices, oldest first."""
    error: ErrorStatus | None = None
    """Why the run failed; null unless it did."""
    summary: dict[str, Any] = {}
    """Figures and counts at the end of the run."""
