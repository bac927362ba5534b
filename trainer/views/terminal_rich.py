"""The live terminal view: what it looks like at this moment, and when it is drawn.

`LiveView` has no output; it is drawn by rich's refresh thread while events arrive, so every field
of it is replaced as a whole. `RichDisplay` owns when something is shown.
"""

from __future__ import annotations

import logging
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO, cast

from rich.cells import cell_len, chop_cells
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from trainer.counts import counted
from trainer.files import SafeStream
from trainer.monitoring.events import (
    TRAINING,
    CardShown,
    CheckpointSaved,
    DriftMeasured,
    EvaluationDone,
    Event,
    Notice,
    PhaseChanged,
    PreviewsDone,
    RunEnded,
    RunStarted,
    ScoresDone,
    StepDone,
    printable,
)
from trainer.preview.base import PreviewResult
from trainer.views.cuts import cut_pair, fit
from trainer.views.differences import Piece
from trainer.views.running_headline import RunningHeadline
from trainer.views.score_words import score_lines
from trainer.views.words import (
    checkpoint_words,
    closing_words,
    drift_words,
    duration_words,
    is_silent,
    mark_of,
    match_words,
    metric_pairs,
    non_finite_words,
    notice_words,
    remarks_of,
    start_words,
    working_words,
)

LONG_PHASE_S = 2.0
"""A phase longer than this shows a spinner and its time."""

SIDE_BY_SIDE_WIDTH = 100
"""From this many columns golden and generated stand in two columns."""

HEADER_ROWS = 5

MAX_TEXT_ROWS = 4

MAX_SCORE_ROWS = 6

MAX_VERDICT_ROWS, MIN_HEIGHT = 3, 20
"""Lines of the headline, on terminals of so many rows."""

STATE_STYLES = {
    "loading": "bold cyan",
    "training": "bold cyan",
    "saving": "bold cyan",
    "completed": "bold green",
    "stopped": "bold yellow",
    "failed": "bold red",
}

DIFFERENCE_STYLES = {"missing": "bold green", "extra": "bold red"}
"""Of words that only golden has, and of those that only the answer has."""

_MATCH_STYLES = {"=": "green", "x": "red", ".": "", "!": "bold red"}


