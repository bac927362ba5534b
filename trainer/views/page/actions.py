"""What one can do to a run from the page: preview now, save, mark as best, stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nicegui import ui

from trainer.monitoring.control import COMMAND_WORDS, ControlWriter
from trainer.views.page.elements import box, confirm, text
from trainer.views.run_reader import RunReader


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
