"""MetricsTable: every step of a run in columns, small enough for very long runs.

100,000 steps take about 8 MB. Charts get at most MAX_POINTS of them, picked so that every spike
stays visible.
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.monitor.svg import LOG_RATIO

MAX_POINTS = 5_000
"""Most points of one chart (facts: 5,000 points reach the screen in 1.3 s)."""
COLUMNS = (
    "created_at",
    "epoch",
    "train_loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_s",
    "step_time_s",
    "eta_s",
    "memory_gib",
    "total_steps",
)
NAN = math.nan
SMOOTHING_SHARE = 0.025
"""Usual width of the window of a smoothed curve, as a share of the run's steps."""


@dataclass(frozen=True)
class Evaluation:
    """A loss on held-out rows."""

    step: int
    val_loss: float
    train_loss: float
    """NaN where it is not known."""


class MetricsTable:
    """Steps and evaluations in the order of the file; a value that is missing is NaN."""

    def __init__(self) -> None:
        """Start empty."""
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.steps = array("q")
        self.columns: dict[str, array[float]] = {name: array("d") for name in COLUMNS}
        self.evaluations: list[Evaluation] = []
        self.non_finite: dict[int, str] = {}
        """Step -> what was not finite in it, such as `train_loss nan`; the first hundred."""
        self._is_sorted = True

    def __len__(self) -> int:
        """Steps that count."""
        return len(self.steps)

    def add(self, row: Mapping[str, Any]) -> None:
        """Take one line of metrics.jsonl; other types than StepDone and EvaluationDone are left."""
        step, kind = row["step"], row.get("type")
        if kind == "StepDone":
            self._is_sorted = self._is_sorted and (not self.steps or step >= self.steps[-1])
            self.steps.append(step)
            for name, column in self.columns.items():
                value = row.get(name)
                column.append(value if isinstance(value, float | int) else NAN)
            self._note_non_finite(row)
        elif kind == "EvaluationDone":
            losses = (_number(row.get("val_loss")), _number(row.get("train_loss")))
            self.evaluations.append(Evaluation(step, *losses))

    def add_steps(self, rows: list[dict[str, Any]]) -> None:
        """Take many StepDone lines at once: the same as `add` on each, several times faster."""
        try:
            steps = array("q", [row["step"] for row in rows])
            columns = {name: array("d", [row[name] for row in rows]) for name in COLUMNS}
        except (KeyError, TypeError):  # something is missing or no number: look at each
            for row in rows:
                self.add(row)
            return
        for row in rows:
            if "non_finite" in row:
                self._note_non_finite(row)
        joined = np.concatenate([np.array(self.steps[-1:], dtype=np.int64), np.asarray(steps)])
        self._is_sorted = self._is_sorted and bool((np.diff(joined) >= 0).all())
        self.steps.extend(steps)
        for name, column in columns.items():
            self.columns[name].extend(column)

    def _note_non_finite(self, row: Mapping[str, Any]) -> None:
        odd = row.get("non_finite")
        if isinstance(odd, dict) and len(self.non_finite) < 100:
            words = ", ".join(f"{name} {text}" for name, text in odd.items())
            self.non_finite[row["step"]] = words

    def drop_after(self, step: int) -> None:
        """Forget the steps above `step`: a resumed run makes them again."""
        self.evaluations = [one for one in self.evaluations if one.step <= step]
        self.non_finite = {at: text for at, text in self.non_finite.items() if at <= step}
        if self._is_sorted:
            keep: Any = slice(0, int(np.searchsorted(self.steps, step, side="right")))
            if keep.stop == len(self.steps):
                return
            self.steps = self.steps[keep]
            self.columns = {name: column[keep] for name, column in self.columns.items()}
            return
        mask = np.asarray(self.steps) <= step
        self.steps = array("q", np.asarray(self.steps)[mask].tolist())
        for name, column in self.columns.items():
            self.columns[name] = array("d", np.asarray(column)[mask].tolist())

    def has(self, name: str) -> bool:
        """Whether a column has a value."""
        return any(value == value for value in reversed(self.columns[name]))

    def newest(self, name: str) -> float:
        """The last value of a column; NaN where there is none."""
        column = self.columns[name]
        return column[-1] if column else NAN

    def last(self, name: str, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        """The last `count` values of a column, without missing ones."""
        values: np.ndarray[Any, np.dtype[np.float64]]
        values = np.array(self.columns[name][-count:], dtype=np.float64)
        return values[~np.isnan(values)]

    def series(self, name: str, *, max_points: int = MAX_POINTS) -> list[tuple[int, float]]:
        """(step, value) points for a chart.

        Args:
            name: one of COLUMNS.
            max_points: most points; of each stretch of steps the lowest and the highest stay.
        """
        steps, values = self._known(name)
        picked = pick_points(values, max_points)
        return list(zip(steps[picked].tolist(), values[picked].tolist(), strict=True))

    def smoothed(
        self, name: str, share: float, *, is_log: bool = False, max_points: int = MAX_POINTS
    ) -> list[tuple[int, float]]:
        """(step, value) points of a column without its noise, at evenly spread steps.

        Args:
            share: width of the window as a share of the run's steps, as in SMOOTHING_SHARE.
            is_log: the chart's axis is logarithmic: a geometric mean instead of a median.
        """
        steps, values = self._known(name)
        half = window_half(len(values), share)
        picked = np.unique(np.linspace(0, max(len(values) - 1, 0), max_points).astype(np.int64))
        picked = picked[: len(values)]
        smooth = centred(values, picked, half, is_log=is_log)
        return list(zip(steps[picked].tolist(), smooth.tolist(), strict=True))

    def _known(
        self, name: str
    ) -> tuple[np.ndarray[Any, np.dtype[np.int64]], np.ndarray[Any, np.dtype[np.float64]]]:
        """Steps and values of a column without missing ones, (N,) each."""
        steps = np.array(self.steps, dtype=np.int64)
        values = np.array(self.columns[name], dtype=np.float64)
        known = ~np.isnan(values)
        return steps[known], values[known]


def is_spread_wide(metrics: MetricsTable) -> bool:
    """Whether the loss is better seen on a log scale."""
    losses = metrics.last("train_loss", len(metrics))
    return bool(len(losses)) and losses.min() > 0 and losses.max() >= LOG_RATIO * losses.min()


def window_half(count: int, share: float) -> int:
    """Steps on either side of a smoothed point: its window is about `share` of all of them."""
    return round(share * count / 2)


def centred(
    values: np.ndarray[Any, np.dtype[np.float64]],
    at: np.ndarray[Any, np.dtype[np.int64]],
    half: int,
    *,
    is_log: bool = False,
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The middle of the values around each index in `at`.

    A window reaches `half` values to either side, fewer at the ends of the run, so that the curve
    neither runs behind the values, as an exponential mean does, nor ahead of them.

    Args:
        values: (N,), finite or infinite.
        at: (M,) indices.
        is_log: the geometric mean of a window whose values are all above 0; else the median.
    Returns:
        (M,).
    """
    found = np.empty(len(at), dtype=np.float64)
    for nth, index in enumerate(at.tolist()):
        reach = min(half, index, len(values) - 1 - index)
        # At the very ends two values more, or the first and the last would be noise alone.
        low, high = max(0, index - max(reach, 1)), index + max(reach, 1) + 1
        window = values[low:high] if half else values[index : index + 1]
        if is_log and (window > 0).all():
            found[nth] = np.exp(np.log(window).mean())
        else:
            found[nth] = np.median(window)
    return found


def _number(value: Any) -> float:
    return float(value) if isinstance(value, float | int) else NAN


def pick_points(
    values: np.ndarray[Any, np.dtype[np.float64]], max_points: int
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Indices of at most `max_points` values: first, last, and each bucket's lowest and highest."""
    count = len(values)
    if count <= max_points:
        return np.arange(count)
    num_buckets = max(1, (max_points - 2) // 2)
    edges = np.linspace(1, count - 1, num_buckets + 1).astype(np.int64)
    picked = [np.array([0, count - 1])]
    for low, high in itertools.pairwise(edges.tolist()):
        if high > low:
            bucket = values[low:high]
            picked.append(low + np.array([int(bucket.argmin()), int(bucket.argmax())]))
    return np.unique(np.concatenate(picked))
