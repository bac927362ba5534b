"""The metrics of a run in columns, and charts of them as geometry for inline SVG."""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic import ValidationError

from trainer.monitoring.events import ScoresDone
from trainer.scores.figures import ScoreFigure
from trainer.views.score_words import curve_name, shown_figures
from trainer.views.source_curves import SourceCurves

WIDTH, HEIGHT = 760, 260

LEFT, RIGHT, TOP, BOTTOM = 62, 14, 10, 28

LOG_RATIO = 20.0
"""Positive values whose highest is this many times the lowest are drawn on a log scale."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """One curve."""

    name: str
    style: str
    """Class name in the style sheet: `train`, `smooth`, `val` or `extra`."""
    path: str
    """SVG path data."""
    dots: tuple[tuple[float, float], ...] = ()
    """Places of markers, for curves with few points."""


@dataclass(frozen=True)
class Tick:
    """A mark on an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class Chart:
    """Everything a template needs to draw one chart."""

    title: str
    unit: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...] = ()
    y_ticks: tuple[Tick, ...] = ()
    is_log: bool = False
    summary: str = ""
    """The chart in words, for those who cannot see it."""
    width: int = WIDTH
    height: int = HEIGHT
    box: tuple[int, int, int, int] = field(
        default=(LEFT, TOP, WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM)
    )


def make_chart(
    title: str, unit: str, curves: Sequence[tuple[str, str, Points]], *, can_be_log: bool = False
) -> Chart | None:
    """Lay out a chart.

    Args:
        curves: (name, style, points) each; points are (step, value), finite ones only.
        can_be_log: use a log scale where values are positive and spread wide.
    Returns:
        None when there is no point at all.
    """
    curves = [curve for curve in curves if curve[2]]
    if not curves:
        return None
    xs = [x for _, _, points in curves for x, _ in points]
    ys = [y for _, _, points in curves for _, y in points]
    low, high = min(ys), max(ys)
    is_log = can_be_log and low > 0 and high / low >= LOG_RATIO
    x_scale = _Scale(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    y_scale = _Scale(low, high, HEIGHT - BOTTOM, TOP, is_log=is_log, margin=0.04)
    return Chart(
        title=title,
        unit=unit,
        lines=tuple(_line(curve, x_scale, y_scale) for curve in curves),
        x_ticks=tuple(Tick(x_scale(x), f"{x:,.0f}") for x in _whole_ticks(x_scale)),
        y_ticks=tuple(Tick(y_scale(y), short_number(y)) for y in y_scale.ticks()),
        is_log=is_log,
        summary=f"{title}: " + "; ".join(_in_words(name, points) for name, _, points in curves),
    )


class _Scale:
    """Values to pixels."""

    def __init__(
        self,
        low: float,
        high: float,
        start: float,
        end: float,
        *,
        is_log: bool = False,
        margin: float = 0.0,
    ) -> None:
        self.is_log = is_log
        low, high = (math.log10(low), math.log10(high)) if is_log else (low, high)
        if high <= low:
            pad = abs(low) * 0.1 or 1.0
            low, high = low - pad, high + pad
        pad = margin * (high - low)
        self.low, self.high = low - pad, high + pad
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        value = math.log10(value) if self.is_log else value
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """About five round values within the scale."""
        if self.is_log:
            return self._log_ticks()
        raw = (self.high - self.low) / 5
        power = 10 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw)
        first = math.ceil(self.low / step)
        return [index * step for index in range(first, math.floor(self.high / step) + 1)]

    def _log_ticks(self) -> list[float]:
        span = self.high - self.low
        digits = (1, 2, 5) if span < 2.5 else (1,)
        every = max(1, math.ceil(span / 7)) if span >= 2.5 else 1
        powers = range(math.floor(self.low), math.ceil(self.high) + 1, every)
        values = [digit * 10.0**power for power in powers for digit in digits]
        return [value for value in values if self.low <= math.log10(value) <= self.high]


def _whole_ticks(scale: _Scale) -> list[float]:
    return [x for x in scale.ticks() if abs(x - round(x)) < 1e-9]


def _line(curve: tuple[str, str, Points], x_scale: _Scale, y_scale: _Scale) -> Line:
    name, style, points = curve
    places = [(x_scale(x), y_scale(y)) for x, y in points]
    path = "M" + "L".join(f"{x:g} {y:g}" for x, y in places)
    few = len(places) <= 80 and style in ("val", "extra")
    return Line(name, style, path, tuple(places) if few or len(places) == 1 else ())


