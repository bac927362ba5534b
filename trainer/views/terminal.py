"""Terminal displays as observers: plain lines, JSON lines, quiet, and the choice among them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Literal, TextIO

from trainer.errors import ConfigError
from trainer.files import SafeStream
from trainer.monitoring.events import (
    TRAINING,
    CardShown,
    CheckpointSaved,
    ClosingObserver,
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
    json_line,
    plain_values,
    printable,
)
from trainer.views.cuts import cut_pair, fit
from trainer.views.running_headline import RunningHeadline
from trainer.views.score_words import scores_words
from trainer.views.words import (
    ANSWER_CHARS,
    LINE_CHARS,
    NOTICE_CHARS,
    card_words,
    checkpoint_words,
    closing_words,
    drift_words,
    evaluation_words,
    left_words,
    mark_of,
    match_words,
    metric_pairs,
    notice_words,
    remarks_of,
    start_words,
)

DisplayKind = Literal["auto", "rich", "plain", "json", "quiet"]

MIN_LINE_GAP_S = 2.0

MAX_LINE_GAP_S = 60.0

LINE_GAP_SHARE = 0.01
"""Between status lines lies this share of the run's time, within the two limits above."""

SHARE_OF_STEPS = 20
"""At least one status line in each 1/20 (5 %) of the steps, however fast they are."""


def create_display(
    kind: DisplayKind = "auto",
    stream: TextIO | None = None,
    *,
    elapsed_s: float = 0.0,
    verdict: RunningHeadline | None = None,
) -> ClosingObserver:
    """Make the display of a run.

    Args:
        kind: `auto` is `rich` on a terminal and `plain` elsewhere.
        stream: where to write; None: standard output.
        elapsed_s: seconds that the run has gone on for already.
        verdict: what the headline knows already; None: nothing.
    Raises:
        ConfigError: the kind is unknown.
    """
    stream = sys.stdout if stream is None else stream
    if kind == "auto":
        kind = "rich" if stream.isatty() else "plain"
    safe = SafeStream(stream)
    if kind == "rich":
        # rich takes a tenth of a second to import, and logs never need it.
        from trainer.views.terminal_rich import RichDisplay

        return RichDisplay(safe, elapsed_s=elapsed_s, verdict=verdict)
    displays: dict[str, Callable[[SafeStream], ClosingObserver]] = {
        "plain": partial(PlainDisplay, elapsed_s=elapsed_s, verdict=verdict),
        "json": JsonDisplay,
        "quiet": partial(QuietDisplay, elapsed_s=elapsed_s),
    }
    if kind not in displays:
        raise ConfigError(
            f"monitoring.display={kind!r} is unknown; give auto, rich, plain, json or quiet."
        )
    return displays[kind](safe)


class _Display:
    """What line displays share: the stream, the clock and the newest events."""

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
        self.began = clock() - elapsed_s
        self.started: RunStarted | None = None
        self.step: StepDone | None = None
        self.evaluation: EvaluationDone | None = None

    def note(self, event: Event) -> None:
        """Keep the newest event of each kind that the closing line is made of."""
        if isinstance(event, RunStarted):
            self.started = event
        elif isinstance(event, StepDone):
            self.step = event
        elif isinstance(event, EvaluationDone):
            self.evaluation = event

    def write_end(self, event: RunEnded) -> None:
        """The closing line of a run that started; reasons are the command line's to print."""
        if self.started is None:
            return
        elapsed = self.clock() - self.began
        self.stream.line(closing_words(event, self.started, self.step, self.evaluation, elapsed))

    def close(self) -> None:
        """Flush; the stream belongs to somebody else."""
        self.stream.flush()


