"""Words for what a run does, the same on the terminal, the page and the report; no output here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from trainer.counts import counted
from trainer.monitoring.events import (
    TRAINING,
    CardShown,
    CheckpointSaved,
    DriftMeasured,
    EvaluationDone,
    Notice,
    RunEnded,
    RunStarted,
    StepDone,
    printable,
)
from trainer.monitoring.resuming import resume_command
from trainer.preview.base import PreviewResult, PreviewSample
from trainer.views.source_curves import loss_words

MARKS = {True: "=", False: "x", None: "."}
"""Sign before a preview: matches its golden answer, does not, or cannot be compared."""

REASON_CHARS = 240

MARK_ERROR = "!"

MARK_SUPERSEDED = "-"

_NON_FINITE = re.compile(r"step (?P<step>\d+): the (?P<what>loss|gradient norm) is")


def mark_of(result: PreviewResult | PreviewSample) -> str:
    """The sign of a preview or a further sample: `=`, `x`, `.` (nothing to compare with) or `!`
    (no answer)."""
    if isinstance(result, PreviewResult) and result.is_superseded:
        return MARK_SUPERSEDED
    return MARKS[result.matches] if result.ok else MARK_ERROR


def samples_words(result: PreviewResult) -> str:
    """How many of a prompt's answers are right, such as `3 of 8 samples match`; "" for one."""
    if not result.samples:
        return ""
    compared = [one.matches for one in result.answers if one.matches is not None]
    if compared:
        return f"{sum(compared)} of {counted(len(compared), 'sample')} match"
    return f"{1 + len(result.samples)} samples"


def remarks_of(result: PreviewResult) -> str:
    """What a preview needs said beside it, such as `(repeats, golden tokens 1.5 %)`; "" when
    there is nothing."""
    remarks = [name.replace("_", " ") for name in result.health]
    if not result.held_out:
        remarks.insert(0, "trained on")
    if result.samples:
        remarks.append(samples_words(result))
    if result.golden_probability is not None:
        remarks.append(f"golden tokens {100 * result.golden_probability:.1f} %")
    remarks += [
        f"{name} {'-' if value is None else f'{value:.4g}'}"
        for name, value in result.scores.items()
    ]
    return f"({', '.join(remarks)})" if remarks else ""


def match_words(results: tuple[PreviewResult, ...]) -> str:
    """Such as `3 of 4 match, golden tokens 16.6 %`."""
    compared = [result.matches for result in results if result.matches is not None]
    failed = sum(not result.ok for result in results)
    parts = [f"{sum(compared)} of {len(compared)} match"] if compared else []
    known = [one.golden_probability for one in results if one.golden_probability is not None]
    if known:
        parts.append(f"golden tokens {100 * sum(known) / len(known):.1f} %")
    if failed:
        parts.append(f"{failed} without an answer")
    return ", ".join(parts) or "nothing to compare with"


def duration_words(seconds: float) -> str:
    """Such as `42 s`, `3 min`, `2 h 05 min`, `4 d 3 h`."""
    if not 0 <= seconds < float("inf"):
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} d {hours % 24} h"


def left_words(eta_s: float) -> str:
    """Such as `3 min left`; whole seconds, as it is a guess."""
    return f"{duration_words(float(round(eta_s)) if eta_s >= 10 else eta_s)} left"


def metric_pairs(step: StepDone, evaluation: EvaluationDone | None) -> list[tuple[str, str]]:
    """Figures of a step as (name, value), the most wanted first."""
    pairs = [("loss", f"{step.train_loss:.4f}")]
    if evaluation is not None:
        pairs.append(("val loss", f"{evaluation.val_loss:.4f}"))
    return [
        *pairs,
        ("lr", f"{step.learning_rate:.2e}"),
        ("grad", f"{step.grad_norm:.2f}"),
        ("tokens/s", f"{step.tokens_per_s:,.0f}"),
        ("memory", f"{step.memory_gib:.1f} GiB"),
    ]