class LiveView:
    """The newest facts of a run, and how they are drawn."""

    def __init__(self, clock: Callable[[], float], verdict: RunningHeadline | None = None) -> None:
        """Take the clock, in seconds that only go forward, and the headline so far."""
        self._clock = clock
        self.verdict = verdict or RunningHeadline()
        self.started: RunStarted | None = None
        self.phase: PhaseChanged | None = None
        self.step: StepDone | None = None
        self.evaluation: EvaluationDone | None = None
        self.previews: PreviewsDone | None = None
        self.drift: DriftMeasured | None = None
        self.scores: dict[str, ScoresDone] = {}
        self.end: RunEnded | None = None
        self._phase_at = self._step_at = clock()

    def set_phase(self, event: PhaseChanged) -> None:
        """A phase begins; training itself is the absence of any other."""
        if event.progress and self.phase is not None:
            self.phase = event
            return
        self._phase_at = self._clock()
        if event.text == TRAINING:
            self._step_at, self.phase = self._phase_at, None
        else:
            self.phase = event

    def set_step(self, event: StepDone) -> None:
        """A step was made: whatever phase there was is over."""
        self._step_at = self._clock()
        self.step, self.phase = event, None

    def set_previews(self, event: PreviewsDone) -> None:
        """New answers to the same prompts; older ones stay where there are none."""
        if event.is_superseded:
            return
        self.previews = event

    def set_scores(self, event: ScoresDone) -> None:
        """The newest means of the previews, or of the evaluation prompts."""
        self.scores = {**self.scores, event.source: event}

    def set_end(self, event: RunEnded) -> None:
        """The run is over; the view no longer moves."""
        self.end, self.phase = event, None

    def phase_elapsed_s(self) -> float:
        """Seconds since the phase began."""
        return self._clock() - self._phase_at

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Headline, bar, figures and previews, never higher than the terminal."""
        yield self._headline(console, options.ascii_only)
        if self.step is not None:
            yield self._bar(self.step, options.max_width)
            yield _one_line(_figures(self.step, self.evaluation))
        if self.drift is not None:
            yield _one_line(Text(drift_words(self.drift), "dim"))
        verdict = self._verdict_lines(options.max_width, console.size.height)
        yield from verdict
        if self.previews is not None:
            yield Text()
            yield _one_line(self._preview_title(self.previews))
            figures = [line for event in self.scores.values() for line in score_lines(event)]
            figures = figures[:MAX_SCORE_ROWS]
            yield from (_one_line(Text(line)) for line in figures)
            rows = console.size.height - HEADER_ROWS - 1 - len(figures) - len(verdict)
            rows -= self.drift is not None
            yield from preview_lines(self.previews.results, options.max_width, rows)

    def _headline(self, console: Console, is_ascii: bool) -> Text:
        state = self.phase.state if self.phase else "training"
        state = self.end.state if self.end else state
        is_late = self.end is None and self.phase is None and self._is_silent()
        line = Text(style="bold yellow" if is_late else STATE_STYLES[state])
        if self._is_spinning():
            spinner = Spinner("line" if is_ascii else "dots")
            frame = spinner.render(console.get_time())
            line.append(f"{frame} ")
        return _one_line(line.append(self._headline_words(state)))

    def _verdict_lines(self, width: int, height: int) -> list[Text]:
        """Whether the model gets better; where there is little room, as much as a line holds."""
        most = MAX_VERDICT_ROWS if height >= MIN_HEIGHT else 1
        words = textwrap.wrap(self.verdict.sentence(), width, max_lines=most, placeholder=" ...")
        return [_one_line(Text(line, style="bold")) for line in words]

    def _is_spinning(self) -> bool:
        if self.end is not None:
            return False
        return self.phase is None or self.phase_elapsed_s() >= LONG_PHASE_S

    def _headline_words(self, state: str) -> str:
        step = self.step
        if self.phase is not None:
            elapsed = self.phase_elapsed_s()
            waited = f", {duration_words(elapsed)}" if elapsed >= LONG_PHASE_S else ""
            progress = f": {self.phase.progress}" if self.phase.progress else ""
            return printable(self.phase.text, 200) + waited + printable(progress, 200)
        if step is None:
            return state
        if self.end is not None:
            error_type, reason = self.end.error_type, self.end.error_message
            non_finite = non_finite_words(error_type, reason)
            return non_finite or f"{state}, step {step.step} of {step.total_steps}"
        waited_s = self._clock() - self._step_at
        return working_words(
            state,
            step.step,
            step.total_steps,
            step.eta_s,
            waited_s=waited_s,
            step_time_s=step.step_time_s,
        )

    def _is_silent(self) -> bool:
        step = self.step
        return step is not None and is_silent(
            TRAINING, self._clock() - self._step_at, step.step_time_s
        )

    def _bar(self, step: StepDone, width: int) -> Table:
        share = f"{100 * step.step // max(1, step.total_steps):d} %"
        tail = Text(f"{share:>5}")
        bar = ProgressBar(step.total_steps, step.step, width=max(10, width - len(tail) - 1))
        grid = Table.grid(padding=(0, 1, 0, 0))
        grid.add_row(bar, tail)
        return grid

    def _preview_title(self, previews: PreviewsDone) -> Text:
        title = Text("previews at ")
        title.append(f"step {previews.step}", style="bold")
        title.append(f": {match_words(previews.results)}")
        return title


def preview_lines(results: tuple[PreviewResult, ...], width: int, rows: int) -> list[Text]:
    """Golden beside (or above) generated, for as many prompts as there is room for.

    Args:
        width: columns of the terminal.
        rows: most lines to return.
    """
    is_wide = width >= SIDE_BY_SIDE_WIDTH
    heading = _columns(Text("golden", "dim"), Text("generated", "dim"), width) if is_wide else []
    rows -= len(heading)
    for text_rows in range(MAX_TEXT_ROWS, 0, -1):  # long answers get more lines while they fit
        blocks = [_block(result, width, text_rows, is_wide) for result in results]
        num_lines = sum(map(len, blocks))
        if num_lines <= rows:
            gap = [Text()] if num_lines + len(blocks) - 1 <= rows else []
            return [*heading, *[line for block in blocks for line in [*gap, *block]][len(gap) :]]
    shown = 0
    while shown < len(blocks) and sum(map(len, blocks[: shown + 1])) <= rows - 1:
        shown += 1
    more = Text(f"and {counted(len(blocks) - shown, 'more prompt')} in previews.jsonl", style="dim")
    lines = [line for block in blocks[:shown] for line in block]
    return [*heading, *lines, _one_line(more)] if rows > 0 else []


def _block(result: PreviewResult, width: int, text_rows: int, is_wide: bool) -> list[Text]:
    """One prompt: mark and prompt on a line, then golden and generated."""
    mark, remarks = mark_of(result), remarks_of(result)
    title = Text.assemble((f"{mark} ", f"bold {_MATCH_STYLES[mark]}".strip()))
    title.append(printable(result.prompt, max(10, width - 4 - len(remarks))), style="dim")
    title.append(f"  {remarks}" if remarks else "", style="yellow")
    column = max(8, (width - 5) // 2 if is_wide else width - 13)
    room = column * text_rows
    said = result.text if result.ok else (result.error_message or "")
    golden, generated = Text(), Text(fit(said, room, cell_len), style="" if result.ok else "red")
    if result.golden_answer is not None and not result.ok:
        golden = Text(fit(result.golden_answer, room, cell_len))
    elif result.golden_answer is not None:
        left, right = cut_pair(result.golden_answer, said, room, cell_len)
        golden, generated = (_coloured(side, mark) for side in (left, right))
    left_rows = _rows(golden, column, text_rows) if golden else []
    right_rows = _rows(generated, column, text_rows)
    if not is_wide or not golden:
        label = "generated" if result.ok else "failed"
        return [_one_line(title), *_labelled("golden", left_rows), *_labelled(label, right_rows)]
    lines = []
    for index in range(max(len(left_rows), len(right_rows))):
        pair = [rows[index] if index < len(rows) else Text() for rows in (left_rows, right_rows)]
        lines += _columns(pair[0], pair[1], width)
    return [_one_line(title), *lines]


def _columns(golden: Text, generated: Text, width: int) -> list[Text]:
    """One line of the two columns."""
    golden.truncate((width - 5) // 2, pad=True)
    line = Text("  ").append_text(golden).append(" | ", style="dim")
    return [_one_line(line.append_text(generated))]


def _coloured(pieces: Sequence[Piece], mark: str) -> Text:
    """A side of a comparison; what differs is coloured where that makes the answer wrong."""
    styles = DIFFERENCE_STYLES if mark == "x" else {}
    return Text.assemble(*[(piece.text, styles.get(piece.kind, "")) for piece in pieces])


def _labelled(label: str, rows: list[Text]) -> list[Text]:
    lines = []
    for index, row in enumerate(rows):
        line = Text(f"  {label if index == 0 else '':<9}  ", style="dim")
        lines.append(_one_line(line.append_text(_not_dim(row))))
    return lines


def _not_dim(text: Text) -> Text:
    """The text in its own colours behind a dim label."""
    text.style = "not dim"
    return text


def _rows(text: Text, width: int, most: int) -> list[Text]:
    """Cut a line into rows of at most `width` cells."""
    offsets, end = [], 0
    for piece in chop_cells(text.plain, width):
        end += len(piece)
        offsets.append(end)
    return list(text.divide(offsets[:-1]))[:most] or [Text()]


def _figures(step: StepDone, evaluation: EvaluationDone | None) -> Text:
    pairs = [pair for pair in metric_pairs(step, evaluation) if pair[0] != "grad"]  # 80 columns
    figures = [Text.assemble((f"{name} ", "dim"), (value, "bold")) for name, value in pairs]
    return Text("   ").join(figures)


def _one_line(text: Text) -> Text:
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


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
        verdict: RunningHeadline | None = None,
    ) -> None:
        """Take where to write.

        Args:
            clock: seconds that only go forward.
            elapsed_s: seconds that the run has gone on for already.
            verdict: what the headline knows already.
        """
        self.stream, self.clock = stream, clock
        # Model output is no markup: only Text objects are printed.
        self.console = Console(
            file=cast(TextIO, stream), markup=False, emoji=False, highlight=False
        )
        self._live: Live | None = None
        self._moved: list[tuple[logging.StreamHandler[SafeStream], object]] = []
        self._view = LiveView(clock, verdict)
        self._began = clock() - elapsed_s

    def on_event(self, event: Event) -> None:
        """Show what an event says."""
        view = self._view
        view.verdict.note(event)
        match event:
            case PhaseChanged():
                if not event.progress:
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
            case DriftMeasured():
                view.drift = event
            case ScoresDone():
                view.set_scores(event)
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
            elapsed = self.clock() - self._began
            words = closing_words(event, view.started, view.step, view.evaluation, elapsed)
            self._print(words, STATE_STYLES.get(event.state, ""))
            sentence = view.verdict.sentence()
            if sentence:
                self._print(sentence, "bold")
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
    table.add_row(Text(), Text("green text in [ ] is trained on", "dim"))
    return Group(table)


def _handlers_on(stream: object) -> Iterator[logging.StreamHandler[SafeStream]]:
    """The logging handlers of this process that write to a stream."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for logger in loggers:
        for handler in getattr(logger, "handlers", []):
            if isinstance(handler, logging.StreamHandler) and handler.stream is stream:
                yield handler
