"""What one can do from the page: ask the model, and act on the run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import Any

from nicegui import ui

from trainer.errors import PreviewError
from trainer.monitoring.control import COMMAND_WORDS, ControlWriter
from trainer.preview.base import ServerAnswer
from trainer.views.page.elements import answer, box, confirm, text
from trainer.views.page.worker_link import (
    WORKER_NAME,
    absence_words,
    ask_worker,
    find_worker,
)
from trainer.views.run_reader import RunReader

MAX_PROMPT = 20_000


class AskBox:
    """A prompt answered by the weights that the worker has this minute."""

    def __init__(self, reader: RunReader, allowed_hosts: Collection[str]) -> None:
        """Build the box here."""
        self.reader, self.allowed_hosts = reader, allowed_hosts
        self._reason = text("p", "", "dim")
        self._form = box("div", "ask")
        with self._form:
            self._prompt = ui.textarea("Prompt").props("outlined autogrow").classes("full")
            with box("div", "ask-row"):
                self._tokens = ui.number("at most, tokens", value=128, min=1, max=4096, step=1)
                self._temperature = ui.number("temperature", value=0.0, min=0, max=5, step=0.1)
                self._button = ui.button("Ask the model", on_click=self._ask).props("no-caps")
            self._said = box("div").props("aria-live=polite")
        self.refresh()

    def refresh(self) -> None:
        """Show the box where there is somebody to ask, else say why there is none."""
        found = find_worker(self.reader.folder, self.allowed_hosts)
        self._form.set_visibility(found.worker is not None)
        self._reason.set_visibility(found.worker is None)
        is_named = (self.reader.folder / WORKER_NAME).is_file()
        reason = found.reason if is_named else absence_words(self.reader)
        self._reason.set_text(f"The model cannot be asked: {reason}")

    async def _ask(self) -> None:
        worker = find_worker(self.reader.folder, self.allowed_hosts).worker
        prompt = str(self._prompt.value or "")[:MAX_PROMPT]
        if worker is None or not prompt.strip():
            return
        tokens = int(self._tokens.value or 128)
        temperature = float(self._temperature.value or 0.0)
        self._button.set_enabled(False)
        try:
            reply = await asyncio.to_thread(
                ask_worker, worker, prompt, max_new_tokens=tokens, temperature=temperature
            )
        except PreviewError as error:
            self._show(str(error), None)
        else:
            self._show(self._whose(reply), reply)
        finally:
            self._button.set_enabled(True)

    def _whose(self, reply: ServerAnswer) -> str:
        weights = f"weights {reply.weights_id[:12]}" if reply.weights_id else "unnamed weights"
        if reply.step is None:
            return f"Answered by {weights}; the worker does not report their step."
        now = self.reader.step
        words = f"Answered by the weights of step {reply.step} ({weights})"
        return f"{words}; training is at step {now}." if now != reply.step else f"{words}."

    def _show(self, words: str, reply: ServerAnswer | None) -> None:
        self._said.clear()
        with self._said:
            text("p", words, "dim")
            if reply is not None:
                answer(reply.text)
                if reply.finish_reason == "length":
                    text("p", "Cut off at the token limit.", "dim")


class ActBox:
    """Buttons that write control.json; each asks first."""

    def __init__(
        self, reader: RunReader, shown_step: Callable[[], int | None], *, is_allowed: bool
    ) -> None:
        """Build the buttons here, or say how to get them.

        Args:
            shown_step: the step whose answers the page shows; None: it shows none.
        """
        self.reader, self._shown_step = reader, shown_step
        self.writer = ControlWriter(reader.folder)
        self._buttons: list[Any] = []
        if not is_allowed:
            text("p", "Off: start the monitor with --allow-control to act on runs.", "dim")
            return
        with box("div", "act"):
            for command, (label, _) in COMMAND_WORDS.items():
                button = ui.button(label).props("outline no-caps")
                button.on_click(lambda command=command: self._ask(command))
                self._buttons.append(button)
        self._said = text("p", "", "dim").props("aria-live=polite")
        self.refresh()

    def refresh(self) -> None:
        """Buttons only work while the run does; say what became of the last command."""
        is_at_work = self.reader.state() == "training"
        for button in self._buttons:
            button.set_enabled(is_at_work)
        if not self._buttons:
            return
        notices = self.reader.status.notices if self.reader.status is not None else ()
        words = self.writer.outcome([notice.text for notice in notices])
        if not words and not is_at_work:
            words = "The run does not train now."
        self._said.set_text(words)

    async def _ask(self, command: str) -> None:
        """Ask whether it is meant; what cannot be done is said instead."""
        label, question = COMMAND_WORDS[command]
        step = None
        if command == "mark_best":
            # Taken now: the page may show another step by the time of the answer.
            step = self._shown_step()
            question, is_possible = self.writer.mark_question(step)
            if not is_possible:
                ui.notify(question, type="warning")
                return
        await confirm(question, label, lambda: self._send(command, step))

    def _send(self, command: str, step: int | None) -> None:
        try:
            self.writer.send(command, step=step)
        except OSError as error:
            ui.notify(f"control.json cannot be written: {error.strerror}", type="negative")
        self.refresh()