def non_finite_words(error_type: str | None, message: str | None) -> str | None:
    """Such as `stopped on a non-finite loss at step 81`; None for other endings."""
    found = _NON_FINITE.match(message or "") if error_type == "NonFiniteError" else None
    if found is None:
        return None
    return f"stopped on a non-finite {found['what']} at step {found['step']}"


def preview_failure_words(summary: Mapping[str, Any]) -> str | None:
    """That nobody answered, where it is so: a run can be complete and have shown nothing.

    Args:
        summary: of the run, as in TrainingResult and RunEnded.
    """
    counts, final = summary.get("previews") or {}, summary.get("final_evaluation") or {}
    parts = []
    reason = printable(str(counts.get("last_error") or ""), REASON_CHARS)
    if counts.get("all_failed"):
        parts.append(f"all {counted(counts['failed'], 'preview')} failed: {reason}")
    elif counts.get("last_step_failed"):
        parts.append(f"all previews of the last step failed: {reason}")
    if final.get("failed") and final["failed"] == final.get("num_prompts"):
        parts.append(f"all {counted(final['failed'], 'answer')} of the final evaluation failed")
    return "; ".join(parts) or None


def closing_words(
    event: RunEnded,
    started: RunStarted,
    step: StepDone | None,
    evaluation: EvaluationDone | None,
    elapsed_s: float,
) -> str:
    """The run in one line, such as `completed, step 1000 of 1000, loss 0.12, 3 min, outputs`.

    Args:
        elapsed_s: seconds of this process; a resumed run says from which step on.
    """
    of_total = f" of {started.total_steps}" if started.total_steps else ""
    non_finite = non_finite_words(event.error_type, event.error_message)
    parts = [non_finite or f"{event.state}, step {event.step}{of_total}"]
    if step is not None:
        parts.append(f"loss {step.train_loss:.4f}")
    if evaluation is not None:
        parts.append(f"val loss {evaluation.val_loss:.4f}")
    since = f" since step {started.start_step}" if started.start_step else ""
    drift = drift_summary_words(event.summary)
    if drift is not None:
        parts.append(drift)
    parts += final_model_words(event.summary, event.step)
    parts.append(duration_words(elapsed_s) + since)
    parts.append(f"folder {printable(started.output_dir, 200)}")
    failure = preview_failure_words(event.summary)
    if failure is not None:
        parts.append(failure)
    return ", ".join(parts)


def final_model_words(summary: Mapping[str, Any], last: int) -> list[str]:
    """Whose weights the final model has where that is not the last step, and the wait for scores.

    Args:
        last: the last step.
    """
    final, best = summary.get("final_model_step"), summary.get("best")
    parts = []
    if final is not None and final != last:
        by = f" (best by {best['by']})" if isinstance(best, Mapping) else ""
        parts.append(f"final model of step {final}{by}")
    deciding = summary.get("deciding")
    if isinstance(deciding, Mapping):
        parts.append(f"waited {duration_words(deciding['waited_s'])} for scores")
        num_missing = sum(len(rule["missing_steps"]) for rule in deciding["rules"])
        if num_missing:
            decides = ("evaluation that decides", "evaluations that decide")
            parts.append(f"{counted(num_missing, *decides)} missing")
    return parts


# ---- the state of a run in one sentence, the same on the terminal, the page and the report


STATE_REASON_CHARS = 200

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
    words = printable(phase, STATE_REASON_CHARS) or "at work"
    if total_steps is None:
        return words
    words += f", step {step} of {total_steps}"
    if is_silent(phase, waited_s, step_time_s):
        pace = f" (a step takes {duration_words(step_time_s)})" if step_time_s > 0 else ""
        # Silence first: where there is little room, the rest is not read.
        return f"no update for {duration_words(waited_s)}{pace}; {words}"
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
    first_line = printable((reason or "").split("\n")[0], STATE_REASON_CHARS)
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
        f"stopped unexpectedly at step {step}{of_total}, {duration_words(silent_s)} ago: its "
        "process is gone and reported no reason"
    )


