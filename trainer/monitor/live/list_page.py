"""The list of runs, and two runs compared."""

from __future__ import annotations

from typing import Any

from nicegui import ui

from trainer.monitor.facts import moment, report_figures
from trainer.monitor.live.charts import (
    COLOURS,
    PERCENT,
    chart,
    line,
    match_line,
    validation_line,
)
from trainer.monitor.live.elements import (
    answer,
    box,
    dark_button,
    mark,
    open_page,
    section,
    set_options,
    text,
)
from trainer.monitor.live.store import RunStore
from trainer.monitor.previews import mark_of
from trainer.monitor.run_reader import RunReader
from trainer.monitoring.text import printable

TICK_S = 1.0
COMPARE_POINTS = 1_000
MAX_ROWS = 200
COLUMNS = ("state", "model", "loss", "validation", "previews that match", "last word")


class ListPage:
    """All runs with their state; two can be chosen and compared."""

    def __init__(self, store: RunStore) -> None:
        """Build the page in the current client."""
        self.store = store
        self._keys: list[str] | None = None
        self._cells: dict[str, list[Any]] = {}
        self._chosen: list[str] = []
        dark = open_page(f"runs in {store.root}")
        with box("div", "page"):
            with box("header", "top"):
                text("h1", f"Runs in {store.root}")
                box("span", "grow")
                dark_button(dark)
            self._hint = text("p", "", "dim")
            self._compare = ui.button("Compare the two", on_click=self._open_compare)
            self._compare.props("no-caps outline")
            self._table = box("div", "wide")
        self.update()
        ui.timer(TICK_S, self.update)

    def update(self) -> None:
        """Write what changed into the rows; draw them anew only when there are other runs."""
        runs = self.store.by_age()[:MAX_ROWS]
        if [key for key, _ in runs] != self._keys:
            self._keys = [key for key, _ in runs]
            self._draw(runs)
        for key, reader in runs:
            for cell, words in zip(self._cells[key], _cells(reader), strict=True):
                cell.set_text(words)
            state = f"state state-{reader.state()}"
            self._cells[key][0].classes(replace=state)

    def _draw(self, runs: list[tuple[str, RunReader]]) -> None:
        self._hint.set_text(
            "Choose two runs to compare them." if runs else "No runs yet; this page looks again."
        )
        self._cells.clear()
        self._table.clear()
        with self._table, box("table", "lined"):
            with box("tr"):
                for title in ("", "run", *COLUMNS):
                    text("th", title, scope="col")
            for key, reader in runs:
                with box("tr"):
                    self._draw_row(key, reader)
        self._refresh_button()

    def _draw_row(self, key: str, reader: RunReader) -> None:
        label = self.store.label(reader)
        with box("td"):
            choice = ui.checkbox(value=key in self._chosen).props("dense")
            choice.props.update({"aria-label": f"compare {printable(label, 80)}"})
            choice.on_value_change(lambda event: self._choose(key, is_chosen=event.value))
        with box("td"), box("a", href=f"/run/{key}"):
            text("span", label)
        self._cells[key] = []
        for _ in COLUMNS:
            with box("td"):
                self._cells[key].append(text("span", ""))

    def _choose(self, key: str, *, is_chosen: bool) -> None:
        self._chosen = [one for one in self._chosen if one != key] + ([key] if is_chosen else [])
        self._refresh_button()

    def _refresh_button(self) -> None:
        self._compare.set_enabled(len(self._chosen) == 2)

    def _open_compare(self) -> None:
        if len(self._chosen) == 2:
            ui.navigate.to(f"/compare/{self._chosen[0]}/{self._chosen[1]}")


def _cells(reader: RunReader) -> list[str]:
    """A row of the list, in the order of COLUMNS."""
    status = reader.status
    if status is None:
        return [reader.words(), *[""] * (len(COLUMNS) - 1)]
    losses = [f"{v:.4f}" if v is not None else "" for v in (status.train_loss, status.val_loss)]
    recent = status.accuracy_last_20
    matches = f"{recent.num_matched} of {recent.num_previews}" if recent is not None else ""
    return [reader.words(), status.model_name or "", *losses, matches, moment(status.updated_at)]


class ComparePage:
    """Two runs: figures side by side, curves over each other, the same prompts answered."""

    def __init__(self, store: RunStore, readers: tuple[RunReader, RunReader]) -> None:
        """Build the page in the current client; both runs were read before."""
        self.readers = readers
        self.labels = [store.label(reader) for reader in readers]
        self._seen: list[Any] = []
        dark = open_page("two runs")
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
        loss, matches = [], []
        colours = COLOURS[False]
        for name, reader, key in zip("AB", self.readers, ("train", "val"), strict=True):
            colour = colours[key]
            points = reader.metrics.series("train_loss", smoothing=0.9, max_points=COMPARE_POINTS)
            loss.append(line(f"{name} training, smoothed", points, colour))
            loss.append(validation_line(f"{name} validation", reader, colour))
            matches.append(match_line(name, reader, colour))
        set_options(self._loss, chart(loss, is_dark=False))
        set_options(self._matches, chart(matches, is_dark=False, y_range=PERCENT))

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
