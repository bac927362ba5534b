"""The state of a run in one sentence, the same on the terminal, the page and the report."""

from __future__ import annotations

from trainer.monitoring.text import (
    duration_words,
    left_words,
    non_finite_words,
    printable,
)

REASON_CHARS = 200


def working_words(
    phase: str, step: int, total_steps: int | None, eta_s: float | None, *, waited_s: float = 0.0
) -> str:
    """A run at work, such as `training, step 420 of 1000, 3 min left`.

    Args:
        phase: what is done now, in words.
        eta_s: seconds until the last step as of the last step; None: not known.
        waited_s: seconds since that was measured.
    """
    words = printable(phase, REASON_CHARS) or "at work"
    if total_steps is None:
        return words
    words += f", step {step} of {total_steps}"
    if eta_s is not None and step < total_steps:
        words += f", {left_words(max(0.0, eta_s - waited_s))}"
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
        "and said nothing; continue with --resume"
    )
