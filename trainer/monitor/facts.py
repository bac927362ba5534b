"""The figures of a run as (label, value) pairs, the same on the page and in the report."""

from __future__ import annotations

import math
from datetime import datetime

import numpy as np

from trainer.monitor.run_reader import RunReader
from trainer.monitoring.text import duration_words


def live_figures(reader: RunReader) -> list[tuple[str, str]]:
    """What one wants to see while a run goes on, the most wanted first."""
    status, metrics = reader.status, reader.metrics
    rows = final_figures(reader)
    rows.append(("loss", _number(metrics.newest("train_loss"), "{:.4f}")))
    if status is not None and status.val_loss is not None:
        rows.append((f"validation loss, step {status.val_step}", f"{status.val_loss:.4f}"))
    rows.append(("learning rate", _number(metrics.newest("learning_rate"), "{:.2e}")))
    rows.append(("tokens/s", _number(metrics.newest("tokens_per_s"), "{:,.0f}")))
    rows.append(("memory", _number(metrics.newest("memory_gib"), "{:.1f} GiB")))
    accuracy = reader.previews.accuracy()
    if accuracy:
        step = max(accuracy)
        right, of = accuracy[step]
        trend = reader.previews.history().trend()
        value = f"{right} of {of}" + (f", {trend}" if trend else "")
        rows.append((f"previews that match, step {step}", value))
    return [(label, value) for label, value in rows if value]


def accuracy_words(reader: RunReader) -> str:
    """Matches of the newest previews, such as `3 of 4 match at step 40, rising`."""
    accuracy = reader.previews.accuracy()
    if not accuracy:
        return ""
    step = max(accuracy)
    right, of = accuracy[step]
    trend = reader.previews.history().trend()
    return f"{right} of {of} match at step {step}" + (f", {trend}" if trend else "")


def report_figures(reader: RunReader) -> list[tuple[str, str]]:
    """What one wants to know of a run afterwards."""
    status, metrics = reader.status, reader.metrics
    if status is None:
        return []
    rows = [
        ("model", status.model_name or ""),
        ("folder", status.output_dir or ""),
        ("began", moment(status.started_at)),
        ("last word", moment(status.updated_at)),
        ("duration", duration_words(max(0.0, status.updated_at - status.started_at))),
        ("steps", f"{reader.step} of {status.total_steps}" if status.total_steps else ""),
        ("epochs", f"{status.epoch:.2f} of {status.num_epochs:g}" if status.num_epochs else ""),
        ("rows", f"{status.num_train_rows:,} trained on" if status.num_train_rows else ""),
        ("rows per step", str(status.effective_batch_size or "")),
        ("last loss", _number(metrics.newest("train_loss"), "{:.4f}")),
    ]
    known = [one for one in metrics.evaluations if not math.isnan(one.val_loss)]
    if known:
        best = min(known, key=lambda one: one.val_loss)
        rows.append(("last validation loss", f"{known[-1].val_loss:.4f} (step {known[-1].step})"))
        rows.append(("lowest validation loss", f"{best.val_loss:.4f} (step {best.step})"))
    speed = metrics.last("tokens_per_s", len(metrics))
    if len(speed):
        rows.append(("tokens/s, median", f"{float(np.median(speed)):,.0f}"))
        memory = metrics.last("memory_gib", len(metrics))
        rows.append(("memory, highest", f"{float(memory.max()):.1f} GiB" if len(memory) else ""))
    rows += _summary_figures(reader)
    if status.last_checkpoint is not None:
        rows.append(("last checkpoint", status.last_checkpoint.path))
    return [(label, value) for label, value in rows if value]


def _summary_figures(reader: RunReader) -> list[tuple[str, str]]:
    """Accuracy, the final evaluation, and what previews cost."""
    rows = [("previews", accuracy_words(reader))]
    summary = reader.status.summary if reader.status is not None else {}
    rows += final_figures(reader)
    previews, durations = summary.get("previews"), summary.get("durations_s")
    waited = previews.get("stall_s_total") if isinstance(previews, dict) else None
    trained = durations.get("training") if isinstance(durations, dict) else None
    if isinstance(waited, float | int) and isinstance(trained, float | int) and trained > 0:
        figure = f"{waited:.1f} s, {100 * waited / trained:.1f} % of training"
        rows.append(("training waited for previews", figure))
    if summary.get("stop_reason"):
        rows.append(("stopped because", str(summary["stop_reason"])))
    return rows


def final_figures(reader: RunReader) -> list[tuple[str, str]]:
    """The score of the final evaluation, such as `99.0 % (198/200)`; none where there was none."""
    final = reader.final_evaluation
    return [("exact match, final evaluation", final.score_words)] if final is not None else []


def _number(value: float, form: str) -> str:
    return "" if math.isnan(value) else form.format(value)


def moment(seconds: float) -> str:
    """A time of day for people; empty where it is none."""
    try:
        return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
    except (OverflowError, ValueError, OSError):
        return ""
