"""What a run was and is, as (label, value) pairs, and its alerts: what to look at now."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import numpy as np

from trainer.counts import counted
from trainer.monitoring.events import TRAINING, printable
from trainer.monitoring.status_schema import DecidingStatus
from trainer.scores.statistics import SIGNIFICANCE, sign_test
from trainer.views.run_reader import RunReader
from trainer.views.score_words import figure_rows
from trainer.views.source_curves import loss_words
from trainer.views.words import STATE_REASON_CHARS, drift_summary_words, duration_words


def bar_figures(reader: RunReader) -> list[str]:
    """What stands beside the state of a run: model, time, speed, memory, drift."""
    status, metrics = reader.status, reader.metrics
    if status is None:
        return []
    memory, speed = metrics.newest("memory_gib"), metrics.last("tokens_per_s", RECENT_STEPS)
    rate = metrics.newest("learning_rate")
    found = [
        status.model_name or "",
        duration_words(reader.duration_s()),
        f"{float(np.median(speed)):,.0f} tokens/s" if len(speed) else "",
        f"{memory:.1f} GiB" if memory == memory else "",
        f"lr {rate:.2e}" if rate == rate and not reader.is_over else "",
    ]
    if metrics.drifts and math.isfinite(metrics.drifts[-1].kl):
        found.append(f"drift {metrics.drifts[-1].kl:.3f} nats per token")
    if status.deciding is not None:
        found.append(f"{status.deciding.metric} decides: {deciding_words(status.deciding)}")
    return [one for one in found if one]


def deciding_words(found: DecidingStatus) -> str:
    """Such as `best step 60, 1 of 3 evaluations without a clear rise, waited 2 s`."""
    parts = [f"best step {found.best_step}" if found.best_step else "no best step yet"]
    if found.patience:
        patience = counted(found.patience, "evaluation")
        parts.append(f"{found.num_without} of {patience} without a clear rise")
    if found.num_missing:
        parts.append(f"{found.num_missing} missing")
    if found.waited_s:
        parts.append(f"training waited {duration_words(found.waited_s)}")
    return ", ".join(parts)


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
        ("began", moment(reader.began_at())),
        ("resumed", f"at step {status.start_step}" if status.start_step else ""),
        ("last update", moment(status.updated_at)),
        ("duration", duration_words(reader.duration_s())),
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
    rows.append(("last loss of each source", loss_words(metrics.source_losses.newest())))
    held_out = loss_words(metrics.source_val_losses.newest())
    rows.append(("last validation loss of each source", held_out))
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
    rows += figure_rows(reader.metrics.newest_scores())
    summary = reader.status.summary if reader.status is not None else {}
    rows += final_figures(reader)
    rows.append(("drift from the answers before training", drift_summary_words(summary) or ""))
    previews, durations = summary.get("previews"), summary.get("durations_s")
    waited = previews.get("stall_s_total") if isinstance(previews, dict) else None
    trained = durations.get("training") if isinstance(durations, dict) else None
    if isinstance(waited, float | int) and isinstance(trained, float | int) and trained > 0:
        figure = f"{waited:.1f} s, {100 * waited / trained:.1f} % of training"
        rows.append(("training waited for previews", figure))
    if summary.get("stop_reason"):
        rows.append(("stopped because", str(summary["stop_reason"])))
    return [*rows, *choice_rows(summary)]


def choice_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The best step, whose weights the final model has, and what waiting for scores cost."""
    best, final, deciding = (summary.get(name) for name in ("best", "final_model_step", "deciding"))
    rows = []
    if isinstance(best, Mapping):
        value = best.get("value")
        known = f", {value:.4g}" if isinstance(value, float | int) else ""
        rows.append(("best step", f"{best.get('step')} (by {best.get('by')}{known})"))
    if final is not None:
        rows.append(("final model", f"weights of step {final}"))
    if isinstance(deciding, Mapping):
        rows.append(("training waited for scores", f"{deciding.get('waited_s')} s"))
        missing = [
            f"{one.get('metric')} at step {', '.join(map(str, one.get('missing_steps', ())))}"
            for one in deciding.get("rules", ())
            if one.get("missing_steps")
        ]
        if missing:
            rows.append(("decided nothing, as they are missing", "; ".join(missing)))
    return rows


def final_figures(reader: RunReader) -> list[tuple[str, str]]:
    """The scores of the final evaluation, such as `99.0 % (198/200)`; none where there was none."""
    final = reader.final_evaluation
    if final is None:
        return []
    rows = [(f"{label}, final evaluation", value) for label, value in final.figure_rows]
    return [("exact match, final evaluation", final.score_words), *rows]


def _number(value: float, form: str) -> str:
    return "" if math.isnan(value) else form.format(value)


def moment(seconds: float) -> str:
    """A time of day for people; empty where it is none."""
    try:
        return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
    except (OverflowError, ValueError, OSError):
        return ""


# ---- alerts: what a person should look at in a run now