def going_on_words(folder: str, checkpoint_step: int | None, config: Any) -> str:
    """How to go on with a run that did not complete, with the command to copy.

    Args:
        checkpoint_step: step of the newest checkpoint in the folder; None: there is none.
        config: of the run, as read from its record; None: not known.
    """
    command = resume_command(folder, config)
    if checkpoint_step is None:
        return f"no checkpoint was written; start it again from step 0 with: {command}"
    return f"the last checkpoint is of step {checkpoint_step}; continue with: {command}"


ANSWER_CHARS, NOTICE_CHARS = 120, 2000

LINE_CHARS = 80 + 2 * ANSWER_CHARS
"""A prompt and both its answers on one line: at least 80 characters of the prompt are shown."""


def card_words(card: CardShown) -> str:
    """A card as aligned lines; in its sample row, what is trained stands in [ ]."""
    width = max((len(label) for label, _ in card.lines), default=0)
    lines = [f"  {label:<{width}}  {printable(text, NOTICE_CHARS)}" for label, text in card.lines]
    if card.sample:
        row = "".join(f"[{text}]" if is_trained else text for text, is_trained in card.sample)
        lines.append(f"  {'first row':<{width}}  {printable(row, NOTICE_CHARS)}")
        lines.append(f"  {'':<{width}}  (text in [ ] is trained on)")
    return "\n".join([f"{card.title} card", *lines])


def start_words(event: RunStarted) -> str:
    """What is about to be trained, in one line."""
    resumed = f", from step {event.start_step}" if event.start_step else ""
    return (
        f"training {printable(event.model_name, 200)}: {counted(event.total_steps, 'step')} of "
        f"{counted(event.effective_batch_size, 'row')}, {counted(event.num_train_rows, 'row')} and "
        f"{event.num_validation_rows} held out{resumed}; folder {printable(event.output_dir, 200)}"
    )


def evaluation_words(event: EvaluationDone) -> str:
    gap = ""
    if event.train_loss is not None:
        gap = f" (training {event.train_loss:.4f}, gap {event.val_loss - event.train_loss:+.4f})"
    by_source = printable(loss_words(event.source_losses), 200)
    sources = f"of sources {by_source}, " if by_source else ""
    return (
        f"validation at step {event.step}: loss {event.val_loss:.4f}{gap}, {sources}"
        f"{counted(event.num_rows, 'row')}, {duration_words(event.duration_s)}"
    )


def drift_words(event: DriftMeasured) -> str:
    """How far the weights are from those before training, in one line."""
    return (
        f"drift at step {event.step}: {event.kl:.4f} nats per token from the answers before "
        f"training, {event.num_changed} of "
        f"{counted(event.num_prompts, 'greedy answer')} changed, "
        f"{duration_words(event.duration_s)}"
    )


def drift_summary_words(summary: Mapping[str, Any]) -> str | None:
    """Drift at the end of a run and what a preview step pays for it; None where it has none.

    Args:
        summary: of the run, as in TrainingResult and RunEnded.
    """
    previews = summary.get("previews")
    drift = previews.get("drift") if isinstance(previews, dict) else None
    if not isinstance(drift, dict) or not isinstance(drift.get("kl"), float):
        return None
    words = (
        f"drift {drift['kl']:.4f} nats per token ({drift['num_changed']} of "
        f"{counted(drift['num_prompts'], 'answer')} changed"
    )
    seconds = drift.get("s_per_preview_step")
    return f"{words}; {seconds:.2f} s per preview step)" if seconds is not None else f"{words})"


def checkpoint_words(event: CheckpointSaved) -> str:
    """Where a checkpoint is."""
    path = printable(event.path, 200)
    return f"checkpoint of step {event.step}: {path}, {duration_words(event.duration_s)}"


def notice_words(event: Notice) -> str:
    """A notice; its further lines are indented, so that none can pose as another message."""
    prefix = "" if event.level == "info" else f"{event.level}: "
    lines = [printable(line, NOTICE_CHARS) for line in event.text.split("\n")]
    return prefix + "\n    ".join(lines)
