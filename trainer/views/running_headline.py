"""RunningHeadline: the headline of a run that is told event by event, as the terminal views are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer.monitoring.events import EvaluationDone, Event, PreviewsDone, RunEnded, RunStarted
from trainer.views.headline import Headline, headline_of
from trainer.views.metrics import EvaluationPoint
from trainer.views.run_reader import RunReader
from trainer.views.timeline import FinalEvaluation, PreviewBook, final_score


class RunningHeadline:
    """Keeps what the headline is made of."""

    def __init__(
        self,
        previews: PreviewBook | None = None,
        evaluations: Sequence[EvaluationPoint] = (),
        final: FinalEvaluation | None = None,
    ) -> None:
        """Take what a run has told before; None and nothing: it has just begun."""
        self._final = final
        self._previews = previews if previews is not None else PreviewBook()
        self._evaluations = {one.step: one for one in evaluations}
        self._words: str | None = None

    def note(self, event: Event) -> None:
        """Take what an event adds; told twice it counts once."""
        if isinstance(event, PreviewsDone) and not event.is_superseded:
            for result in event.results:
                self._previews.add(result)
        elif isinstance(event, EvaluationDone):
            loss = event.train_loss if event.train_loss is not None else float("nan")
            point = EvaluationPoint(event.step, event.val_loss, loss)
            self._evaluations[event.step] = point
        elif isinstance(event, RunStarted) and event.start_step and not self._is_begun:
            self._read(Path(event.output_dir))
        elif isinstance(event, RunEnded):
            self._final = final_score(event.summary) or self._final
        else:
            return
        self._words = None

    def sentence(self) -> str:
        """The headline; "" where the run has told nothing to judge by."""
        if self._words is None:  # a view is drawn far more often than previews come
            self._words = self.headline().sentence if self._is_begun else ""
        return self._words

    def headline(self) -> Headline:
        """The same in its parts."""
        return headline_of(self._previews, list(self._evaluations.values()), self._final)

    @property
    def _is_begun(self) -> bool:
        return bool(len(self._previews) or self._evaluations or self._final)

    def _read(self, folder: Path) -> None:
        """What the run told before it was resumed; the files say already up to which step."""
        reader = RunReader(folder)
        reader.poll()
        self._previews = reader.previews
        self._evaluations = {one.step: one for one in reader.metrics.evaluations}
