"""TrainingResult: what `run_job` returns, also when it failed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from trainer.errors import EXIT_FAILED


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """How a run ended."""

    success: bool
    """The model is saved: the run was completed, or its control file asked it to stop."""
    state: Literal["completed", "stopped", "failed"]
    output_dir: Path
    model_path: Path | None = None
    """`final_model/`; None unless `success`."""
    checkpoint_path: Path | None = None
    """The newest verified checkpoint."""
    global_step: int = 0
    train_loss: float | None = None
    """Of the last step, in nats per trained token."""
    val_loss: float | None = None
    """Of the last micro-evaluation."""
    error_message: str | None = None
    """Why it failed or was stopped."""
    exit_code: int = EXIT_FAILED
    """0 completed or stopped by the control file, 1 failed, 2 the user's input, 129, 130 and 143
    stopped by a signal."""
    summary: dict[str, Any] = field(default_factory=dict)
    """Figures and counts: previews, final evaluation, times; `ended_by`: steps, early_stopping,
    control, a signal's name such as SIGINT, or error; `error_type` after a failure. `previews`
    holds `asked`, `done`, `failed`, `verified` and more; its `all_failed` is true where the run has
    not shown a single answer, whatever `success` says."""
