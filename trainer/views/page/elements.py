"""Small page parts. Text of a run is only ever the text of an element, never HTML."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from nicegui import ui
from nicegui.elements.mixins.text_element import TextElement

from trainer.counts import counted
from trainer.views.differences import Piece
from trainer.views.timeline import MARK_WORDS

SYSTEM_CHANGED = "system_colours_changed"

LOOK = "return document.body.classList.contains('body--dark')"

WATCH_SYSTEM = (
    "matchMedia('(prefers-color-scheme: dark)')"
    f".addEventListener('change', () => emitEvent('{SYSTEM_CHANGED}'))"
)


class Colours:
    """Asks the browser whether the page is dark: at first, after the button, after the system."""

    def __init__(self, dark: Any, on_change: Callable[[], None]) -> None:
        """Watch the current client.

        Args:
            dark: the page's dark-mode element.
            on_change: draws the charts anew; called when `is_dark` has another value.
        """
        self.is_dark = False
        self._on_change = on_change
        ui.timer(0.1, self._start, once=True)
        dark.on_value_change(self._look_soon)
        ui.on(SYSTEM_CHANGED, self._look_soon)

    async def _start(self) -> None:
        ui.run_javascript(WATCH_SYSTEM)
        await self._look()

    def _look_soon(self) -> None:
        ui.timer(0.2, self._look, once=True)  # when the browser has changed the page

    async def _look(self) -> None:
        try:
            is_dark = bool(await ui.run_javascript(LOOK, timeout=5.0))
        except TimeoutError:
            return  # the client went away
        if is_dark != self.is_dark:
            self.is_dark = is_dark
            self._on_change()


# ---- small page parts. Text of a run is only ever the text of an element, never HTML


SHOWN_CHARS = 20_000
"""Longest text shown on the page; files hold all of it."""

FOLD_CHARS = 900

MARK_CLASSES = {"=": "right", "x": "wrong", ".": "none", "!": "error", "-": "late", " ": "empty"}


@cache
def _style(name: str) -> str:
    return (files("trainer.views") / "templates" / name).read_text(encoding="utf-8")


def open_page(title: str) -> Any:
    """Styles, dark mode and title of a page; gives the dark-mode element."""
    ui.page_title(title)
    ui.add_css(_style("run.css") + "body.body--dark {" + _style("dark.css") + "}")
    ui.add_css(_style("live.css") + _style("panel.css"))
    ui.colors(primary="#0b61c4")
    return ui.dark_mode(None)


def text(tag: str, content: str, classes: str = "", **props: Any) -> Any:
    """An element of any kind that holds text."""
    if len(content) > SHOWN_CHARS:
        more = len(content) - SHOWN_CHARS
        content = (
            f"{content[:SHOWN_CHARS]}\n... and {counted(more, 'more character')} in the run's files"
        )
    element = TextElement(tag=tag, text=content).classes(classes)
    element.props.update(props)
    return element


def box(tag: str, classes: str = "", **props: Any) -> Any:
    """An element that holds others."""
    element = ui.element(tag).classes(classes)
    element.props.update(props)
    return element


def mark(sign: str) -> Any:
    """The sign of an answer, in its colour, with its meaning for those who hover or listen."""
    meaning = MARK_WORDS.get(sign, "")
    return text("span", sign, f"mark mark-{MARK_CLASSES[sign]}", title=meaning, role="img").props(
        f'aria-label="{meaning}"'
    )


def diff(pieces: Sequence[Piece]) -> None:
    """A word diff: what is extra is underlined, what is missing struck through."""
    tags = {"same": "span", "extra": "ins", "missing": "del"}
    with answer_box(sum(len(piece.text) for piece in pieces)):
        for piece in pieces:
            text(tags[piece.kind], piece.text, "" if piece.kind == "same" else piece.kind)


def answer(content: str) -> None:
    """A text of a run in full, folded where it is long."""
    with answer_box(len(content)):
        text("span", content or "(nothing)")


def answer_box(length: int) -> Any:
    """A box for a text; a long one scrolls until it is unfolded."""
    outer = box("div", "answer-outer")
    with outer:
        inner = box("div", "answer")
        if length > FOLD_CHARS:
            inner.classes("folded")
            unfold = ui.button("show all").props("flat dense no-caps size=sm")

            def toggle() -> None:
                is_folded = "folded" in inner.classes
                inner.classes(remove="folded") if is_folded else inner.classes("folded")
                unfold.set_text("fold" if is_folded else "show all")

            unfold.on_click(toggle)
    return inner


def pairs(rows: Sequence[tuple[str, str]]) -> None:
    """A table of labels and values."""
    with box("table", "pairs"):
        for label, value in rows:
            with box("tr"):
                text("th", label, scope="row")
                text("td", value)


def dark_button(dark: Any) -> None:
    """A button that goes from automatic to light to dark."""
    names = {None: "auto", False: "light", True: "dark"}
    following: dict[bool | None, bool | None] = {None: True, True: False, False: None}

    def toggle() -> None:
        dark.value = following[dark.value]
        button.set_text(f"colours: {names[dark.value]}")

    button = ui.button("colours: auto", on_click=toggle).props("flat dense no-caps")


def section(title: str, anchor: str) -> Any:
    """A titled part of a page."""
    outer = box("section", "part", id=anchor).props(f'aria-labelledby="{anchor}-title"')
    with outer:
        text("h2", title, id=f"{anchor}-title")
    return outer


def empty_chart(title: str) -> Any:
    """A chart to be drawn by `set_options`, with its name for those who do not see it."""
    chart = ui.echart({"series": []})
    chart.props.update({"role": "img", "aria-label": title})
    return chart


def set_options(chart: Any, options: dict[str, Any]) -> None:
    """Draw a chart anew."""
    chart.options.clear()
    chart.options.update(options)
    chart.update()


async def confirm(question: str, action: str, on_yes: Callable[[], None]) -> None:
    """Ask before something is done."""
    with ui.dialog() as dialog, ui.card():
        text("p", question)
        with ui.row():
            ui.button(action, on_click=lambda: dialog.submit(True)).props("no-caps")
            ui.button("Cancel", on_click=lambda: dialog.submit(False)).props("flat no-caps")
    if await dialog:
        on_yes()
    dialog.delete()
