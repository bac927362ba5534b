"""MetricsTable: every step of a run in columns, small enough for very long runs.

100,000 steps take about 8 MB. Charts get at most MAX_POINTS of them, picked so that every spike
stays visible.
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

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
        self._means: dict[str, ExponentialMean] = {}

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
            self._means.clear()
            self.steps = self.steps[keep]
            self.columns = {name: column[keep] for name, column in self.columns.items()}
            return
        self._means.clear()
        mask = np.asarray(self.steps) <= step
        self.steps = array("q", np.asarray(self.steps)[mask].tolist())
        for name, column in self.columns.items():
            self.columns[name] = array("d", np.asarray(column)[mask].tolist())

    def newest(self, name: str) -> float:
        """The last value of a column; NaN where there is none."""
        column = self.columns[name]
        return column[-1] if column else NAN

    def last(self, name: str, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        """The last `count` values of a column, without missing ones."""
        values: np.ndarray[Any, np.dtype[np.float64]]
        values = np.array(self.columns[name][-count:], dtype=np.float64)
        return values[~np.isnan(values)]

    def series(
        self, name: str, *, smoothing: float = 0.0, max_points: int = MAX_POINTS
    ) -> list[tuple[int, float]]:
        """(step, value) points for a chart.

        Args:
            name: one of COLUMNS.
            smoothing: weight of the past in an exponential mean, from 0 (none) below 1.
            max_points: most points; of each stretch of steps the lowest and the highest stay.
        """
        steps = np.array(self.steps, dtype=np.int64)
        column = self._smoothed(name, smoothing) if smoothing > 0 else self.columns[name]
        values = np.array(column, dtype=np.float64)
        known = ~np.isnan(values)
        steps, values = steps[known], values[known]
        picked = pick_points(values, max_points)
        return list(zip(steps[picked].tolist(), values[picked].tolist(), strict=True))

    def _smoothed(self, name: str, weight: float) -> array[float]:
        """The exponential mean of a column; goes on from where the last call stopped."""
        kept = self._means.get(name)
        if kept is None or kept.weight != weight:
            kept = self._means[name] = ExponentialMean(weight)
        kept.extend(self.columns[name][len(kept.means) :])
        return kept.means


class ExponentialMean:
    """The exponential mean of a growing row of numbers."""

    def __init__(self, weight: float) -> None:
        """Take the weight of the past, from 0 below 1."""
        self.weight = weight
        self.means = array("d")
        self._mean, self._scale = 0.0, 1.0

    def extend(self, values: Iterable[float]) -> None:
        """Go on; a NaN stays a NaN and changes nothing after it."""
        weight, mean, scale = self.weight, self._mean, self._scale
        for value in values:
            if value != value:
                self.means.append(value)
                continue
            mean = weight * mean + (1 - weight) * value
            scale *= weight
            # Divided as in Adam: without it the first values would be pulled towards 0.
            self.means.append(mean / (1 - scale))
        self._mean, self._scale = mean, scale


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
