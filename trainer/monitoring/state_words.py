"""The state of a run in one sentence, the same on the terminal, the page and the report."""

from __future__ import annotations

import shlex

from trainer.monitoring.text import (
    duration_words,
    left_words,
    non_finite_words,
    printable,
)

REASON_CHARS = 200
TRAINING = "training"
"""The phase in which steps are made; every other one says in words what keeps it from a step."""
SILENT_S = 20.0
SILENT_STEPS = 10
"""A training run that says nothing for longer than both, 20 s and 10 steps, is called silent."""


def is_silent(phase: str, waited_s: float, step_time_s: float) -> bool:
    """Whether a run at work says nothing for longer than its pace explains.

    Args:
        phase: what is done now; evaluation, previews and saving take what they take.
        waited_s: seconds since the run said something.
        step_time_s: seconds that a step takes; 0 where none is known.
    """
    return phase == TRAINING and waited_s > max(SILENT_S, SILENT_STEPS * step_time_s)


def working_words(
    phase: str,
    step: int,
    total_steps: int | None,
    eta_s: float | None,
    *,
    waited_s: float = 0.0,
    step_time_s: float = 0.0,
) -> str:
    """A run at work, such as `training, step 420 of 1000, 3 min left`.

    Args:
        phase: what is done now, in words.
        eta_s: seconds until the last step as of the last step; None: not known.
        waited_s: seconds since that was measured.
        step_time_s: seconds that a step takes; 0: not known.
    """
    words = printable(phase, REASON_CHARS) or "at work"
    if total_steps is None:
        return words
    words += f", step {step} of {total_steps}"
    if is_silent(phase, waited_s, step_time_s):
        pace = f" (a step takes {duration_words(step_time_s)})" if step_time_s > 0 else ""
        return f"{words}, no word for {duration_words(waited_s)}{pace}"
    # What is left is a guess that was made at the last step: it is not counted below zero.
    if eta_s is not None and step < total_steps and eta_s > waited_s:
        words += f", {left_words(eta_s - waited_s)}"
    return words


def ending_words(
    state: str,
    step: int,
    total_steps: int | None,
    *,
    error_type: str | None = None,
    reason: str | None = None,
) -> str:
    """How a run ended, such as `stopped on a non-finite loss at step 81`.

    Args:
        state: `completed`, `stopped` or `failed`.
        error_type: name of the error class of a failed run.
        reason: the message of a stop or an error; only its first line is used.
    """
    of_total = f" of {total_steps}" if total_steps is not None else ""
    if state == "completed":
        return f"completed, step {step}{of_total}"
    first_line = printable((reason or "").split("\n")[0], REASON_CHARS)
    if state == "stopped":
        # The reason names who and the step: `by SIGINT after step 80; continue with ...`.
        return (
            f"stopped {first_line}" if first_line.startswith("by ") else f"stopped at step {step}"
        )
    non_finite = non_finite_words(error_type, reason)
    if non_finite is not None:
        return non_finite
    return f"failed at step {step}{of_total}: {first_line or error_type or 'no reason given'}"


def lost_words(step: int, total_steps: int | None, silent_s: float) -> str:
    """A run whose process is gone without having said how it ended."""
    of_total = f" of {total_steps}" if total_steps is not None else ""
    return (
        f"broke off at step {step}{of_total}, {duration_words(silent_s)} ago: its process is gone "
        "and said nothing"
    )


def going_on_words(folder: str, checkpoint_step: int | None) -> str:
    """How to go on with a run that did not complete, with the command to copy.

    Args:
        checkpoint_step: step of the newest checkpoint in the folder; None: there is none.
    """
    if checkpoint_step is None:
        return "no checkpoint was written, so there is nothing to resume: start the run again"
    command = f"trainer train --resume --output {shlex.quote(folder)}"
    return f"the last checkpoint is of step {checkpoint_step}; continue with: {command}"
