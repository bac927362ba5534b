"""RichDisplay: one live view of a run for people at a terminal.

It owns when something is shown; what the view looks like is in terminal_view.py.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO, cast

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from trainer.monitoring.events import (
    CardShown,
    CheckpointSaved,
    EvaluationDone,
    Event,
    Notice,
    PhaseChanged,
    PreviewsDone,
    RunEnded,
    RunStarted,
    StepDone,
    printable,
)
from trainer.views.safe_stream import SafeStream
from trainer.views.terminal_view import LONG_PHASE_S, STATE_STYLES, LiveView
from trainer.views.words import (
    checkpoint_words,
    closing_words,
    duration_words,
    notice_words,
    start_words,
)

REFRESH_PER_S = 4

CARD_CHARS = 600
"""Longest text in a card."""

_LEVEL_STYLES = {"info": "", "warning": "yellow", "error": "bold red"}


class RichDisplay:
    """Keeps the view up to date and prints above it what should stay readable."""

    def __init__(
        self,
        stream: SafeStream,
        clock: Callable[[], float] = time.monotonic,
        *,
        elapsed_s: float = 0.0,
    ) -> None:
        """Take where to write.

        Args:
            clock: seconds that only go forward.
            elapsed_s: seconds that the run has gone on for already.
        """
        self.stream, self.clock = stream, clock
        # Model output is no markup: only Text objects are printed.
        self.console = Console(
            file=cast(TextIO, stream), markup=False, emoji=False, highlight=False
        )
        self._live: Live | None = None
        self._moved: list[tuple[logging.StreamHandler[SafeStream], object]] = []
        self._view = LiveView(clock)
        self._began = clock() - elapsed_s

    def on_event(self, event: Event) -> None:
        """Show what an event says."""
        view = self._view
        match event:
            case PhaseChanged():
                self._print_long_phase()
                view.set_phase(event)
                self._show()
            case CardShown():
                self.console.print(_card(event))
            case RunStarted():
                view.started = event
                self._print(start_words(event))
                self._show()
            case StepDone():
                self._print_long_phase()
                view.set_step(event)
                self._show()
            case EvaluationDone():
                view.evaluation = event
            case PreviewsDone():
                view.set_previews(event)
            case CheckpointSaved():
                self._print(checkpoint_words(event), "dim")
            case Notice():
                self._print(notice_words(event), _LEVEL_STYLES[event.level])
            case RunEnded():
                self._end(event)

    def close(self) -> None:
        """Leave the last view on the screen and give the terminal back."""
        if self._live is not None:
            live, self._live = self._live, None
            live.stop()
            for handler, stream in self._moved:
                handler.setStream(stream)  # type: ignore[arg-type]
            self._moved.clear()

    def _show(self) -> None:
        """Start the view where there is none; its own thread draws it from then on."""
        if self._live is not None:
            return
        is_stdout = self.stream.stream is sys.stdout
        original = sys.stderr
        self._live = Live(
            self._view,
            console=self.console,
            refresh_per_second=REFRESH_PER_S,
            transient=False,
            redirect_stdout=is_stdout,
            # A standard error that goes to a file must keep going there.
            redirect_stderr=is_stdout and sys.stderr.isatty(),
        )
        self._live.start(refresh=True)
        if sys.stderr is not original:
            # Handlers made earlier hold the stream itself and would write into the view.
            for handler in _handlers_on(original):
                self._moved.append((handler, handler.setStream(sys.stderr)))  # type: ignore[arg-type]

    def _print(self, text: str, style: str = "") -> None:
        self.console.print(Text(text, style=style))

    def _print_long_phase(self) -> None:
        """Keep on the screen how long a phase took that people had to wait for."""
        phase, elapsed = self._view.phase, self._view.phase_elapsed_s()
        # The pauses between steps come again and again: only the first of them is kept.
        is_kept = phase is not None and (not phase.is_pause or self._view.step is None)
        if phase is not None and is_kept and elapsed >= LONG_PHASE_S:
            self._print(f"{printable(phase.text, 200)}: {duration_words(elapsed)}", "dim")

    def _end(self, event: RunEnded) -> None:
        view = self._view
        self._print_long_phase()
        view.set_end(event)
        self.close()
        if view.started is not None:
            folder, elapsed = view.started.output_dir, self.clock() - self._began
            words = closing_words(event, view.step, view.evaluation, elapsed, folder)
            self._print(words, STATE_STYLES.get(event.state, ""))
        self._view, self._began = LiveView(self.clock), self.clock()


def _card(card: CardShown) -> Group:
    """A card as a table, and its sample row with the trained part green and in [ ]."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in card.lines:
        table.add_row(Text(label), Text(printable(text, CARD_CHARS)))
    if not card.sample:
        return Group(table)
    row = Text()
    room = CARD_CHARS
    for text, is_trained in card.sample:
        shown = printable(text, max(room, 0))
        room -= len(shown)
        row.append(f"[{shown}]" if is_trained else shown, "bold green" if is_trained else "dim")
    table.add_row(Text("first row"), row)
    table.add_row(Text(), Text("what is green and in [ ] is trained", "dim"))
    return Group(table)


def _handlers_on(stream: object) -> Iterator[logging.StreamHandler[SafeStream]]:
    """The logging handlers of this process that write to a stream."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for logger in loggers:
        for handler in getattr(logger, "handlers", []):
            if isinstance(handler, logging.StreamHandler) and handler.stream is stream:
                yield handler
