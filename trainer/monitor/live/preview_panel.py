"""PreviewPanel: the grid of prompts x steps, and the time-line of one prompt below it."""

from __future__ import annotations

from typing import Any

from nicegui import ui

from trainer.monitor.live.elements import (
    MARK_CLASSES,
    answer,
    box,
    diff,
    golden_by_probability,
    mark,
    text,
)
from trainer.monitor.previews import MARK_WORDS, mark_of
from trainer.monitor.run_reader import RunReader
from trainer.monitor.timeline import Timeline, facts_of, golden_tokens, golden_words
from trainer.monitoring.text import printable

GRID_COLUMNS = 24
PROMPT_CHARS = 60
ARROWS = """(event) => {
  const move = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]};
  if (!(event.key in move) || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  emit(move[event.key]);
}"""


class PreviewPanel:
    """What it shows: one prompt at one of its steps; the newest one unless somebody chose."""

    def __init__(self, reader: RunReader) -> None:
        """Build the empty panel here; `refresh` fills it."""
        self.reader = reader
        self.key: str | None = None
        self.index = 0
        self.is_following = True
        self._empty = text("p", "No previews yet.", "dim")
        self._legend = box("p", "dim legend")
        with self._legend:
            for sign, meaning in MARK_WORDS.items():
                mark(sign)
                text("span", meaning)
        self._grid = box("div", "wide")
        self._grid.props('tabindex="0" role="region" aria-label="prompts and steps"')
        self._timeline = box("div", "timeline", tabindex=0, role="group")
        self._timeline.props('aria-label="time-line; arrow keys move through steps and prompts"')
        self._timeline.on("keydown", lambda event: self._move(*event.args), js_handler=ARROWS)
        with self._timeline:
            self._build_controls()
            self._body = box("div")

    def _build_controls(self) -> None:
        with box("div", "timeline-head"):
            self._title = text("h3", "")
            self._verdict = text("p", "", "verdict")
        with box("div", "steps"):
            ui.button("\N{BLACK LEFT-POINTING TRIANGLE}", on_click=lambda: self._move(0, -1)).props(
                'flat dense aria-label="previous step"'
            )
            self._slider = ui.slider(min=0, max=1, step=1, value=0, on_change=self._slid)
            self._slider.props('aria-label="position in the time-line"').classes("grow")
            ui.button("\N{BLACK RIGHT-POINTING TRIANGLE}", on_click=lambda: self._move(0, 1)).props(
                'flat dense aria-label="next step"'
            )
            self._place = text("span", "", "place").props("aria-live=polite")

    # ---- what it shows

    def refresh(self) -> None:
        """Show what was read last; the caller holds the reader's lock."""
        book = self.reader.previews
        has_any = bool(book.timelines)
        for element in (self._legend, self._grid, self._timeline):
            element.set_visibility(has_any)
        self._empty.set_visibility(not has_any)
        if not has_any:
            return
        if self.key not in book.timelines:
            self.key, self.is_following = next(iter(book.timelines)), True
        line = book.timelines[self.key]
        if self.is_following or self.index >= len(line):
            self.index = len(line) - 1
        self._draw_grid()
        self._draw_line(line)

    def show(self, key: str, step: int | None = None) -> None:
        """Open the time-line of a prompt at a step (None: the newest)."""
        with self.reader.lock:
            line = self.reader.previews.timelines.get(key)
            if line is None or not len(line):
                return
            self.key = key
            at = len(line) - 1 if step is None or step not in line.steps else line.steps.index(step)
            self.index, self.is_following = at, at == len(line) - 1
            self.refresh()

    def _move(self, prompts: int, steps: int) -> None:
        with self.reader.lock:
            keys = list(self.reader.previews.timelines)
            if self.key not in keys:
                return
            line = self.reader.previews.timelines[self.key]
            step = line.steps[min(self.index, len(line) - 1)]
            if prompts:
                key = keys[min(max(keys.index(self.key) + prompts, 0), len(keys) - 1)]
                self.show(key, step)
            else:
                at = min(max(self.index + steps, 0), len(line) - 1)
                self.show(self.key, line.steps[at])

    def _slid(self, event: Any) -> None:
        with self.reader.lock:
            line = self.reader.previews.timelines.get(self.key or "")
            at = int(event.value or 0)
            if line is not None and at != self.index and 0 <= at < len(line):
                self.show(line.prompt_id, line.steps[at])

    # ---- drawing

    def _draw_grid(self) -> None:
        book = self.reader.previews
        steps = book.grid_steps(GRID_COLUMNS)
        chosen = book.timelines[self.key or ""].steps[self.index]
        self._grid.clear()
        with self._grid, box("table", "marks"):
            with box("tr"):
                box("td")
                for step in steps:
                    text("th", str(step), "step", scope="col")
            for key, line in book.timelines.items():
                with box("tr"):
                    self._draw_prompt(key, line)
                    for step in steps:
                        with box("td"):
                            is_chosen = key == self.key and step == chosen
                            self._draw_cell(key, line, step, is_chosen)

    def _draw_prompt(self, key: str, line: Timeline) -> None:
        with box("th", "prompt", scope="row"):
            name = text("button", printable(line.prompt, PROMPT_CHARS), "link", type="button")
            name.props.update({"title": line.verdict(), "aria-current": str(key == self.key)})
            name.on("click", lambda: self.show(key))

    def _draw_cell(self, key: str, line: Timeline, step: int, is_chosen: bool) -> None:
        sign = mark_of(line.of_step(step))
        if sign == " ":
            return
        cell = text("button", sign, f"mark mark-{MARK_CLASSES[sign]}", type="button")
        cell.props.update({"aria-label": f"step {step}: {MARK_WORDS[sign]}", "data-step": step})
        if is_chosen:
            cell.classes("chosen").props.update({"aria-current": "true"})
        cell.on("click", lambda: self._open(key, step))

    def _open(self, key: str, step: int) -> None:
        self.show(key, step)
        name = self._timeline.html_id
        ui.run_javascript(f"document.getElementById('{name}').focus({{preventScroll: true}})")

    def _draw_line(self, line: Timeline) -> None:
        result = line[self.index]
        self._title.set_text(printable(line.prompt, 160))
        self._verdict.set_text(line.verdict())
        self._slider.props(f"max={max(1, len(line) - 1)}").set_enabled(len(line) > 1)
        self._slider.set_value(self.index)
        self._place.set_text(f"step {result.step}, {self.index + 1} of {len(line)}")
        self._body.clear()
        with self._body:
            with box("p", "facts"):
                mark(mark_of(result))
                for fact in facts_of(result):
                    text("span", fact, "fact")
            self._draw_answer(line)

    def _draw_answer(self, line: Timeline) -> None:
        result = line[self.index]
        if result.error_message is not None:
            self._part("no answer", lambda: answer(result.error_message or ""))
        with box("div", "side-by-side"):
            golden = result.golden_answer
            if golden is not None:
                self._part("golden", lambda: answer(golden))
            against = line.golden_diff(self.index)
            if result.ok and against is not None and not result.matches:
                label = "generated, against golden (extra underlined, missing struck out)"
                self._part(label, lambda: diff(against))
            elif result.ok:
                self._part("generated", lambda: answer(result.text))
        before = line.previous_diff(self.index)
        if before is not None:
            is_same = all(piece.kind == "same" for piece in before)
            label = "against the preview before" + (": the same" if is_same else "")
            if is_same:
                text("p", label, "dim")
            else:
                self._part(label, lambda: diff(before))
        tokens = golden_tokens(result)
        if tokens:
            label = f"golden, by probability: {golden_words(result)}"
            self._part(label, lambda: golden_by_probability(tokens))
        with ui.expansion("prompt and raw text").props("dense"):
            self._part("prompt", lambda: answer(result.prompt))
            self._part("generated, with special tokens", lambda: answer(result.raw_text))

    @staticmethod
    def _part(label: str, draw: Any) -> None:
        with box("div", "said"):
            text("div", label, "label")
            draw()