GAP_EVALUATIONS = 2
"""Evaluations in a row above the lowest one, by more than GAP_SHARE, that make an alert."""

GAP_SHARE = 0.02

RECENT_STEPS = 20

SLOW_SHARE = 0.7
"""Throughput of the recent steps below this share of the run's median makes an alert."""

MIN_STEPS_FOR_SPEED = 60

FALLING_PREVIEWS = 2
"""Preview steps in a row that are worse than the best one before them that make an alert."""

NEVER_STOP_SHARE = 0.5

DRIFT_KL = 0.15
"""Nats per token, which is 10 for an answer of 64. Seen with an instruct model of 135M: at most
0.07 after a run on GSM8K, at least 0.2 after one as long on answers of emoji only."""

Level = Literal["info", "warning", "error"]


@dataclass(frozen=True)
class Alert:
    """One thing to look at."""

    level: Level
    text: str
    prompt: str | None = None
    """Key of the prompt that it is about, if it is about one."""
    step: int | None = None
    """The preview step that it is about."""


def alerts_of(reader: RunReader) -> list[Alert]:
    """The alerts of a run, errors first."""
    found = [
        *_ending_alerts(reader),
        *_silence_alerts(reader),
        *_loss_alerts(reader),
        *_speed_alerts(reader),
        *_preview_alerts(reader),
        *_drift_alerts(reader),
        *_deciding_alerts(reader),
        *_file_alerts(reader),
    ]
    order = {"error": 0, "warning": 1, "info": 2}
    return sorted(found, key=lambda alert: order[alert.level])


def _ending_alerts(reader: RunReader) -> list[Alert]:
    status = reader.status
    found = []
    if status is not None and status.error is not None:
        found.append(Alert("error", status.error.message))
    going_on = reader.going_on()
    return [*found, Alert("info", going_on)] if going_on else found


def _silence_alerts(reader: RunReader) -> list[Alert]:
    """A run that says nothing for longer than its pace explains.

    With the time of day of its last word: a count of seconds would be read aloud at each of them.
    """
    found = reader.silence()
    if found is None:
        return []
    since = moment(found.since)
    if found.phase == TRAINING:
        pace = duration_words(found.step_time_s)
        usual = f"; a step takes {pace}" if found.step_time_s > 0 else ""
        words = f"the run hangs, or waits for its machine: no update since {since}{usual}"
        return [Alert("warning", words)]
    phase = printable(found.phase, STATE_REASON_CHARS)
    return [Alert("info", f"no update since {since}: {phase}")]


def _loss_alerts(reader: RunReader) -> list[Alert]:
    found = [
        Alert("error", f"not finite at step {step}: {what}")
        for step, what in list(reader.metrics.non_finite.items())[-1:]
    ]
    evaluations = [one for one in reader.metrics.evaluations if one.val_loss == one.val_loss]
    if len(evaluations) <= GAP_EVALUATIONS:
        return found
    lowest = min(evaluations, key=lambda one: one.val_loss)
    recent = evaluations[-GAP_EVALUATIONS:]
    if all(one.val_loss > lowest.val_loss * (1 + GAP_SHARE) for one in recent):
        found.append(
            Alert(
                "warning",
                f"validation loss rises: {recent[-1].val_loss:.4f} at step {recent[-1].step}, "
                f"lowest {lowest.val_loss:.4f} at step {lowest.step}",
            )
        )
    return found


def _speed_alerts(reader: RunReader) -> list[Alert]:
    if reader.is_over or len(reader.metrics) < MIN_STEPS_FOR_SPEED:
        return []
    usual = reader.metrics.last("tokens_per_s", len(reader.metrics))
    recent = reader.metrics.last("tokens_per_s", RECENT_STEPS)
    if not len(recent):
        return []
    before, now = float(np.median(usual)), float(np.median(recent))
    if now >= SLOW_SHARE * before:
        return []
    return [
        Alert(
            "warning",
            f"throughput fell: {now:,.0f} tokens/s in the last {RECENT_STEPS} steps, "
            f"{before:,.0f} over the run",
        )
    ]


def _preview_alerts(reader: RunReader) -> list[Alert]:
    found: list[Alert] = []
    newest = reader.previews.newest()
    if not newest:
        return found
    step = newest[0].step
    failed = [result for result in newest if not (result.ok or result.is_superseded)]
    if failed:
        found.append(
            Alert(
                "warning",
                f"{len(failed)} of {counted(len(newest), 'preview')} of step {step} without an "
                f"answer: {failed[0].error_message}",
                prompt=failed[0].prompt_id or failed[0].prompt,
                step=step,
            )
        )
    endless = [result for result in newest if "never_stopped" in result.health]
    if step > 0 and endless and len(endless) >= NEVER_STOP_SHARE * len(newest):
        found.append(
            Alert(
                "warning",
                f"{len(endless)} of {counted(len(newest), 'preview')} of step {step} never stopped",
                prompt=endless[0].prompt_id or endless[0].prompt,
                step=step,
            )
        )
    return found + _accuracy_alerts(reader)


