"""Finished previews on their way to the observers: counted into figures, and told."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from trainer.monitoring.events import Observers, PreviewsDone, ScoresDone
from trainer.preview.base import PreviewResult
from trainer.scores.figures import ScoreHistory


class Delivery:
    """What a PreviewScheduler calls with finished answers, from whatever thread."""

    def __init__(
        self,
        observers: Observers,
        *,
        source: Literal["previews", "evaluation"] = "previews",
        known: Iterable[PreviewResult] = (),
    ) -> None:
        """Take whom to tell.

        Args:
            known: answers of the interrupted part of a resumed run.
        """
        self._observers, self._source = observers, source
        self._history = ScoreHistory()
        self._history.add(known)

    def __call__(self, step: int, results: list[PreviewResult], waited_s: float) -> None:
        """Tell of the answers of a step, and of their means."""
        if self._source == "previews":
            told = PreviewsDone(step=step, results=tuple(results), duration_s=waited_s)
            self._observers.emit(told)
        self._history.add(results)
        figures = self._history.figures(step) if any(one.ok for one in results) else ()
        if figures:
            self._observers.emit(ScoresDone(step=step, source=self._source, figures=figures))
