"""The previews on the page of a run: a grid of prompts x steps, and the final evaluation."""

from __future__ import annotations

import time
from typing import Any

from nicegui import ui

from trainer.monitoring.events import printable
from trainer.preview.base import PreviewResult
from trainer.views.page.elements import (
    MARK_CLASSES,
    answer,
    box,
    diff,
    golden_by_probability,
    mark,
    pairs,
    text,
)
from trainer.views.run_reader import RunReader
from trainer.views.timeline import (
    MARK_WORDS,
    FinalEvaluation,
    Timeline,
    facts_of,
    golden_tokens,
    golden_words,
    mark_of,
    word_diff,
)
from trainer.views.words import mark_of_sample

MAX_WRONG = 100
"""Wrong rows on the page; the others are in final_evaluation.jsonl."""

MAX_OPEN = 10
"""More wrong rows than this are folded: the curves stand below them."""


def show_final_evaluation(final: FinalEvaluation) -> None:
    """Build it here."""
    text("p", f"{final.score_words} on the held-out prompts (exact match with the golden answer).")
    pairs(final.figure_rows)
    if final.by_word_words:
        text("p", f"By the first word of the prompt: {final.by_word_words}.")
    if not final.wrong:
        return
    with ui.expansion(f"wrong ({len(final.wrong)})", value=len(final.wrong) <= MAX_OPEN):
        for result in final.wrong[:MAX_WRONG]:
            _show_wrong(result)
        more = len(final.wrong) - MAX_WRONG
        if more > 0:
            text("p", f"and {more} more in final_evaluation.jsonl", "dim")


def _show_wrong(result: PreviewResult) -> None:
    with box("div", "said wrong-row"):
        mark(mark_of(result))
        text("span", f" {result.prompt}")
        with box("div", "side-by-side"):
            with box("div", "said"):
                text("div", "golden", "label")
                answer(result.golden_answer or "-")
            with box("div", "said"):
                text("div", "generated, differences marked", "label")
                if result.ok and result.golden_answer is not None:
                    diff(word_diff(result.golden_answer, result.text))
                else:
                    answer(result.text if result.ok else result.error_message or "")


# ---- PreviewPanel: the grid of prompts x steps, and the time-line of one prompt below it


GRID_COLUMNS = 24

MAX_SAMPLES = 4
"""More further samples than this are folded."""

PROMPT_CHARS = 60

ARROWS = """(event) => {
  const move = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]};
  if (!(event.key in move) || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  emit(move[event.key]);
}"""

PRESSED = """(event) => {
  const button = event.target.closest('[data-prompt]');
  if (button) emit([Number(button.dataset.prompt), Number(button.dataset.step ?? -1)]);
}"""

GRID_GAP_S = 1.0
"""Least seconds between two drawings of the grid for new previews, so that a click meets it."""