def _accuracy_alerts(reader: RunReader) -> list[Alert]:
    """Fewer right than at the best step before, prompt by prompt, at two preview steps in a row."""
    shares = {step: right / of for step, (right, of) in reader.previews.accuracy().items()}
    if len(shares) <= FALLING_PREVIEWS:
        return []
    steps = sorted(shares)
    recent = steps[-FALLING_PREVIEWS:]
    best = max(steps[:-FALLING_PREVIEWS], key=lambda step: (shares[step], -step))
    before, now = _matches(reader, best), _matches(reader, recent[-1])
    if not all(_has_fallen(_matches(reader, step), before) for step in recent):
        return []
    common = [key for key in now if key in before]  # one without an answer before lost nothing
    right, were_right = (sum(answers[key] for key in common) for answers in (now, before))
    lost = [key for key in common if before[key] and not now[key]]
    names = ", ".join(repr(reader.previews.timelines[key].prompt[:60]) for key in lost[:3])
    words = (
        f"accuracy falls: {right} of {counted(len(common), 'preview')} match at step {recent[-1]}, "
        f"{were_right} did at step {best}",
        f"answered correctly at step {best}, wrong now: {names}",
    )
    return [
        Alert("warning", words[0], prompt=lost[0], step=recent[-1]),
        Alert("info", words[1], prompt=lost[0], step=recent[-1]),
    ]


def _matches(reader: RunReader, step: int) -> dict[str, bool]:
    """Prompt -> whether its answer matches, of those that were compared."""
    results = reader.previews.of_step(step)
    return {one.prompt_id or one.prompt: one.matches for one in results if one.matches is not None}


def _has_fallen(now: Mapping[str, bool], before: Mapping[str, bool]) -> bool:
    """Whether the same prompts are right less often by more than chance (McNemar's exact test)."""
    common = now.keys() & before.keys()
    gained = sum(now[key] and not before[key] for key in common)
    lost = sum(before[key] and not now[key] for key in common)
    return lost > gained and sign_test(gained, lost) < SIGNIFICANCE


def _deciding_alerts(reader: RunReader) -> list[Alert]:
    found = reader.status.deciding if reader.status is not None else None
    if found is None or found.missing is None:
        return []
    words = f"{found.metric} of step {found.evaluation_step} is missing and decides nothing: "
    return [Alert("warning", words + found.missing)]


def _drift_alerts(reader: RunReader) -> list[Alert]:
    if not reader.metrics.drifts:
        return []
    newest = reader.metrics.drifts[-1]
    if not newest.kl > DRIFT_KL:
        return []
    return [
        Alert(
            "warning",
            f"drift of {newest.kl:.2f} nats per token from the answers before training, at step "
            f"{newest.step} on prompts that are not trained: {newest.num_changed} of "
            f"{counted(newest.num_prompts, 'greedy answer')} changed, most "
            f"{newest.worst_prompt[:60]!r}",
        )
    ]


def _file_alerts(reader: RunReader) -> list[Alert]:
    found = []
    if reader.problem is not None:
        found.append(Alert("warning", reader.problem))
    if reader.num_bad_lines:
        bad = counted(reader.num_bad_lines, "unreadable line")
        found.append(Alert("warning", f"{bad} in the run's files left out"))
    return found


# ---- what run.json says of the data and the machine


def card_rows(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The data card's lines as the run recorded them; empty where there is no card.

    Versions that recorded no lines left the values only: these are shown under their own names.
    """
    lines = _pairs(manifest.get("data_card_lines"))
    if lines:
        return [(str(label), str(value)) for label, value in lines]
    card = manifest.get("data_card")
    if not isinstance(card, Mapping):
        return []
    return [
        (str(key).replace("_", " "), value if isinstance(value, str) else json.dumps(value))
        for key, value in card.items()
        if value not in (None, "", [], {}) and key not in ("sample", "row_lines")
    ]


def card_sample(manifest: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """The first training row as (text, is trained) stretches."""
    card = manifest.get("data_card")
    stretches = _pairs(card.get("sample") if isinstance(card, Mapping) else None)
    return [(str(text), bool(is_trained)) for text, is_trained in stretches]


def environment_rows(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Precision, attention, device, machine and versions as (label, value) lines."""
    environment = manifest.get("environment")
    found = {key: manifest.get(key) for key in ("precision", "attention", "device")}
    rows: list[tuple[str, str]] = []
    for key, value in (
        found | dict(environment if isinstance(environment, Mapping) else {})
    ).items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{name} {item}" for name, item in value.items() if item is not None)
        elif isinstance(value, list):
            value = ", ".join(map(str, value)) or "none"
        if value is not None:
            rows.append((str(key).replace("_", " "), str(value)))
    return rows


def _pairs(found: Any) -> list[list[Any]]:
    """The members of a list from a file that are lists of two."""
    items = found if isinstance(found, list) else []
    return [item for item in items if isinstance(item, list) and len(item) == 2]
