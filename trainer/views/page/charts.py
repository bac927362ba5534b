"""Charts of the live page: ECharts options from a run, at most MAX_POINTS points each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from trainer.views.metrics import MAX_POINTS, pick_points, window_half
from trainer.views.run_reader import RunReader

LOSS_POINTS = 1_600
"""Of the raw and of the smoothed curve: two for every pixel of a wide screen and half again."""

SMALL_POINTS = 700

SMOOTH_POINTS = 400
"""A curve without noise needs no more."""

MAX_EVALUATIONS = MAX_POINTS - 2 * LOSS_POINTS

PERCENT = (0.0, 100.0)

DIGITS = 6
"""Significant digits sent: more would be bytes that no screen shows."""

INK = {False: "#57606a", True: "#9aa7b4"}

GRID = {False: "#d0d7de", True: "#30363d"}

COLOURS = {
    False: {
        **{"train": "#0b61c4", "val": "#b34a00", "extra": "#6b2fb3", "other": "#116329"},
        **{"fifth": "#b0126f", "sixth": "#57606a"},
    },
    True: {
        **{"train": "#6cb6ff", "val": "#ffa657", "extra": "#d2a8ff", "other": "#7ee2a0"},
        **{"fifth": "#ff8fc7", "sixth": "#b1bac4"},
    },
}

SCORE_COLOURS = ("train", "val", "other")

Points = Sequence[tuple[float, float]]


def line(
    name: str, points: Points, colour: str, *, is_log: bool = False, **more: Any
) -> dict[str, Any]:
    """One curve."""
    kept = [point for point in points if math.isfinite(point[1]) and (point[1] > 0 or not is_log)]
    return {
        "name": name,
        "type": "line",
        # Whole columns: NiceGUI watches every list it is given, and a list per point is slow.
        "dataset": {
            "x": [x for x, _ in kept],
            "y": [float(f"{y:.{DIGITS}g}") for _, y in kept],
        },
        "encode": {"x": "x", "y": "y"},
        "showSymbol": len(kept) <= 60 and bool(more.pop("dots", False)),
        "symbolSize": 6,
        "lineStyle": {"width": 1.5, "color": colour, **more.pop("style", {})},
        "itemStyle": {"color": colour},
        "animation": False,
        **more,
    }


def chart(
    series: list[dict[str, Any]],
    *,
    is_dark: bool,
    is_log: bool = False,
    y_range: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """The options of a chart of step against something."""
    sources = [{"source": one.pop("dataset")} for one in series]
    series = [{**one, "datasetIndex": index} for index, one in enumerate(series)]
    ink, grid = INK[is_dark], GRID[is_dark]
    label = {"color": ink, "fontSize": 12}
    return {
        "animation": False,
        "textStyle": {"color": ink},
        "tooltip": {"trigger": "axis", "renderMode": "richText"},  # no HTML anywhere
        "legend": {"textStyle": label, "top": 0} if len(series) > 1 else {"show": False},
        "grid": {"left": 62, "right": 18, "top": 32 if len(series) > 1 else 14, "bottom": 28},
        "xAxis": {
            "type": "value",
            "min": "dataMin",
            "max": "dataMax",
            "axisLabel": label,
            "splitLine": {"show": False},
        },
        "yAxis": {
            "type": "log" if is_log else "value",
            "scale": True,
            **({"min": y_range[0], "max": y_range[1]} if y_range is not None else {}),
            "axisLabel": label,
            "splitLine": {"lineStyle": {"color": grid}},
        },
        "dataset": sources,
        "series": series,
    }


def loss_chart(
    reader: RunReader, *, smoothing: float, is_log: bool, is_dark: bool
) -> dict[str, Any]:
    """Training loss (raw, smoothed) and validation loss.

    Args:
        smoothing: width of the window as a share of the run's steps; 0 for none.
    """
    colours, metrics = COLOURS[is_dark], reader.metrics
    raw = metrics.series("train_loss", max_points=LOSS_POINTS)
    series = []
    if window_half(len(metrics), smoothing):
        faint = {"opacity": 0.35, "width": 1}
        series.append(line("training", raw, colours["train"], is_log=is_log, style=faint))
        smoothed = metrics.smoothed(
            "train_loss", smoothing, is_log=is_log, max_points=SMOOTH_POINTS
        )
        style = {"width": 2.5}
        series.append(
            line("training, smoothed", smoothed, colours["train"], is_log=is_log, style=style)
        )
    else:
        series.append(line("training", raw, colours["train"], is_log=is_log))
    series.append(validation_line("validation", reader, colours["val"], is_log=is_log))
    return chart(series, is_dark=is_dark, is_log=is_log)


def validation_line(
    name: str, reader: RunReader, colour: str, *, is_log: bool = False
) -> dict[str, Any]:
    """The loss on held-out rows."""
    points = [
        (float(one.step), one.val_loss) for one in reader.metrics.evaluations[-MAX_EVALUATIONS:]
    ]
    return line(name, points, colour, is_log=is_log, dots=True, style={"type": "dashed"})


def metric_chart(reader: RunReader, name: str, *, is_dark: bool) -> dict[str, Any]:
    """One column of the metrics."""
    points = reader.metrics.series(name, max_points=SMALL_POINTS)
    return chart([line(name, points, COLOURS[is_dark]["train"])], is_dark=is_dark)


SOURCE_COLOURS = ("train", "val", "extra", "other", "fifth", "sixth")


def source_chart(reader: RunReader, *, smoothing: float, is_dark: bool) -> dict[str, Any]:
    """Loss of each source: training, smoothed, and of held-out rows.

    Args:
        smoothing: as of `loss_chart`.
    """
    metrics, series = reader.metrics, []
    names = sorted({*metrics.source_losses.steps, *metrics.source_val_losses.steps})
    trained, held = metrics.source_losses.smoothed(smoothing), metrics.source_val_losses.points()
    for number, name in enumerate(names):
        colour = COLOURS[is_dark][SOURCE_COLOURS[number % len(SOURCE_COLOURS)]]
        if name in trained:
            series.append(line(name, _picked(trained[name]), colour))
        if name in held:
            points, style = _picked(held[name]), {"type": "dashed"}
            series.append(line(f"{name}, validation", points, colour, dots=True, style=style))
    return chart(series, is_dark=is_dark)


def _picked(points: Points) -> Points:
    """As many as a small chart shows."""
    picked = pick_points(np.array([value for _, value in points]), SMALL_POINTS)
    return [points[index] for index in picked.tolist()]


def drift_chart(reader: RunReader, *, is_dark: bool) -> dict[str, Any]:
    """How far the weights are from those before training."""
    points = [(float(step), kl) for step, kl in reader.metrics.drift_points()]
    picked = pick_points(np.array([kl for _, kl in points]), SMALL_POINTS)
    shown = [points[index] for index in picked.tolist()]
    return chart([line("drift", shown, COLOURS[is_dark]["extra"], dots=True)], is_dark=is_dark)


def match_line(name: str, reader: RunReader, colour: str) -> dict[str, Any]:
    """Share of previews that match, by step, in percent."""
    accuracy = reader.previews.accuracy()
    points = [(float(step), 100 * right / of) for step, (right, of) in accuracy.items()]
    picked = pick_points(np.array([share for _, share in points]), SMALL_POINTS)
    return line(name, [points[index] for index in picked.tolist()], colour, dots=True)


def match_chart(reader: RunReader, *, is_dark: bool) -> dict[str, Any]:
    """How many previews match, how likely their golden tokens are, and their scores."""
    colours = COLOURS[is_dark]
    series = [match_line("previews that match", reader, colours["extra"])]
    for number, (name, points) in enumerate(reader.metrics.score_curves().items()):
        picked = pick_points(np.array([share for _, share in points]), SMALL_POINTS)
        colour = colours[SCORE_COLOURS[number % len(SCORE_COLOURS)]]
        # Colours come round again: then the dashes tell curves apart.
        style = {"type": "solid" if number < len(SCORE_COLOURS) else "dashed"}
        shown = [points[index] for index in picked.tolist()]
        series.append(line(name, shown, colour, dots=True, style=style))
    return chart(series, is_dark=is_dark, y_range=PERCENT)