class PlainDisplay(_Display):
    """Lines that are good to read in a log file, few enough to keep it small."""

    def __init__(
        self,
        stream: SafeStream,
        clock: Callable[[], float] = time.monotonic,
        *,
        elapsed_s: float = 0.0,
        verdict: RunningHeadline | None = None,
    ) -> None:
        """Take where to write, and what the headline knows already; see _Display."""
        super().__init__(stream, clock, elapsed_s=elapsed_s)
        self.verdict = verdict or RunningHeadline()
        self._last_line_at = float("-inf")
        self._last_line_step = -1
        self._first_step_at: float | None = None

    def on_wait(self, text: str) -> None:
        """Say that a phase goes on."""
        self.stream.line(printable(text, NOTICE_CHARS))

    def on_event(self, event: Event) -> None:
        """Write the lines of an event, or none."""
        self.note(event)
        self.verdict.note(event)
        line = self.stream.line
        match event:
            case PhaseChanged():
                # In a log the pauses between steps would be a line each; people wait for the first.
                # How far it is says `on_wait`, ever more rarely.
                is_first = self.step is None and event.text != TRAINING
                if not event.progress and (not event.is_pause or is_first):
                    line(printable(event.text, NOTICE_CHARS))
            case CardShown():
                line(card_words(event))
            case RunStarted():
                line(start_words(event))
            case StepDone():
                if self._is_line_due(event):
                    line(self._step_line(event))
            case EvaluationDone():
                line(evaluation_words(event))
            case DriftMeasured():
                line(drift_words(event))
            case PreviewsDone():
                self._write_previews(event)
            case ScoresDone():
                line(scores_words(event))
            case CheckpointSaved():
                line(checkpoint_words(event))
            case Notice():
                line(notice_words(event))
            case RunEnded():
                self.write_end(event)
                if self.started is not None and self.verdict.sentence():
                    line(self.verdict.sentence())

    def _is_line_due(self, event: StepDone) -> bool:
        """First and last step, each 5 % of the steps, and else as time goes by."""
        now = self.clock()
        is_first = self._first_step_at is None
        self._first_step_at = now if self._first_step_at is None else self._first_step_at
        share = max(1, event.total_steps // SHARE_OF_STEPS)
        is_share = event.step // share > self._last_line_step // share
        expected_s = now - self._first_step_at + event.eta_s
        gap = min(max(LINE_GAP_SHARE * expected_s, MIN_LINE_GAP_S), MAX_LINE_GAP_S)
        is_time = now - self._last_line_at >= gap
        if not (is_first or is_share or is_time or event.step >= event.total_steps):
            return False
        self._last_line_at, self._last_line_step = now, event.step
        return True

    def _step_line(self, event: StepDone) -> str:
        figures = "  ".join(f"{name} {value}" for name, value in metric_pairs(event, None))
        width = len(str(event.total_steps))
        left = left_words(event.eta_s)
        return f"step {event.step:{width}d}/{event.total_steps}  {figures}  {left}"

    def _write_previews(self, event: PreviewsDone) -> None:
        if event.common_error is not None and len(event.results) > 1:
            reason = printable(event.common_error, 2 * ANSWER_CHARS)
            self.stream.line(f"no previews of step {event.step}: {reason}")
            return
        lines = [f"previews at step {event.step}: {match_words(event.results)}"]
        for result in event.results:
            golden, said = "-", result.text if result.ok else str(result.error_message)
            if result.golden_answer is not None and result.ok:
                sides = cut_pair(result.golden_answer, said, ANSWER_CHARS)
                golden, said = ("".join(piece.text for piece in side) for side in sides)
            elif result.golden_answer is not None:
                golden = fit(result.golden_answer, ANSWER_CHARS)
            said = printable(said, ANSWER_CHARS)
            # A prompt has the room that its answers leave.
            prompt = printable(result.prompt, LINE_CHARS - len(golden) - len(said))
            label = "generated" if result.ok else "failed"
            text = f"  {mark_of(result)} {prompt}  golden: {golden} | {label}: {said}"
            lines.append(f"{text}  {remarks_of(result)}".rstrip())
        self.stream.line("\n".join(lines))


class JsonDisplay:
    """One JSON object per event and line, for programs."""

    def __init__(self, stream: SafeStream) -> None:
        """Take where to write."""
        self.stream = stream

    def on_event(self, event: Event) -> None:
        """Write the event with its name and the time; numbers JSON cannot hold are null.

        How far a phase is stands in status.json: here it would be a line every second.
        """
        if isinstance(event, PhaseChanged) and event.progress:
            return
        odd: dict[str, str] = {}
        values = plain_values(event, odd)
        line = {"event": type(event).__name__, "created_at": time.time(), **values}
        self.stream.write(json_line({**line, "non_finite": odd} if odd else line))
        self.stream.flush()

    def close(self) -> None:
        """Flush; the stream belongs to somebody else."""
        self.stream.flush()


class QuietDisplay(_Display):
    """Warnings, errors and the closing line."""

    def on_event(self, event: Event) -> None:
        """Write what must not be missed."""
        self.note(event)
        if isinstance(event, Notice) and event.level != "info":
            self.stream.line(notice_words(event))
        elif isinstance(event, RunEnded):
            self.write_end(event)
