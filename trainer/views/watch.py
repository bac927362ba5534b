"""watch_run: the terminal view of `trainer train`, made from the files of a run elsewhere."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from trainer.errors import EXIT_COMPLETED, EXIT_FAILED, OutputError
from trainer.monitoring.events import (
    TRAINING,
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
)
from trainer.monitoring.loss_names import FIELD, losses_of_line
from trainer.monitoring.status_reader import (
    METRICS_NAME,
    PREVIEWS_NAME,
    RESUMED,
    LineTail,
    as_preview,
    limit_of_resume,
    parse_lines,
)
from trainer.monitoring.status_schema import TrainingStatus
from trainer.preview.base import PreviewResult
from trainer.views.metrics import scores_of_line
from trainer.views.run_reader import RunReader
from trainer.views.timeline import PreviewBook

POLL_S = 0.5

METRIC_EVENTS = {one.__name__: one for one in (StepDone, EvaluationDone, DriftMeasured)}

NO_NUMBERS = {"EvaluationDone.train_loss", "DriftMeasured.worst_prompt"}
"""Fields of theirs that may be something else than a number."""

NUM_PREVIEWS_BEFORE = 10
"""Preview steps from before attaching that a live view is told, for its accuracy."""


class Follower:
    """Turns what is new in a run folder into the events that wrote it."""

    def __init__(self, folder: Path, *, num_before: int) -> None:
        """Take the run.

        Args:
            num_before: preview steps of the past to tell at the first look.
        """
        self.reader = RunReader(folder)
        self._num_before = num_before
        self._metrics = LineTail(folder / METRICS_NAME)
        self._previews = LineTail(folder / PREVIEWS_NAME)
        self._is_attached = self._is_started = self._is_ended = False
        self._notices: set[tuple[float, str]] = set()
        self._phase = self._progress = ""
        self._checkpoint: str | None = None
        self._pid: int | None = None

    def poll(self) -> Iterator[Event]:
        """The events since the last call; at the first one, what is needed to draw the run.

        Raises:
            OutputError: there is no status to read.
        """
        self.reader.poll_summary()
        status = self.reader.status
        if status is None:
            raise OutputError(self.reader.words())
        yield from self._beginning(status)
        yield from self._steps()
        yield from self._answers()
        yield from self._sayings(status)
        self._is_attached = True
        if self.reader.is_over and not self._is_ended:
            self._is_ended = True
            yield _ending(status)

    @property
    def is_ended(self) -> bool:
        """Whether the run said how it ended."""
        return self._is_ended

    def _beginning(self, status: TrainingStatus) -> Iterator[Event]:
        if status.pid != self._pid:  # another process goes on with the run
            self._pid, self._is_started, self._is_ended = status.pid, False, False
        if not self._is_started and status.total_steps is not None:
            self._is_started = True
            yield _started(status)

    def _steps(self) -> Iterator[Event]:
        rows, _ = parse_lines(self._metrics.poll().lines)
        events = [_metric(row) for row in rows]
        if self._is_attached:
            yield from (event for event in events if event is not None)
            return
        for kind in (EvaluationDone, DriftMeasured, ScoresDone, StepDone):
            newest = [event for event in events if isinstance(event, kind)][-1:]
            yield from newest

    def _answers(self) -> Iterator[Event]:
        rows, _ = parse_lines(self._previews.poll().lines)
        if self._is_attached:
            results = [found for row in rows if isinstance(found := as_preview(row), PreviewResult)]
            for step, group in itertools.groupby(results, key=lambda result: result.step):
                yield PreviewsDone(step=step, results=tuple(group), duration_s=0.0)
            return
        book = PreviewBook()
        for row in rows:
            if row.get("type") == RESUMED:
                book.drop_after(limit_of_resume(row["step"]))
            elif isinstance(found := as_preview(row), PreviewResult):
                book.add(found)
        for step in book.steps[-self._num_before :]:
            yield PreviewsDone(step=step, results=tuple(book.of_step(step)), duration_s=0.0)

    def _sayings(self, status: TrainingStatus) -> Iterator[Event]:
        """Notices, checkpoints and phases; those of before attaching are only remembered."""
        for notice in status.notices:
            key = (notice.created_at, notice.text)
            is_new = key not in self._notices
            self._notices.add(key)
            if is_new and (self._is_attached or notice.level != "info"):
                yield Notice(text=notice.text, level=notice.level)
        saved = status.last_checkpoint
        if saved is not None and saved.path != self._checkpoint:
            self._checkpoint = saved.path
            if self._is_attached:
                yield Notice(text=f"checkpoint of step {saved.step}: {saved.path}")
        is_phase_new = status.phase != self._phase and not self.reader.is_over
        self._phase = status.phase
        if is_phase_new and status.phase and (self._is_attached or status.phase != TRAINING):
            is_pause = status.state == "training"
            yield PhaseChanged(state=status.state, text=status.phase, is_pause=is_pause)
        is_progress_new = status.phase_progress != self._progress and not self.reader.is_over
        self._progress = status.phase_progress
        if is_progress_new and status.phase_progress:
            yield PhaseChanged(
                state=status.state, text=status.phase, progress=status.phase_progress
            )


def watch_run(
    folder: Path, display: ClosingObserver, *, num_before: int, is_once: bool = False
) -> int:
    """Show a run until it ends or its process is gone.

    Args:
        is_once: only tell where the run stands now.
    Returns:
        The run's own exit code where it is known, else 1 for anything but a completed run.
    Raises:
        OutputError: there is no run.
    """
    follower = Follower(folder, num_before=num_before)
    try:
        while True:
            for event in follower.poll():
                display.on_event(event)
            if follower.is_ended or is_once:
                break
            if follower.reader.is_lost():
                display.on_event(Notice(text=follower.reader.words(), level="error"))
                break
            time.sleep(POLL_S)
    finally:
        display.close()
    return _exit_code(follower.reader) if not is_once else EXIT_COMPLETED


def _exit_code(reader: RunReader) -> int:
    code = reader.manifest.get("exit_code")
    if isinstance(code, int) and not isinstance(code, bool) and 0 <= code < 256:
        return code
    return EXIT_COMPLETED if reader.state() == "completed" else EXIT_FAILED


def _started(status: TrainingStatus) -> RunStarted:
    return RunStarted(
        model_name=status.model_name or "?",
        total_steps=status.total_steps or 0,
        start_step=status.start_step,
        num_epochs=status.num_epochs or 0.0,
        num_train_rows=status.num_train_rows or 0,
        num_validation_rows=status.num_validation_rows or 0,
        context_window=status.context_window or 0,
        effective_batch_size=status.effective_batch_size or 0,
        output_dir=status.output_dir or "",
    )


def _ending(status: TrainingStatus) -> RunEnded:
    return RunEnded(
        state=status.state,
        step=status.step,
        error_type=status.error.type if status.error else None,
        error_message=status.error.message if status.error else None,
        summary=status.summary,
    )


def _metric(row: Mapping[str, Any]) -> Event | None:
    """The event of a line of metrics.jsonl; a number that JSON could not hold is NaN."""
    if row.get("type") == "ScoresDone":
        return scores_of_line(row)
    kind: Any = METRIC_EVENTS.get(str(row.get("type")))
    if kind is None:
        return None
    values = {item.name: row.get(item.name) for item in fields(kind)}
    if FIELD in values:
        numbers = losses_of_line(row).items()
        values[FIELD] = {name: float("nan") if one is None else one for name, one in numbers}
    for name, value in values.items():
        is_number = isinstance(value, int | float) or name == FIELD
        if not is_number and f"{kind.__name__}.{name}" not in NO_NUMBERS:
            values[name] = float("nan")
    event: Event = kind(**values)
    return event