def short_number(value: float) -> str:
    """A number for an axis or a table: 1.2M, 15k, 0.25, 0.00015, 3e-05."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.4g}M"
    if size >= 1e4:
        return f"{value / 1e3:.4g}k"
    return f"{value:.4g}" if size >= 1e-3 else f"{value:.3g}"


def _in_words(name: str, points: Points) -> str:
    (first_x, first), (last_x, last) = points[0], points[-1]
    lowest = min(y for _, y in points)
    return (
        f"{name} from {short_number(first)} at step {first_x:,.0f} to {short_number(last)} at "
        f"step {last_x:,.0f}, lowest {short_number(lowest)}"
    )


# ---- MetricsTable: every step of a run in columns, small enough for very long runs
#
# 100,000 steps take about 8 MB. Charts get at most MAX_POINTS of them, picked so that every spike
# stays visible.


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
class EvaluationPoint:
    """A loss on held-out rows."""

    step: int
    val_loss: float
    train_loss: float
    """NaN where it is not known."""


@dataclass(frozen=True)
class DriftPoint:
    """How far weights are from those before training."""

    step: int
    kl: float
    """Nats per token; NaN where it is not known."""
    num_changed: int
    num_prompts: int
    worst_prompt: str


def scores_of_line(row: Mapping[str, Any]) -> ScoresDone | None:
    """The means that a line of metrics.jsonl tells; None where it is no such line."""
    source, figures = row.get("source"), row.get("figures")
    if source not in ("previews", "evaluation") or not isinstance(figures, list):
        return None
    try:
        found = tuple(ScoreFigure.model_validate(one) for one in figures)
    except ValidationError:
        return None
    return ScoresDone(step=row["step"], source=source, figures=found)


class MetricsTable:
    """Steps and evaluations in the order of the file; a value that is missing is NaN."""

    def __init__(self) -> None:
        """Start empty."""
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.steps = array("q")
        self.columns: dict[str, array[float]] = {name: array("d") for name in COLUMNS}
        self.evaluations: list[EvaluationPoint] = []
        self.drifts: list[DriftPoint] = []
        self.source_losses = SourceCurves("StepDone")
        self.source_val_losses = SourceCurves("EvaluationDone")
        self.scores: dict[str, dict[int, ScoresDone]] = {}
        """Source -> step -> means of what its prompts were answered."""
        self.non_finite: dict[int, str] = {}
        """Step -> what was not finite in it, such as `train_loss nan`; the first hundred."""
        self._is_sorted = True

    def __len__(self) -> int:
        """Steps that count."""
        return len(self.steps)

    def add(self, row: Mapping[str, Any]) -> None:
        """Take one line of metrics.jsonl; types that are not known are left."""
        step, kind = row["step"], row.get("type")
        if kind == "StepDone":
            self._is_sorted = self._is_sorted and (not self.steps or step >= self.steps[-1])
            self.steps.append(step)
            for name, column in self.columns.items():
                value = row.get(name)
                column.append(value if isinstance(value, float | int) else NAN)
            self.source_losses.add(row)
            self._note_non_finite(row)
        elif kind == "EvaluationDone":
            losses = (_number(row.get("val_loss")), _number(row.get("train_loss")))
            self.evaluations.append(EvaluationPoint(step, *losses))
            self.source_val_losses.add(row)
        elif kind == "DriftMeasured":
            counts = (row.get("num_changed"), row.get("num_prompts"))
            changed, of = (one if isinstance(one, int) else 0 for one in counts)
            prompt = str(row.get("worst_prompt") or "")
            self.drifts.append(DriftPoint(step, _number(row.get("kl")), changed, of, prompt))
        elif kind == "ScoresDone":
            found = scores_of_line(row)
            if found is not None:
                self.scores.setdefault(found.source, {})[step] = found

    def add_steps(self, rows: list[dict[str, Any]]) -> None:
        """Take many StepDone lines at once: the same as `add` on each, several times faster."""
        try:
            steps = array("q", [row["step"] for row in rows])
            columns = {name: array("d", [row[name] for row in rows]) for name in COLUMNS}
        except (KeyError, TypeError):  # something is missing or no number: look at each
            for row in rows:
                self.add(row)
            return
        self.source_losses.add_all(rows)
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
        self.drifts = [one for one in self.drifts if one.step <= step]
        for curves in (self.source_losses, self.source_val_losses):
            curves.drop_after(step)
        self.non_finite = {at: text for at, text in self.non_finite.items() if at <= step}
        self.scores = {
            source: {at: one for at, one in found.items() if at <= step}
            for source, found in self.scores.items()
        }
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

    def drift_points(self) -> list[tuple[int, float]]:
        """(step, nats per token) of what was measured."""
        return [(one.step, one.kl) for one in self.drifts if math.isfinite(one.kl)]

    def newest_scores(self) -> list[ScoresDone]:
        """The newest means of each source."""
        return [found[max(found)] for found in self.scores.values() if found]

    def score_curves(self) -> dict[str, list[tuple[float, float]]]:
        """Curve of each figure that is a share, in percent, by its source and name."""
        curves: dict[str, list[tuple[float, float]]] = {}
        for source, found in self.scores.items():
            for step in sorted(found):
                for figure in shown_figures(found[step].figures):
                    if figure.is_share:
                        name = curve_name(source, figure.name)
                        curves.setdefault(name, []).append((float(step), 100 * figure.mean))
        return curves

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
        steps, values = self.known(name)
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
        steps, values = self.known(name)
        half = window_half(len(values), share)
        picked = np.unique(np.linspace(0, max(len(values) - 1, 0), max_points).astype(np.int64))
        picked = picked[: len(values)]
        smooth = centred(values, picked, half, is_log=is_log)
        return list(zip(steps[picked].tolist(), smooth.tolist(), strict=True))

    def known(
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
    if not len(losses) or losses.min() <= 0:
        return False
    return bool(losses.max() >= LOG_RATIO * losses.min())


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
