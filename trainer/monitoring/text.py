"""Words, numbers and foreign text for the terminal; no output here."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from trainer.monitoring.events import EvaluationDone, RunEnded, StepDone
from trainer.preview.base import PreviewResult

ELISION = " ... "
MARKS = {True: "=", False: "x", None: "."}
"""Sign before a preview: matches its golden answer, does not, or cannot be compared."""
REASON_CHARS = 240
MARK_ERROR = "!"
MARK_SUPERSEDED = "-"
_NAMES = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_NON_FINITE = re.compile(r"step (?P<step>\d+): the (?P<what>loss|gradient norm) is")
_JOINERS = "\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"
"""Format characters that stay: Persian and Indian words, and many emoji, are written with them."""


def printable(text: str, limit: int) -> str:
    r"""Text of unknown origin on one line that cannot drive a terminal or forge a line.

    Control characters, escape sequences, line separators and invisible format characters
    (text direction among them) become escapes such as \n and \x1b.

    Args:
        limit: longest result in characters; the middle goes first, as answers end with what counts.
    """
    tail = max(0, limit - len(ELISION)) // 3
    head = max(0, limit - len(ELISION)) - tail
    if len(text) > limit + 1:  # do not escape what is not shown; keep it too long, so it is cut
        text = text[: limit + 1] if tail == 0 else text[: head + 1] + ELISION + text[-tail:]
    shown = "".join(_shown(char) for char in text)
    if len(shown) <= limit:
        return shown
    if tail == 0:
        return shown[: max(0, limit)]
    return shown[:head] + ELISION + shown[-tail:]


def _shown(char: str) -> str:
    if char.isprintable() or char in _JOINERS:
        return char
    category = unicodedata.category(char)
    if char == " " or category in ("Zs", "Co", "Cn"):  # unassigned: new emoji
        return char
    return _NAMES.get(char) or char.encode("unicode_escape", "surrogatepass").decode("ascii")


def mark_of(result: PreviewResult) -> str:
    """The sign of a preview: `=`, `x`, `.` (nothing to compare with) or `!` (no answer)."""
    if result.is_superseded:
        return MARK_SUPERSEDED
    return MARKS[result.matches] if result.ok else MARK_ERROR


def remarks_of(result: PreviewResult) -> str:
    """What a preview needs said beside it, such as `(repeats)`; "" when there is nothing."""
    remarks = [name.replace("_", " ") for name in result.health]
    if not result.held_out:
        remarks.insert(0, "trained on")
    return f"({', '.join(remarks)})" if remarks else ""


def match_words(results: tuple[PreviewResult, ...]) -> str:
    """Such as `3 of 4 match`."""
    compared = [result.matches for result in results if result.matches is not None]
    failed = sum(not result.ok for result in results)
    parts = [f"{sum(compared)} of {len(compared)} match"] if compared else []
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
        parts.append(f"all {counts['failed']} previews failed: {reason}")
    elif counts.get("last_step_failed"):
        parts.append(f"all previews of the last step failed: {reason}")
    if final and final["failed"] == final["num_prompts"]:
        parts.append(f"all {final['failed']} answers of the final evaluation failed")
    return "; ".join(parts) or None


def closing_words(
    event: RunEnded,
    step: StepDone | None,
    evaluation: EvaluationDone | None,
    elapsed_s: float,
    output_dir: str | None,
) -> str:
    """The run in one line, such as `completed, step 1000 of 1000, loss 0.12, 3 min, outputs`."""
    of_total = f" of {step.total_steps}" if step is not None else ""
    non_finite = non_finite_words(event.error_type, event.error_message)
    parts = [non_finite or f"{event.state}, step {event.step}{of_total}"]
    if step is not None:
        parts.append(f"loss {step.train_loss:.4f}")
    if evaluation is not None:
        parts.append(f"val loss {evaluation.val_loss:.4f}")
    parts.append(duration_words(elapsed_s))
    if output_dir is not None:
        parts.append(f"folder {printable(output_dir, 200)}")
    failure = preview_failure_words(event.summary)
    if failure is not None:
        parts.append(failure)
    return ", ".join(parts)
