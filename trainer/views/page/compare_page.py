"""Two runs compared."""

from __future__ import annotations

from typing import Any

from nicegui import ui

from trainer.monitoring.events import printable
from trainer.views.facts import report_figures
from trainer.views.metrics import SMOOTHING_SHARE
from trainer.views.page.charts import COLOURS, PERCENT, chart, line, match_line, validation_line
from trainer.views.page.elements import (
    Colours,
    answer,
    box,
    dark_button,
    mark,
    open_page,
    section,
    set_options,
    text,
)
from trainer.views.page.store import RunStore
from trainer.views.run_reader import RunReader
from trainer.views.timeline import mark_of

TICK_S = 1.0

COMPARE_POINTS = 1_000


class ComparePage:
    """Two runs: figures side by side, curves over each other, the same prompts answered."""

    def __init__(self, store: RunStore, readers: tuple[RunReader, RunReader]) -> None:
        """Build the page in the current client; both runs were read before."""
        self.readers = readers
        self.labels = [store.label(reader) for reader in readers]
        self._seen: list[Any] = []
        dark = open_page("two runs")
        self._colours = Colours(dark, self._draw_charts)
        with box("div", "page"):
            with box("header", "top"):
                ui.link("\N{LEFTWARDS ARROW} all runs", "/")
                text("h1", "Two runs")
                box("span", "grow")
                dark_button(dark)
            self._figures = box("div", "wide")
            with section("Curves", "curves"), box("div", "charts"):
                with box("div", "chart-big"):
                    text("h3", "loss, nats per trained token (validation dashed)")
                    self._loss = ui.echart({"series": []})
                with box("div", "chart-big"):
                    text("h3", "previews that match, %")
                    self._matches = ui.echart({"series": []})
            with section("The newest answers to the same prompts", "previews"):
                self._answers = box("div")
        self.update()
        ui.timer(TICK_S, self.update)

    def update(self) -> None:
        """Draw again where a run changed."""
        seen = [reader.versions.copy() for reader in self.readers]
        if seen == self._seen:
            return
        self._seen = seen
        one, other = self.readers
        with one.lock, other.lock:
            self._draw_figures()
            self._draw_charts()
            self._draw_answers()

    def _draw_figures(self) -> None:
        columns = [self._column(reader) for reader in self.readers]
        names = list(dict.fromkeys(name for column in columns for name in column))
        self._figures.clear()
        with self._figures, box("table", "lined"):
            with box("tr"):
                for title in ("", *(f"{x}: {n}" for x, n in zip("AB", self.labels, strict=True))):
                    text("th", title, scope="col")
            for name in names:
                with box("tr"):
                    text("th", name, scope="row")
                    for column in columns:
                        text("td", column.get(name, ""))

    @staticmethod
    def _column(reader: RunReader) -> dict[str, str]:
        return {
            "state": reader.words(),
            **dict(report_figures(reader)),
        }

    def _draw_charts(self) -> None:
        is_dark = self._colours.is_dark
        loss, matches = [], []
        for name, reader, key in zip("AB", self.readers, ("train", "val"), strict=True):
            colour = COLOURS[is_dark][key]
            with reader.lock:
                points = reader.metrics.smoothed(
                    "train_loss", SMOOTHING_SHARE, max_points=COMPARE_POINTS
                )
                validation = validation_line(f"{name} validation", reader, colour)
                matched = match_line(name, reader, colour)
            # The letter at its end tells a curve apart for those who do not see its colour.
            letter: dict[str, Any] = {
                "endLabel": {"show": True, "formatter": name, "color": colour}
            }
            loss.append(line(f"{name} training, smoothed", points, colour, **letter))
            loss.append(validation)
            matches.append({**matched, **letter})
        set_options(self._loss, chart(loss, is_dark=is_dark))
        set_options(self._matches, chart(matches, is_dark=is_dark, y_range=PERCENT))

    def _draw_answers(self) -> None:
        newest = [{r.prompt: r for r in reader.previews.newest()} for reader in self.readers]
        common = [prompt for prompt in newest[0] if prompt in newest[1]]
        self._answers.clear()
        with self._answers:
            if not common:
                text("p", "These runs have no prompt in common.", "dim")
            for prompt in common:
                with box("div", "said"):
                    text("h3", printable(prompt, 200))
                    golden = newest[0][prompt].golden_answer
                    if golden is not None:
                        text("div", "golden", "label")
                        answer(golden)
                    with box("div", "side-by-side"):
                        for name, found in zip("AB", newest, strict=True):
                            self._draw_answer(name, found[prompt])

    @staticmethod
    def _draw_answer(name: str, result: Any) -> None:
        with box("div", "said"):
            with box("div", "label"):
                mark(mark_of(result))
                text("span", f" {name}, step {result.step}")
            answer(result.text if result.ok else result.error_message or "")
