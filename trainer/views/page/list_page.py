"""The list of runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from nicegui import ui

from trainer.monitoring.events import printable
from trainer.views.page.compare_page import LETTERS
from trainer.views.page.elements import box, dark_button, open_page, text
from trainer.views.page.store import Judged, RunStore
from trainer.views.run_reader import RunReader
from trainer.views.words import duration_words

TICK_S = 1.0

MAX_ROWS = 200

COLUMNS = (
    "state",
    "headline",
    "right",
    "by step",
    "loss",
    "validation",
    "duration",
    "updated",
    "model",
)

SPARKS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"

SPARK_CHARS = 16

Run = tuple[str, RunReader]


class ListPage:
    """All runs with their state; some can be chosen and compared."""

    def __init__(self, store: RunStore) -> None:
        """Build the page in the current client."""
        self.store = store
        self._keys: list[str] | None = None
        self._cells: dict[str, list[Any]] = {}
        self._bars: dict[str, Any] = {}
        self._chosen: list[str] = []
        dark = open_page(f"runs in {store.root}")
        with box("div", "page"):
            with box("header", "top"):
                text("h1", f"Runs in {store.root}")
                box("span", "grow")
                dark_button(dark)
            self._hint = text("p", "", "dim")
            with box("div", "ask-row"):
                self._search = ui.input("search runs", on_change=self.update).props("dense")
                self._order = ui.select(list(ORDERS), value="newest", on_change=self.update)
                self._order.props('dense label="sort by"').classes("order")
                self._compare = ui.button("Compare", on_click=self._open_compare)
                self._compare.props("no-caps outline")
            self._table = box("div", "wide")
        self.update()
        ui.timer(TICK_S, self.update)

    def update(self) -> None:
        """Write what changed into the rows; draw them anew only when there are other runs."""
        runs = self._shown()
        if [key for key, _ in runs] != self._keys:
            self._keys = [key for key, _ in runs]
            self._draw(runs)
        for key, reader in runs:
            with reader.lock:
                words, share = _cells(reader, self.store.judged(key)), _share(reader)
            for cell, content in zip(self._cells[key], words, strict=True):
                cell.set_text(content)
            self._cells[key][0].classes(replace=f"state state-{reader.state()}")
            self._bars[key].style(f"width: {round(100 * share)}%")

    def _shown(self) -> list[Run]:
        words = str(self._search.value or "").strip().lower()
        runs = [
            (key, reader)
            for key, reader in self.store.by_age()
            if words in self.store.label(reader).lower()
        ]
        order = ORDERS.get(str(self._order.value))
        if order is not None:
            runs.sort(key=lambda run: order(run[1], self.store.judged(run[0])))
        return runs[:MAX_ROWS]

    def _draw(self, runs: list[Run]) -> None:
        self._hint.set_text(
            f"Choose two to {len(LETTERS)} runs to compare them."
            if self.store.readers
            else f"Waiting for a run in {self.store.root}."
        )
        self._cells.clear()
        self._table.clear()
        with self._table, box("table", "lined run-table"):
            with box("thead"), box("tr"):
                for title in ("", "run", *COLUMNS):
                    text("th", title, scope="col")
            with box("tbody"):
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
        with box("td", "run-name"):
            with box("a", href=f"/run/{quote(label)}"):
                text("span", label)
            with box("div", "run-bar"):
                self._bars[key] = box("div")
        self._cells[key] = []
        for name in COLUMNS:
            with box("td").props(f'data-label="{name}"'):
                self._cells[key].append(text("span", ""))

    def _choose(self, key: str, *, is_chosen: bool) -> None:
        self._chosen = [one for one in self._chosen if one != key] + ([key] if is_chosen else [])
        self._refresh_button()

    def _refresh_button(self) -> None:
        count = len(self._chosen)
        self._compare.set_enabled(2 <= count <= len(LETTERS))
        names = {0: "Compare", 1: "Compare", 2: "Compare the two"}
        self._compare.set_text(names.get(count, f"Compare {count}"))

    def _open_compare(self) -> None:
        if 2 <= len(self._chosen) <= len(LETTERS):
            ui.navigate.to(f"/compare/{'/'.join(self._chosen)}")


# What a row says of answers comes from the store alone: `reader.previews` of a run that no page
# shows is as old as the last page that showed it.


def _right(reader: RunReader, judged: Judged | None) -> str:
    """Such as `12/16`; of a run whose previews were not read yet, by its newest status."""
    if judged is not None:
        return judged.headline.short
    status = reader.status
    newest = status.last_previews if status is not None else ()
    compared = [one.matches for one in newest if one.matches is not None]
    return f"{sum(compared)}/{len(compared)}" if compared else ""


def _right_share(reader: RunReader, judged: Judged | None) -> float:
    right, _, of = _right(reader, judged).partition(",")[0].partition("/")
    return int(right) / int(of) if right.isdigit() and of.isdigit() and int(of) else -1.0


def _spark(judged: Judged | None) -> str:
    """Right answers by preview step as a line of signs; "" where previews were not read."""
    shares = judged.shares if judged is not None else []
    if len(shares) < 2:
        return ""
    count = min(SPARK_CHARS, len(shares))
    picked = [shares[round(n * (len(shares) - 1) / (count - 1))] for n in range(count)]
    return "".join(SPARKS[round(share * (len(SPARKS) - 1))] for share in picked)


def _share(reader: RunReader) -> float:
    """How much of the run is done, from 0 to 1."""
    status = reader.status
    total = status.total_steps if status is not None else None
    return min(1.0, reader.step / total) if total else 0.0


def _cells(reader: RunReader, judged: Judged | None) -> list[str]:
    """A row of the list, in the order of COLUMNS."""
    status = reader.status
    if status is None:
        return [reader.words(), *[""] * (len(COLUMNS) - 1)]
    losses = [f"{v:.4f}" if v is not None else "" for v in (status.train_loss, status.val_loss)]
    return [
        reader.words(),
        judged.headline.sentence if judged is not None else "",
        _right(reader, judged),
        _spark(judged),
        *losses,
        duration_words(reader.duration_s()),
        _ago(status.updated_at),
        status.model_name or "",
    ]


def _ago(moment: float) -> str:
    """Such as `3 min ago`; minutes at least, so that it does not change all the time."""
    seconds = time.time() - moment
    return "now" if seconds < 60 else f"{duration_words(seconds)} ago"


def _loss(reader: RunReader) -> float:
    status = reader.status
    loss = status.val_loss if status is not None else None
    return loss if loss is not None and loss == loss else float("inf")


ORDERS: dict[str, Callable[[RunReader, Judged | None], Any] | None] = {
    "newest": None,
    "most right": lambda reader, judged: -_right_share(reader, judged),
    "validation loss": lambda reader, _: _loss(reader),
    "name": lambda reader, _: str(reader.folder),
}
