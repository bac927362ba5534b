"""Finished answers on their way to the observers: scored, counted into figures, and told.

With `monitoring.scores` they are scored in a thread of their own, in the order in which they came:
neither training nor whoever brings the answers waits for a score.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from trainer.monitoring.events import DriftMeasured, Observers, PreviewsDone, ScoresDone
from trainer.preview.base import PreviewRequest, PreviewResult
from trainer.preview.drift import Drift
from trainer.scores.figures import ScoreHistory
from trainer.scores.scorer import Scorer

logger = logging.getLogger(__name__)

Source = Literal["previews", "evaluation"]

WAIT_S = 0.25


@dataclass(frozen=True)
class _Item:
    """The answers of one step."""

    source: Source
    step: int
    results: list[PreviewResult]
    waited_s: float


class Delivery:
    """What a PreviewScheduler calls with finished answers, from whatever thread."""

    def __init__(
        self,
        observers: Observers,
        *,
        scorer: Scorer | None = None,
        requests: Sequence[PreviewRequest] = (),
        known: Mapping[Source, Iterable[PreviewResult]] | None = None,
        keep: Callable[[list[PreviewResult]], None] = lambda results: None,
        decide: Callable[[int, list[PreviewResult]], None] = lambda step, results: None,
    ) -> None:
        """Take whom to tell.

        Args:
            scorer: None: answers are told at once.
            requests: all prompts of the run.
            known: answers of the interrupted part of a resumed run.
            keep: takes the answers of evaluations, which observers are told the means of only.
            decide: takes the same with their step, whatever became of them.
        """
        self._observers, self._scorer, self._keep = observers, scorer, keep
        self._decide = decide
        self._requests = {one.prompt_id: one for one in requests}
        graded = scorer.graded if scorer is not None else ()
        self._history: dict[Source, ScoreHistory] = {
            "previews": ScoreHistory(graded),
            "evaluation": ScoreHistory(graded),
        }
        for source, results in (known or {}).items():
            self._history[source].add(results)
        self._errors: dict[str, str] = {}
        self._waiting: deque[_Item] = deque()
        self._is_busy = self._is_closing = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def previews(self, step: int, results: list[PreviewResult], waited_s: float) -> None:
        """Take the answers that people read."""
        self._take(_Item("previews", step, results, waited_s))

    def evaluation(self, step: int, results: list[PreviewResult], waited_s: float) -> None:
        """Take the answers that are made for scores only."""
        self._take(_Item("evaluation", step, results, waited_s))

    @property
    def is_pending(self) -> bool:
        """Whether there are answers that nobody was told of."""
        with self._changed:
            return bool(self._waiting) or self._is_busy

    def settle(self, timeout_s: float, *, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Wait until all answers were told; at the end of time the rest is told without scores."""
        deadline = time.monotonic() + timeout_s
        while self.is_pending and time.monotonic() < deadline and not should_stop():
            with self._changed:
                self._changed.wait(min(WAIT_S, max(0.0, deadline - time.monotonic())))
        if self.is_pending:
            self.close()

    def close(self) -> None:
        """Tell what is waiting without scores, and end the processes; may be called twice."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
            thread = self._thread
        if self._scorer is not None:
            self._scorer.close()
        if thread is not None:
            thread.join()

    def _take(self, item: _Item) -> None:
        if self._scorer is None:
            self._tell(item)
            return
        with self._changed:
            self._waiting.append(item)
            self._changed.notify_all()
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="scores", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        """Score and tell one after the other; ends when there is nothing left and it is closed."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closing)
                if not self._waiting:
                    return
                item, self._is_busy = self._waiting.popleft(), True
            try:
                self._tell(self._scored(item))
            except Exception:  # answers are not lost because their score is
                logger.exception("the answers of step %d were not told", item.step)
                if item.source == "evaluation":
                    self._decide(item.step, item.results)
            finally:
                with self._changed:
                    self._is_busy = False
                    self._changed.notify_all()

    def _scored(self, item: _Item) -> _Item:
        assert self._scorer is not None, "items wait for scores only"
        results, errors = self._scorer.score(item.results, self._requests)
        for name, words in errors.items():
            if self._errors.get(name) != words:  # once, until it fails in another way
                told = f"score {name}: no value at step {item.step}: {words}"
                self._observers.notice(told, "warning")
        self._errors = errors
        return _Item(item.source, item.step, results, item.waited_s)

    def _tell(self, item: _Item) -> None:
        """Tell of the answers of a step, and of their means."""
        step, results, history = item.step, item.results, self._history[item.source]
        if item.source == "previews":
            self._observers.emit(
                PreviewsDone(step=step, results=tuple(results), duration_s=item.waited_s)
            )
        else:
            self._keep(results)
        history.add(results)
        figures = history.figures(step) if any(one.ok for one in results) else ()
        if figures:
            self._observers.emit(ScoresDone(step=step, source=item.source, figures=figures))
        if item.source == "evaluation":
            self._decide(step, results)


def deliver_previews(observers: Observers) -> Callable[[int, list[PreviewResult], float], None]:
    """What a PreviewScheduler of one's own calls with finished previews: observers are told."""
    return Delivery(observers).previews


def deliver_drift(observers: Observers, prompts: Sequence[str]) -> Callable[[int, Drift], None]:
    """What a PreviewScheduler calls with measured drift: observers are told; of a failure once."""
    told: set[str] = set()

    def deliver(step: int, drift: Drift) -> None:
        if drift.error is not None:
            if drift.error not in told:
                text = f"drift at step {step} could not be measured: {drift.error}"
                observers.notice(text, "warning")
            told.add(drift.error)
            return
        worst = max(range(len(prompts)), key=lambda index: drift.kl[index])
        observers.emit(
            DriftMeasured(
                step=step,
                kl=drift.mean_kl,
                num_changed=sum(drift.is_changed),
                num_prompts=len(prompts),
                worst_prompt=prompts[worst],
                worst_kl=drift.kl[worst],
                duration_s=drift.seconds,
            )
        )

    return deliver
