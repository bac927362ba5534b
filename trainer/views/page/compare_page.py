"""Runs compared: how their configs differ, their curves, and the prompts on which they disagree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nicegui import ui

from trainer.counts import counted
from trainer.monitoring.events import printable
from trainer.preview.base import PreviewResult
from trainer.views.comparing import LETTERS, common_answers, config_differences, value_text
from trainer.views.differences import compare
from trainer.views.facts import report_figures
from trainer.views.metrics import SMOOTHING_SHARE, window_half
from trainer.views.page.charts import COLOURS, PERCENT, chart, line, match_line, validation_line
from trainer.views.page.elements import (
    Colours,
    answer,
    box,
    dark_button,
    diff,
    empty_chart,
    mark,
    open_page,
    section,
    set_options,
    text,
)
from trainer.views.page.panel_data import rows_of
from trainer.views.page.store import RunStore
from trainer.views.run_reader import RunReader
from trainer.views.timeline import mark_of

TICK_S = 1.0

COMPARE_POINTS = 1_000

CURVE_COLOURS = ("train", "val", "extra", "other", "fifth", "sixth")
"""Of `COLOURS`, one for each letter."""

MAX_PROMPTS = 50
"""Prompts shown on which the runs disagree; how many more there are is said."""


class ComparePage:
    """Runs side by side; each has a letter."""

    def __init__(self, store: RunStore, readers: Sequence[RunReader]) -> None:
        """Build the page in the current client; all runs were read before."""
        self.readers = list(readers)
        self.labels = [store.label(reader) for reader in readers]
        self._seen: list[Any] = []
        title = " and ".join(self.labels) if len(readers) == 2 else f"{len(readers)} runs"
        dark = open_page(f"compare {title}")
        self._colours = Colours(dark, self._draw_charts)
        with box("div", "page"):
            with box("header", "top"):
                ui.link("\N{LEFTWARDS ARROW} all runs", "/")
                text("h1", f"{len(readers)} runs compared")
                box("span", "grow")
                dark_button(dark)
            self._verdicts = box("div")
            with section("Config values that differ, set or chosen", "config"):
                self._config = box("div", "wide")
            with section("Curves", "curves"), box("div", "charts"):
                with box("div", "chart-big"):
                    text("h3", "loss, nats per trained token (validation dashed)")
                    self._loss = empty_chart("loss, nats per trained token")
                with box("div", "chart-big"):
                    text("h3", "previews that match, %")
                    self._matches = empty_chart("previews that match, %")
            with section("Where they disagree", "previews"):
                self._answers = box("div")
            with section("Figures", "figures"):
                self._figures = box("div", "wide")
        self.update()
        ui.timer(TICK_S, self.update)

    @property
    def _letters(self) -> str:
        return LETTERS[: len(self.readers)]

    def update(self) -> None:
        """Draw again where a run changed."""
        seen = [reader.versions.copy() for reader in self.readers]
        if seen == self._seen:
            return
        self._seen = seen
        self._draw_verdicts()
        found = config_differences(self.readers)
        rows = [(key, [value_text(value) for value in values]) for key, values in found]
        self._table(self._config, rows, "All config values are the same.")
        self._table(self._figures, self._figure_rows(), "")
        self._draw_charts()
        self._draw_answers()

    def _draw_verdicts(self) -> None:
        self._verdicts.clear()
        with self._verdicts:
            for letter, label, reader in zip(self._letters, self.labels, self.readers, strict=True):
                with reader.lock:
                    words = rows_of(reader).headline().sentence
                with box("p", "compared"):
                    text("b", f"{letter}: {label} ")
                    text("span", words)

    def _figure_rows(self) -> list[tuple[str, list[str]]]:
        columns = []
        for reader in self.readers:
            with reader.lock:
                columns.append({"state": reader.words(), **dict(report_figures(reader))})
        names = list(dict.fromkeys(name for column in columns for name in column))
        return [(name, [column.get(name, "") for column in columns]) for name in names]

    def _table(self, place: Any, rows: list[tuple[str, list[str]]], nothing: str) -> None:
        place.clear()
        with place:
            if not rows:
                text("p", nothing, "dim")
                return
            with box("table", "lined"):
                with box("tr"):
                    titles = [f"{x}: {n}" for x, n in zip(self._letters, self.labels, strict=True)]
                    for title in ("", *titles):
                        text("th", title, scope="col")
                for name, values in rows:
                    with box("tr"):
                        text("th", name, scope="row")
                        for value in values:
                            text("td", value)

    def _draw_charts(self) -> None:
        is_dark = self._colours.is_dark
        loss, matches = [], []
        for number, (name, reader) in enumerate(zip(self._letters, self.readers, strict=True)):
            colour = COLOURS[is_dark][CURVE_COLOURS[number]]
            with reader.lock:
                points = reader.metrics.smoothed(
                    "train_loss", SMOOTHING_SHARE, max_points=COMPARE_POINTS
                )
                smoothed = ", smoothed" if window_half(len(points), SMOOTHING_SHARE) else ""
                validation = validation_line(f"{name} validation", reader, colour)
                matched = match_line(name, reader, colour)
            # The letter at its end tells a curve apart for those who do not see its colour.
            letter: dict[str, Any] = {
                "endLabel": {"show": True, "formatter": name, "color": colour}
            }
            loss.append(line(f"{name} training{smoothed}", points, colour, **letter))
            loss.append(validation)
            matches.append({**matched, **letter})
        set_options(self._loss, chart(loss, is_dark=is_dark))
        set_options(self._matches, chart(matches, is_dark=is_dark, y_range=PERCENT))

    def _draw_answers(self) -> None:
        common = common_answers(self.readers)
        apart = [answers for answers in common if _disagree(answers)]
        self._answers.clear()
        with self._answers:
            if not common:
                text("p", "These runs have no prompt in common.", "dim")
                return
            text(
                "p",
                f"{len(apart)} of {counted(len(common), 'prompt')} that all of them answered.",
                "dim",
            )
            for answers in apart[:MAX_PROMPTS]:
                with box("div", "said apart"):
                    text("h3", printable(answers[0].prompt, 200), dir="auto")
                    # A profile may rewrite the golden answer too.
                    golden = {one.golden_answer for one in answers}
                    if len(golden) == 1:
                        _draw_golden(answers[0])
                    with box("div", "side-by-side"):
                        for name, found in zip(self._letters, answers, strict=True):
                            _draw_answer(name, found, with_golden=len(golden) > 1)
            if len(apart) > MAX_PROMPTS:
                text("p", f"and {len(apart) - MAX_PROMPTS} more", "dim")


def _disagree(results: Sequence[PreviewResult]) -> bool:
    """Whether some are right and some are not; without golden answers, whether texts differ."""
    if all(one.matches is None for one in results):
        return len({one.text.strip() for one in results}) > 1
    return len({one.matches for one in results}) > 1


def _draw_golden(result: PreviewResult) -> None:
    if result.golden_answer is not None:
        text("div", "golden", "label")
        answer(result.golden_answer)


def _draw_answer(name: str, result: PreviewResult, *, with_golden: bool) -> None:
    with box("div", "said"):
        if with_golden:
            _draw_golden(result)
        with box("div", "label"):
            mark(mark_of(result))
            text("span", f" {name}, step {result.step}")
        if result.ok and result.golden_answer is not None and not result.matches:
            # The golden answer stands above: here what this run said, the rest of it marked.
            diff(compare(result.golden_answer, result.text).text)
        else:
            answer(result.text if result.ok else result.error_message or "")
