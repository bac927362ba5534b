"""Charts as geometry: paths, ticks and labels that a template draws as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

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