class PreviewPanel:
    """What it shows: one prompt at one of its steps; the newest one unless somebody chose."""

    def __init__(self, reader: RunReader) -> None:
        """Build the empty panel here; `refresh` fills it."""
        self.reader = reader
        self.key: str | None = None
        self.index = 0
        self.is_following = True
        self._is_raw_open = False
        self._drawn_grid: object = None
        self._drawn_line: object = None
        self._grid_at = 0.0
        self._cells: dict[tuple[str, int], Any] = {}
        self._names: dict[str, Any] = {}
        self._empty = text("p", "No previews yet.", "dim")
        self._legend = box("p", "dim legend")
        with self._legend:
            for sign, meaning in MARK_WORDS.items():
                mark(sign)
                text("span", meaning)
        self._grid = box("div", "wide")
        self._grid.props('tabindex="0" role="region" aria-label="prompts and steps"')
        # One handler for all cells: a cell's own would be gone when it is drawn again.
        self._grid.on("click", lambda event: self._pressed(*event.args), js_handler=PRESSED)
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

    @property
    def shown_step(self) -> int | None:
        """The step whose answer is shown; None where there are no previews."""
        with self.reader.lock:
            line = self.reader.previews.timelines.get(self.key or "")
            if line is None or not len(line):
                return None
            return line.steps[min(self.index, len(line) - 1)]

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
        self._choose_cell(line)
        self._draw_line(line)

    def tick(self) -> None:
        """Draw what waited; the caller holds the reader's lock."""
        if self.key in self.reader.previews.timelines:
            self._draw_grid()
            self._choose_cell(self.reader.previews.timelines[self.key])

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
        book, now = self.reader.previews, time.monotonic()
        steps = book.grid_steps(GRID_COLUMNS)
        rows = {k: [mark_of(one.of_step(s)) for s in steps] for k, one in book.timelines.items()}
        if (steps, rows) == self._drawn_grid or now - self._grid_at < GRID_GAP_S:
            return
        self._drawn_grid, self._grid_at = (steps, rows), now
        self._cells.clear()
        self._names.clear()
        self._grid.clear()
        with self._grid, box("table", "marks"):
            with box("tr"):
                box("td")
                for step in steps:
                    text("th", str(step), "step", scope="col")
            for number, (key, marks) in enumerate(rows.items()):
                with box("tr"):
                    self._draw_prompt(number, key)
                    for step, sign in zip(steps, marks, strict=True):
                        with box("td"):
                            self._draw_cell(number, key, step, sign)

    def _draw_prompt(self, number: int, key: str) -> None:
        line = self.reader.previews.timelines[key]
        with box("th", "prompt", scope="row"):
            name = text("button", printable(line.prompt, PROMPT_CHARS), "link", type="button")
            name.props.update({"title": line.prompt[:300], "data-prompt": number})
            self._names[key] = name

    def _draw_cell(self, number: int, key: str, step: int, sign: str) -> None:
        if sign == " ":
            return
        cell = text("button", sign, f"mark mark-{MARK_CLASSES[sign]}", type="button")
        cell.props.update({"aria-label": f"step {step}: {MARK_WORDS[sign]}"})
        cell.props.update({"data-prompt": number, "data-step": step})
        self._cells[key, step] = cell

    def _choose_cell(self, line: Timeline) -> None:
        """Frame the cell that the time-line shows."""
        chosen = (self.key, line.steps[self.index])
        for place, cell in self._cells.items():
            if (place == chosen) != ("chosen" in cell.classes):
                cell.classes(toggle="chosen")
                cell.props.update({"aria-current": str(place == chosen).lower()})
                cell.update()
        for key, name in self._names.items():
            current = str(key == self.key).lower()
            if name.props.get("aria-current") != current:
                name.props.update({"aria-current": current})
                name.update()

    def _pressed(self, number: int, step: int) -> None:
        """A prompt or a cell of the grid was pressed: show it, and let arrow keys work there."""
        with self.reader.lock:
            keys = list(self.reader.previews.timelines)
        if not 0 <= number < len(keys):
            return
        self.show(keys[number], step if step >= 0 else None)
        name = self._timeline.html_id
        with self._timeline:
            ui.run_javascript(f"document.getElementById('{name}').focus({{preventScroll: true}})")

    def _draw_line(self, line: Timeline) -> None:
        result = line[self.index]
        self._title.set_text(printable(line.prompt, 160))
        self._verdict.set_text(line.verdict())
        self._slider.props(f"max={max(1, len(line) - 1)}").set_enabled(len(line) > 1)
        self._slider.set_value(self.index)
        self._place.set_text(f"step {result.step}, {self.index + 1} of {len(line)}")
        if self._drawn_line is result:
            return  # whoever reads or selects it is not disturbed
        self._drawn_line = result
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
        if result.samples:
            label = f"further samples ({len(result.samples)})"
            with ui.expansion(label, value=len(result.samples) <= MAX_SAMPLES).props("dense"):
                for sample in result.samples:
                    with box("div", "said"):
                        mark(mark_of_sample(sample))
                        answer(sample.text if sample.ok else sample.error_message or "")
        raw = ui.expansion("prompt and raw text", value=self._is_raw_open).props("dense")
        raw.on_value_change(lambda event: setattr(self, "_is_raw_open", bool(event.value)))
        with raw:
            self._part("prompt", lambda: answer(result.prompt))
            self._part("generated, with special tokens", lambda: answer(result.raw_text))

    @staticmethod
    def _part(label: str, draw: Any) -> None:
        with box("div", "said"):
            text("div", label, "label")
            draw()
