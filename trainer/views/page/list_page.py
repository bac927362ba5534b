"""The list of runs."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from nicegui import ui

from trainer.monitoring.events import printable
from trainer.views.facts import moment
from trainer.views.page.elements import box, dark_button, open_page, text
from trainer.views.page.store import RunStore
from trainer.views.run_reader import RunReader

TICK_S = 1.0

MAX_ROWS = 200

COLUMNS = ("state", "is it getting better?", "model", "loss", "validation", "last update")


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
            for cell, words in zip(self._cells[key], self._words(key, reader), strict=True):
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
        with box("td"), box("a", href=f"/run/{quote(label)}"):
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

    def _words(self, key: str, reader: RunReader) -> list[str]:
        """A row of the list, in the order of COLUMNS."""
        status = reader.status
        if status is None:
            return [reader.words(), *[""] * (len(COLUMNS) - 1)]
        headline = self.store.headline(key)
        return [
            reader.words(),
            headline.sentence if headline is not None else "",
            status.model_name or "",
            *(f"{v:.4f}" if v is not None else "" for v in (status.train_loss, status.val_loss)),
            moment(status.updated_at),
        ]
