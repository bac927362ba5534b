"""Answers on their way to the observers: in order, scored, and none of them lost."""

from __future__ import annotations

import threading
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from trainer.monitoring.delivery import Delivery
from trainer.monitoring.events import Notice, Observers, PreviewsDone, ScoresDone
from trainer.monitoring.status_schema import MatchHistory
from trainer.preview.base import PreviewResult
from trainer.scores.figures import ScoreHistory


class Recorder:
    def __init__(self) -> None:
        self.events: list[Any] = []

    def on_event(self, event: Any) -> None:
        self.events.append(event)

    def close(self) -> None: ...

    def of_kind(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


class SlowScorer:
    """Scores when it is told to."""

    graded: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self.go, self.is_closed = threading.Event(), False

    def score(self, results: Any, requests: Any) -> Any:
        self.go.wait()
        if self.is_closed:
            return list(results), {"good": "the run ended"}
        return [one.model_copy(update={"scores": {"good": one.step / 10}}) for one in results], {}

    def close(self) -> None:
        self.is_closed = True
        self.go.set()


def answers(step: int, probability: float | None = None, count: int = 2) -> list[PreviewResult]:
    return [
        PreviewResult(
            step=step, prompt="?", text="!", prompt_id=f"p{n}", golden_probability=probability
        )
        for n in range(count)
    ]


def test_answers_without_scores_are_told_at_once() -> None:
    recorder = Recorder()
    delivery = Delivery(Observers([recorder]))
    delivery.previews(0, answers(0, 0.1), 0.5)
    delivery.previews(5, answers(5, 0.3), 0.5)
    delivery.previews(6, answers(6), 0.5)
    assert [event.step for event in recorder.of_kind(PreviewsDone)] == [0, 5, 6]
    first, second = recorder.of_kind(ScoresDone)  # the last one has no figures
    [figure] = second.figures
    assert (figure.name, figure.step, figure.num_prompts) == ("golden_probability", 5, 2)
    assert (figure.first.step, round(figure.first.difference, 9)) == (0, 0.2)
    assert first.figures[0].first is None


def test_nobody_waits_for_scores_and_their_order_stays() -> None:
    recorder, scorer = Recorder(), SlowScorer()
    delivery = Delivery(Observers([recorder]), scorer=scorer)  # type: ignore[arg-type]
    for step in (0, 2, 4):
        delivery.previews(step, answers(step), 0.0)
        delivery.evaluation(step, answers(step), 0.0)
    assert recorder.events == []
    assert delivery.is_pending
    scorer.go.set()
    delivery.settle(10.0)
    assert not delivery.is_pending
    assert [event.step for event in recorder.of_kind(PreviewsDone)] == [0, 2, 4]
    told = [(one.step, one.source) for one in recorder.of_kind(ScoresDone)]
    assert told == [(s, source) for s in (0, 2, 4) for source in ("previews", "evaluation")]
    delivery.close()


def test_at_the_end_of_time_answers_are_told_without_scores() -> None:
    recorder, scorer = Recorder(), SlowScorer()
    delivery = Delivery(Observers([recorder]), scorer=scorer)  # type: ignore[arg-type]
    for step in (0, 2):
        delivery.previews(step, answers(step), 0.0)
    delivery.settle(0.1)
    assert [event.step for event in recorder.of_kind(PreviewsDone)] == [0, 2]
    assert recorder.of_kind(ScoresDone) == []
    [notice] = recorder.of_kind(Notice)  # said once, not at each step
    assert "score good: no value at step 0" in notice.text
    delivery.previews(4, answers(4), 0.0)  # of a lane that is given up later
    delivery.settle(0.1)
    assert recorder.of_kind(PreviewsDone)[-1].step == 4


def test_a_resumed_run_compares_with_what_was_answered_before() -> None:
    recorder = Recorder()
    delivery = Delivery(Observers([recorder]), known={"previews": answers(0, 0.2)})
    delivery.previews(8, answers(8, 0.1), 0.0)
    [event] = recorder.of_kind(ScoresDone)
    assert event.figures[0].first.step == 0


# ---- words never say "falling" of what rises


RISING = st.lists(st.lists(st.booleans(), min_size=8, max_size=30), min_size=2, max_size=12).map(
    lambda steps: [[any(col[: i + 1]) for col in _columns(steps)] for i in range(len(steps))]
)


def _columns(steps: list[list[bool]]) -> list[list[bool]]:
    width = min(map(len, steps))
    return [[step[index] for step in steps] for index in range(width)]


@given(RISING, st.data())
def test_the_trend_never_says_falling_of_rising_matches(
    steps: list[list[bool]], data: st.DataObject
) -> None:
    """Prompts only ever become right; some have no answer at some steps."""
    history, scores = MatchHistory(), ScoreHistory()
    for step, matches in enumerate(steps):
        results = [
            PreviewResult(
                step=step,
                prompt="?",
                text="!",
                prompt_id=f"p{n}",
                matches=is_match,
                scores={"right": float(is_match)},
            )
            for n, is_match in enumerate(matches)
            if data.draw(st.integers(0, 4)) or n == 0
        ]
        history.add(results)
        scores.add(results)
        assert history.trend() in (None, "rising")
        for figure in scores.figures(step):
            for other in (figure.first, figure.best):
                assert other is None or other.difference >= 0 or not other.is_clear
