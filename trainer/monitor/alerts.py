"""Alerts: what a person should look at in a run now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from trainer.monitor.run_reader import RunReader

GAP_EVALUATIONS = 2
"""Evaluations in a row above the lowest one, by more than GAP_SHARE, that make an alert."""
GAP_SHARE = 0.02
RECENT_STEPS = 20
SLOW_SHARE = 0.7
"""Throughput of the recent steps below this share of the run's median makes an alert."""
MIN_STEPS_FOR_SPEED = 60
ACCURACY_DROP = 0.2
"""Share of matches below the best preview step's by more than this makes an alert."""
NEVER_STOP_SHARE = 0.5

Level = Literal["info", "warning", "error"]


@dataclass(frozen=True)
class Alert:
    """One thing to look at."""

    level: Level
    text: str


def alerts_of(reader: RunReader) -> list[Alert]:
    """The alerts of a run, errors first."""
    found = [
        *_ending_alerts(reader),
        *_loss_alerts(reader),
        *_speed_alerts(reader),
        *_preview_alerts(reader),
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
                f"{len(failed)} of {len(newest)} previews of step {step} have no answer: "
                f"{failed[0].error_message}",
            )
        )
    endless = sum("never_stopped" in result.health for result in newest)
    if step > 0 and endless and endless >= NEVER_STOP_SHARE * len(newest):
        found.append(
            Alert("warning", f"{endless} of {len(newest)} previews of step {step} never stop")
        )
    return found + _accuracy_alerts(reader)


def _accuracy_alerts(reader: RunReader) -> list[Alert]:
    shares = {step: right / of for step, (right, of) in reader.previews.accuracy().items()}
    if len(shares) < 2:
        return []
    last = max(shares)
    best = max(shares, key=lambda step: (shares[step], -step))
    found = []
    if shares[last] < shares[best] - ACCURACY_DROP:
        found.append(
            Alert(
                "warning",
                f"accuracy falls: {100 * shares[last]:.0f} % of the previews match at step {last}, "
                f"{100 * shares[best]:.0f} % did at step {best}",
            )
        )
    lost = [one for one in reader.previews.timelines.values() if one.is_lost()]
    if lost and found:
        names = ", ".join(repr(one.prompt[:60]) for one in lost[:3])
        found.append(Alert("info", f"right once and wrong now: {names}"))
    return found


def _file_alerts(reader: RunReader) -> list[Alert]:
    found = []
    if reader.problem is not None:
        found.append(Alert("warning", reader.problem))
    if reader.num_bad_lines:
        found.append(
            Alert("warning", f"{reader.num_bad_lines} unreadable lines in the run's files left out")
        )
    return found
