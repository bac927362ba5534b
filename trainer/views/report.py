"""The report: one HTML file of a run, and the observer that writes it at the run's end.

The file needs no network, no script and no other file. Every text of a run goes through autoescaped
templates; nothing is marked as safe here.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trainer import __version__
from trainer.counts import counted
from trainer.files import replace_file
from trainer.monitoring.events import Event, RunStarted
from trainer.views.facts import (
    alerts_of,
    card_rows,
    card_sample,
    environment_rows,
    report_figures,
)
from trainer.views.headline import headline_of
from trainer.views.metrics import (
    SMOOTHING_SHARE,
    Chart,
    MetricsTable,
    Points,
    is_spread_wide,
    make_chart,
    pick_points,
)
from trainer.views.report_prompts import HEIGHT, NUM_OPEN, compared_of, prompt_cards
from trainer.views.run_reader import MANIFEST_NAME, ORIGINS_NAME, RunReader, config_rows
from trainer.views.score_words import certainty_words, curve_name, value_words
from trainer.views.timeline import MARK_WORDS, mark_of

REPORT_NAME = "report.html"

MAX_WRONG = 100
"""Wrong rows of the final evaluation shown; what is left out is counted."""

CHART_POINTS = 1_500

MIN_SMOOTHED = 50
"""Shorter curves are shown as they are."""


def write_report(reader: RunReader, path: Path) -> None:
    """Write what `reader` read as one HTML file, at one instant.

    Raises:
        OSError: it could not be written; an older report is whole.
    """
    replace_file(path, render_report(reader))


def render_report(reader: RunReader) -> str:
    """The report as HTML; `reader` was polled before."""
    final = reader.final_evaluation
    wrong = final.wrong[:MAX_WRONG] if final is not None else ()
    page: str = _template().render(
        name=reader.name,
        state=reader.state(),
        words=reader.words(),
        headline=headline_of(reader.previews, reader.metrics.evaluations, final),
        alerts=alerts_of(reader),
        figures=report_figures(reader),
        final=final,
        final_wrong=[(result, mark_of(result), compared_of(result)) for result in wrong],
        num_open=NUM_OPEN,
        charts=charts_of(reader),
        prompts=prompt_cards(reader.previews),
        strip_height=HEIGHT,
        mark_words=MARK_WORDS,
        evaluations=reader.metrics.evaluations,
        accuracy=reader.previews.accuracy(),
        scores=_scores(reader.metrics),
        card=card_rows(reader.manifest),
        sample=card_sample(reader.manifest),
        config=_config(reader),
        environment=environment_rows(reader.manifest),
        hashes=_hashes(reader.manifest),
        notices=reader.status.notices if reader.status else (),
        traceback=_traceback(reader),
        version=__version__,
        written=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    )
    return page


def _template() -> Any:
    # Nothing else of a run needs it, and importing it takes a while.
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("trainer.views"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["counted"] = counted
    return environment.get_template("report.html.j2")


def charts_of(reader: RunReader) -> list[Chart]:
    """Loss, learning rate, speed, gradient norm and memory, and matches of previews."""
    metrics = reader.metrics
    raw = metrics.series("train_loss", max_points=CHART_POINTS)
    loss: list[tuple[str, str, Points]] = [("training", "train", raw)]
    if len(metrics) >= MIN_SMOOTHED:
        smoothed = metrics.smoothed(
            "train_loss", SMOOTHING_SHARE, is_log=is_spread_wide(metrics), max_points=CHART_POINTS
        )
        loss.append(("training, smoothed", "smooth", smoothed))
    loss.append(("validation", "val", _evaluations(metrics)))
    accuracy = [(step, 100 * r / of) for step, (r, of) in reader.previews.accuracy().items()]
    found = [
        make_chart("loss", "nats per trained token", loss, can_be_log=True),
        *source_charts(metrics),
        make_chart("previews that match", "%", [("matches", "extra", accuracy)]),
        make_chart(
            "drift from the answers before training",
            "nats per token",
            [("drift", "extra", metrics.drift_points())],
        ),
        *(
            make_chart(name, "%", [(name, "extra", points)])
            for name, points in metrics.score_curves().items()
        ),
    ]
    for name, title, unit in (
        ("learning_rate", "learning rate", ""),
        ("tokens_per_s", "throughput", "tokens/s"),
        ("grad_norm", "gradient norm", "before clipping"),
        ("memory_gib", "memory", "GiB"),
    ):
        points = metrics.series(name, max_points=CHART_POINTS)
        found.append(
            make_chart(title, unit, [(title, "train", points)], can_be_log=name == "grad_norm")
        )
    return [chart for chart in found if chart is not None]


def source_charts(metrics: MetricsTable) -> list[Chart | None]:
    """A chart for each source of the rows: its training loss and that of its held-out rows."""
    trained = metrics.source_losses.smoothed(SMOOTHING_SHARE)
    held_out = metrics.source_val_losses.points()
    charts = []
    for name in sorted({*trained, *held_out}):
        points = trained.get(name, [])
        picked = pick_points(np.array([loss for _, loss in points]), CHART_POINTS)
        shown = [points[index] for index in picked.tolist()]
        curves = [
            ("training, smoothed", "smooth", shown),
            ("validation", "val", held_out.get(name, [])),
        ]
        charts.append(
            make_chart(f"loss of {name}", "nats per trained token", curves, can_be_log=True)
        )
    return charts


def _scores(metrics: MetricsTable) -> list[tuple[int, str, str, str, int]]:
    """(step, score, mean, interval and differences, prompts) of every mean, the newest first."""
    return [
        (
            step,
            curve_name(source, figure.name),
            value_words(figure.mean, is_share=figure.is_share),
            certainty_words(figure),
            figure.num_prompts,
        )
        for source, found in metrics.scores.items()
        for step in sorted(found, reverse=True)
        for figure in found[step].figures
    ]


def _evaluations(metrics: MetricsTable) -> list[tuple[float, float]]:
    return [(one.step, one.val_loss) for one in metrics.evaluations if math.isfinite(one.val_loss)]


def _config(reader: RunReader) -> list[tuple[str, str, str]]:
    """Config rows, those that somebody set first."""
    rows = config_rows(reader)
    return sorted(rows, key=lambda row: row[2] in ("", "default"))


def _hashes(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = manifest.get("data_files_sha256")
    rows = found.items() if isinstance(found, Mapping) else ()
    return [(str(name), str(value)) for name, value in rows]


def _traceback(reader: RunReader) -> str:
    summary = reader.status.summary if reader.status is not None else {}
    return str(summary.get("traceback") or "")


logger = logging.getLogger(__name__)


class RunRecords:
    """An observer: where config values came from at the start, the report at the end."""

    def __init__(self, origins: Mapping[str, str], *, is_report: bool) -> None:
        """Take what to write.

        Args:
            origins: dotted config key -> where its value came from; empty: not written.
            is_report: whether `finish` writes the report.
        """
        self._origins, self._is_report = dict(origins), is_report
        self._has_begun = False

    def on_event(self, event: Event) -> None:
        """Write config.origins.json when the first step is about to be made."""
        if not isinstance(event, RunStarted):
            return
        self._has_begun = True
        if self._origins:
            text = json.dumps(self._origins, indent=2) + "\n"
            replace_file(Path(event.output_dir) / ORIGINS_NAME, text)

    def close(self) -> None:
        """Nothing to let go of: the report is written after the run, by `finish`."""

    def finish(self, folder: Path) -> Path | None:
        """Write the report of a run that is over; None when there is none. Never raises.

        A run that was refused wrote nothing: what is in the folder is another one's.
        """
        if not self._is_report or not self._has_begun or not (folder / MANIFEST_NAME).is_file():
            return None
        try:
            # jinja2 is needed by nothing else of a run.

            reader = RunReader(folder)
            reader.poll()
            write_report(reader, folder / REPORT_NAME)
        except Exception as error:
            logger.warning(
                "%s: the report could not be written (%s: %s); the run itself is not affected. "
                "Try `trainer report %s`.",
                folder,
                type(error).__name__,
                error,
                folder,
            )
            return None
        return folder / REPORT_NAME
