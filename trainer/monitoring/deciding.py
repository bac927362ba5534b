"""Scores that decide: evaluations are taken in order of steps, and training waits for them.

At an evaluation step training goes on while that step is answered and scored; the evaluation of
`score_lag` evaluations before is taken then, however long its answers take. So what is decided, and
after which step, does not depend on how fast they come. The main process decides; the others are
told with the other wishes at the end of a step.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trainer.counts import counted
from trainer.monitoring.events import TRAINING, Observers, ScoreDecided
from trainer.preview.base import PreviewResult
from trainer.publish.lane import PublishedPreviews
from trainer.scores.rule import ScoreRule, Verdict, values_by_prompt

WAIT_S = 0.25

HURRY_EVERY_S = 5.0
"""How often a server that does not answer is asked again while training waits for it."""


class DecidingScores:
    """Which step is best by a score, and whether the run is over by one."""

    def __init__(
        self,
        observers: Observers,
        *,
        stop_rule: ScoreRule | None,
        best_rule: ScoreRule | None,
        interval: int,
        lag: int,
        timeout_s: float,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Take nothing yet.

        Args:
            stop_rule: stops the run; None: no score does.
            best_rule: says which step is best, often the same one; None: no score does.
            interval: steps between evaluations.
            lag: evaluations that training may be ahead of the one that is taken.
            timeout_s: how long a server may be away before its evaluations count as missing.
            should_stop: whether nobody may wait any longer.
        """
        self.stop_rule, self.best_rule = stop_rule, best_rule
        self.rules = list(
            {id(one): one for one in (stop_rule, best_rule) if one is not None}.values()
        )
        self.interval, self.lag = interval, lag
        self.pending: list[int] = []
        """Steps that were asked and are not taken yet, in order."""
        self.asked_step = -1
        """The newest step that was asked."""
        self.waited_s = 0.0
        """Seconds that training stood still for scores."""
        self.stop_reason: str | None = None
        self.spool: PublishedPreviews | None = None
        """Where the weights of evaluations lie until they are answered; None: in this process."""
        self._observers, self._timeout_s, self._should_stop = observers, timeout_s, should_stop
        self._arrived: dict[int, list[PreviewResult]] = {}
        self._changed = threading.Condition()

    # ---- answers come, from any thread

    def arrive(self, step: int, results: list[PreviewResult]) -> None:
        """Take the scored answers of a step, or the reasons why there are none."""
        with self._changed:
            self._arrived[step] = results
            self._changed.notify_all()

    def has(self, step: int) -> bool:
        """Whether the answers of a step have come."""
        with self._changed:
            return step in self._arrived

    # ---- the training thread

    def is_due(self, step: int, *, is_last: bool) -> bool:
        """Whether `step` is evaluated."""
        return step % self.interval == 0 or is_last

    def make_room(self, step: int) -> None:
        """Wait until the weights of `step` can be copied without an older one giving way."""
        spool = self.spool
        if spool is not None:
            self._wait(spool.has_room, f"waiting for a place for the weights of step {step}")

    def note_asked(self, step: int) -> None:
        """The answers of `step` were asked for."""
        self.pending.append(step)
        self.asked_step = step

    def catch_up(self, step: int, *, num_ahead: int | None = None) -> bool:
        """Take all but the newest `num_ahead` evaluations, waiting for each; None: as many as lag.

        Args:
            step: where training is.
        Returns:
            Whether that was done; a stop request ends it.
        """
        num_ahead = self.lag if num_ahead is None else num_ahead
        while len(self.pending) > num_ahead:
            wanted = self.pending[0]
            if not self.wait_for(wanted) and self._should_stop():
                return False
            with self._changed:
                results = self._arrived.pop(wanted, None)
            self.pending.pop(0)
            self._take(wanted, results, step)
        return True

    def wait_for(self, step: int) -> bool:
        """Wait for the answers of a step; False: they did not come, or a stop was asked for."""
        return self._wait(lambda: self.has(step), f"waiting for the scores of step {step}")

    @property
    def is_over(self) -> bool:
        """Whether a score says that it is time to stop."""
        return self.stop_rule is not None and self.stop_rule.is_over

    @property
    def protected_steps(self) -> set[int]:
        """Steps whose checkpoints are kept: the best one, and those that may still be it."""
        best = {self.best_rule.best_step} if self.best_rule is not None else set()
        return {*self.pending, *best} - {0}

    def stop(self, step: int) -> None:
        """Say that the run ends by a score after `step`."""
        rule = self.stop_rule
        assert rule is not None, "a rule is over"
        kept = f"; its checkpoint is kept (best step {rule.best_step})" if rule.best_step else ""
        if kept and self.pending:
            kept += f", unless step {self.pending[-1]}, which is not scored yet, is clearly above"
        self.stop_reason = (
            f"early stopping: stopped at step {step}: {rule.metric} has not clearly risen since "
            f"step {rule.reference_step} ({counted(rule.num_without, 'evaluation')}){kept}"
        )
        self._observers.notice(self.stop_reason)

    # ---- what is remembered

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; it does not depend on which answers have come."""
        return {
            "asked_step": self.asked_step,
            "pending": list(self.pending),
            "best_by": self.best_rule.metric if self.best_rule is not None else None,
            "rules": {one.metric: one.state() for one in self.rules},
        }

    def restore(self, state: Mapping[str, Any] | None, kept: Sequence[int]) -> None:
        """Take back what `state` gave.

        Args:
            state: None: no score decided in the interrupted run.
            kept: steps that have a checkpoint. A best one without is none any more.
        """
        if state is None:
            return
        self.asked_step, self.pending = int(state["asked_step"]), list(state["pending"])
        for rule in self.rules:
            rule.restore(state["rules"].get(rule.metric, {}))
            if rule.best_step not in kept:
                rule.best_step = 0

    def unasked(self, step: int, *, is_last: bool) -> bool:
        """Whether the interrupted run ended before it evaluated `step`, where that is due."""
        return not self.is_over and step > self.asked_step and self.is_due(step, is_last=is_last)

    def summary(self) -> dict[str, Any]:
        """What became of the evaluations, as JSON values."""
        return {
            "waited_s": round(self.waited_s, 3),
            "rules": [
                {
                    "metric": one.metric,
                    "num_taken": one.num_taken,
                    "missing_steps": list(one.missing_steps),
                    "best_step": one.best_step or None,
                }
                for one in self.rules
            ],
        }

    # ---- one evaluation

    def _take(self, wanted: int, results: list[PreviewResult] | None, step: int) -> None:
        for rule in self.rules:
            values, missing = values_by_prompt(results or (), rule.metric)
            if results is None:
                missing = f"no answer for {self._timeout_s:g} s"
            verdict = rule.take(wanted, values, missing)
            words = verdict_words(rule, verdict)
            self._observers.notice(words, "info" if verdict.missing is None else "warning")
            self._observers.emit(
                ScoreDecided(
                    step=step,
                    evaluation_step=wanted,
                    metric=rule.metric,
                    mean=verdict.mean,
                    is_best=verdict.is_best,
                    best_step=rule.best_step,
                    reference_step=rule.reference_step,
                    num_without=rule.num_without,
                    patience=rule.patience,
                    missing=verdict.missing,
                    num_missing=len(rule.missing_steps),
                    waited_s=round(self.waited_s, 3),
                )
            )

    def _wait(self, is_so: Callable[[], bool], words: str) -> bool:
        """Wait, and count for how long; False: nobody answers any more, or a stop is asked for."""
        started = hurried = time.monotonic()
        is_told = False
        while not (found := is_so()) and not self._should_stop() and not self._is_given_up():
            if not is_told:
                self._observers.pause(words)
                is_told = True
            if self.spool is not None and time.monotonic() - hurried > HURRY_EVERY_S:
                hurried = time.monotonic()
                self.spool.hurry()
            with self._changed:
                if not is_so():
                    self._changed.wait(WAIT_S)
        if is_told:
            self.waited_s += time.monotonic() - started
            self._observers.pause(TRAINING)
        return found

    def _is_given_up(self) -> bool:
        return self.spool is not None and self.spool.away_s() > self._timeout_s


def verdict_words(rule: ScoreRule, verdict: Verdict) -> str:
    """Such as `score.exact of step 40 is 0.52: not clearly above step 20 (1 of 3)`."""
    if verdict.missing is not None:
        return (
            f"{rule.metric} of step {verdict.step} is missing and decides nothing: "
            f"{' '.join(verdict.missing.split())[:300]}"
        )
    head = f"{rule.metric} of step {verdict.step} is {verdict.mean:.4g}"
    if verdict.against is None:
        return f"{head}, the first one: later steps are compared with it"
    if verdict.is_best:
        return f"{head}: clearly above step {verdict.against}, so it is the best so far"
    of = f" of {rule.patience}" if rule.num_without <= rule.patience else ""
    return f"{head}: not clearly above step {verdict.against} ({rule.num_without}{of})"
