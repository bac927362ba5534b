"""Asking the model: one prompt at a time, a history, and pinned questions that are asked again."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from nicegui import background_tasks, ui

from trainer.counts import counted
from trainer.errors import PreviewError
from trainer.monitoring.events import printable
from trainer.preview.base import ServerAnswer
from trainer.views.page.elements import answer, box, text
from trainer.views.page.own_server import ASKING_WORDS, OwnServer, can_serve
from trainer.views.page.worker_link import (
    WORKER_NAME,
    absence_words,
    ask_worker,
    check_own,
    find_worker,
    whose_words,
)
from trainer.views.run_reader import RunReader

MAX_PROMPT = 20_000

MAX_HISTORY = 20
"""Questions of one page; older ones go."""

MAX_PINS = 8
"""Of one run: each is a request more after every preview step."""

MAX_PIN_ANSWERS = 200

TICK_S = 1.0

# Enter sends, shift+Enter is a new line; the Enter that ends a composition of signs is neither.
ENTER = """(event) => {
  if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  emit();
}"""


@dataclass(frozen=True)
class Question:
    """What is asked, and how."""

    prompt: str
    max_new_tokens: int
    temperature: float


@dataclass
class Pin:
    """A question that is asked again by the weights of every preview step.

    It goes to the worker in a request of its own and is in no statistic of the run.
    """

    question: Question
    answers: list[tuple[int | None, str]] = field(default_factory=list)
    """(step of the weights, answer), the oldest first; the step is None where nobody knows it."""

    def add(self, step: int | None, words: str) -> None:
        """Take an answer; a second one by the same step replaces the first."""
        if self.answers and step is not None and self.answers[-1][0] == step:
            self.answers.pop()
        self.answers = [*self.answers, (step, words)][-MAX_PIN_ANSWERS:]


@dataclass
class Pins:
    """Those of one run, the same on all pages, until the monitor ends."""

    pins: list[Pin] = field(default_factory=list)
    asked_at: int = -1
    """Newest preview step after which they were asked."""
    is_asking: bool = False
    version: int = 0
    """Raised at every change."""


_PINS: weakref.WeakKeyDictionary[RunReader, Pins] = weakref.WeakKeyDictionary()


class AskBox:
    """Prompts answered by the weights that the worker has this minute."""

    def __init__(
        self, reader: RunReader, allowed_hosts: Collection[str], own_server: OwnServer | None
    ) -> None:
        """Build the box here.

        Args:
            own_server: it answers where the run has ended; None: the page shows the command.
        """
        self.reader, self.allowed_hosts, self.own_server = reader, allowed_hosts, own_server
        self.pins = _PINS.setdefault(reader, Pins())
        self._asked_at = 0.0
        self._pins_shown = -1
        self._reason = text("p", "", "dim")
        self._form = box("div", "ask")
        with self._form:
            self._prompt = ui.textarea("Prompt (Enter sends)").props("outlined autogrow")
            self._prompt.classes("full").on("keydown", self._ask, js_handler=ENTER)
            with box("div", "ask-row"):
                self._tokens = ui.number("at most, tokens", value=128, min=1, max=4096, step=1)
                self._temperature = ui.number("temperature", value=0.0, min=0, max=5, step=0.1)
                self._button = ui.button("Ask the model", on_click=self._ask).props("no-caps")
                self._waiting = text("span", "", "dim")
            self._history = box("div", "history").props("aria-live=polite")
        self._pin_box = box("div", "pins")
        self._timer = ui.timer(TICK_S, self._tick)
        self.refresh()

    def refresh(self) -> None:
        """Show the box where there is somebody to ask, else say why there is none."""
        found = find_worker(self.reader.folder, self.allowed_hosts)
        is_served = found.worker is None and self._is_served()
        self._form.set_visibility(found.worker is not None or is_served)
        self._reason.set_visibility(found.worker is None)
        if is_served:
            self._reason.set_text(ASKING_WORDS)
            return
        is_named = (self.reader.folder / WORKER_NAME).is_file()
        reason = found.reason if is_named else absence_words(self.reader)
        self._reason.set_text(f"The model cannot be asked: {reason}")

    def _is_served(self) -> bool:
        return self.own_server is not None and can_serve(self.reader)

    def _tick(self) -> None:
        """Count the seconds of a question; ask pinned ones again after a new preview step."""
        waited = f"{time.monotonic() - self._asked_at:.0f} s" if self._asked_at else ""
        self._waiting.set_text(waited)
        newest = max(self.reader.previews.changed_at, default=-1)
        if self.pins.pins and newest > self.pins.asked_at and not self.pins.is_asking:
            self.pins.asked_at, self.pins.is_asking = newest, True
            background_tasks.create(self._ask_pins())
        if self._pins_shown != self.pins.version:
            self._show_pins()

    async def _ask(self) -> None:
        prompt = str(self._prompt.value or "")[:MAX_PROMPT]
        if self._asked_at or not prompt.strip():
            return
        question = Question(
            prompt, int(self._tokens.value or 128), float(self._temperature.value or 0.0)
        )
        self._button.set_enabled(False)
        self._asked_at = time.monotonic()
        try:
            reply = await self._reply(question)
        except PreviewError as error:
            self._show(question, str(error), None)
        else:
            if reply is not None:
                words = whose_words(reply, self.reader, is_final=self._is_served())
                self._show(question, words, reply)
                self._prompt.set_value("")
        finally:
            self._asked_at = 0.0
            self._waiting.set_text("")
            self._button.set_enabled(True)

    async def _reply(self, question: Question) -> ServerAnswer | None:
        """The worker's answer; None where there is no worker any more.

        Raises:
            PreviewError: it gave none, or not by weights of this run.
        """
        worker = find_worker(self.reader.folder, self.allowed_hosts).worker
        if worker is None and self.own_server is not None and self._is_served():
            worker = await asyncio.to_thread(self.own_server.worker, self.reader)
        if worker is None:
            self.refresh()
            return None
        reply = await asyncio.to_thread(
            ask_worker,
            worker,
            question.prompt,
            max_new_tokens=question.max_new_tokens,
            temperature=question.temperature,
        )
        check_own(worker, reply, self.reader)
        return reply

    async def _ask_pins(self) -> None:
        try:
            for pin in list(self.pins.pins):
                try:
                    reply = await self._reply(pin.question)
                except PreviewError as error:
                    pin.add(None, f"no answer: {error}")
                else:
                    if reply is None:
                        return
                    pin.add(reply.step, reply.text)
                self.pins.version += 1
        finally:
            self.pins.is_asking = False

    def _show(self, question: Question, words: str, reply: ServerAnswer | None) -> None:
        """The newest stands first."""
        entry = box("div", "said asked")
        entry.move(self._history, 0)
        with entry:
            text("p", question.prompt, "asked-prompt", dir="auto")
            text("p", words, "dim")
            if reply is not None:
                answer(reply.text)
                if reply.finish_reason == "length":
                    text("p", "Cut off at the token limit.", "dim")
                pin = ui.button("pin: ask again at every preview step").props("flat dense no-caps")
                pin.on_click(lambda: self._pin(question, reply, pin))
        children = list(self._history.default_slot.children)
        for old in children[MAX_HISTORY:]:
            old.delete()

    def _pin(self, question: Question, reply: ServerAnswer, button: Any) -> None:
        if len(self.pins.pins) >= MAX_PINS:
            ui.notify(f"{MAX_PINS} questions are pinned; unpin one first", type="warning")
            return
        one = Pin(question)
        one.add(reply.step, reply.text)
        self.pins.pins.append(one)
        self.pins.version += 1
        self.pins.asked_at = max(self.reader.previews.changed_at, default=-1)
        button.set_enabled(False)
        self._show_pins()

    def _unpin(self, pin: Pin) -> None:
        self.pins.pins = [one for one in self.pins.pins if one is not pin]
        self.pins.version += 1
        self._show_pins()

    def _show_pins(self) -> None:
        self._pins_shown = self.pins.version
        self._pin_box.clear()
        with self._pin_box:
            if self.pins.pins:
                text("h3", "Pinned questions (in no statistic; kept until the monitor ends)")
            for pin in self.pins.pins:
                self._draw_pin(pin)

    def _draw_pin(self, pin: Pin) -> None:
        with box("div", "said pin"):
            with box("div", "ask-row"):
                text("span", printable(pin.question.prompt, 300), "asked-prompt", dir="auto")
                unpin = ui.button("unpin").props("flat dense no-caps")
                unpin.on_click(lambda: self._unpin(pin))
            step, words = pin.answers[-1]
            text("p", f"step {'not known' if step is None else step}", "dim")
            answer(words)
            if len(pin.answers) > 1:
                with box("details", "more"):
                    text("summary", f"{counted(len(pin.answers) - 1, 'answer')} before")
                    for step, words in reversed(pin.answers[:-1]):
                        text("p", f"step {'not known' if step is None else step}", "dim")
                        answer(words)
