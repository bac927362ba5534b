"""Evaluations are taken by step: neither the order nor the time of their arrival matters."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest

from trainer.monitoring.deciding import DecidingScores
from trainer.monitoring.events import Observers, ScoreDecided
from trainer.preview.base import PreviewResult
from trainer.scores.rule import ScoreRule

SHARES = {0: 0.0, 10: 0.5, 20: 0.5, 30: 0.5, 40: 0.5}


def answers(step: int) -> list[PreviewResult]:
    return [
        PreviewResult(
            step=step,
            prompt=f"p{n}",
            text="",
            golden_answer=None,
            finish_reason="stop",
            backend_type="local",
            scores={"exact": float(n < 40 * SHARES[step])},
        )
        for n in range(40)
    ]


class Seen:
    def __init__(self) -> None:
        self.events: list[Any] = []

    def on_event(self, event: Any) -> None:
        self.events.append(event)

    def close(self) -> None: ...


def deciding(seen: Seen | None = None, lag: int = 1, **more: Any) -> DecidingScores:
    rule = ScoreRule("score.exact", patience=2)
    return DecidingScores(
        Observers([seen] if seen is not None else []),
        **{"stop_rule": rule, "best_rule": rule, "interval": 10, "lag": lag, "timeout_s": 60.0},
        **more,
    )


@pytest.mark.parametrize("lag", [0, 1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_the_stop_comes_lag_evaluations_later_whatever_arrives_when(lag: int, seed: int) -> None:
    seen = Seen()
    one = deciding(seen, lag)
    steps = list(SHARES)
    random.Random(seed).shuffle(steps)
    for step in steps:  # all is there before it is asked for, in any order
        one.arrive(step, answers(step))
    stopped = None
    for step in (0, 10, 20, 30, 40, 50):
        one.note_asked(step)
        assert one.catch_up(step)
        if one.is_over:
            stopped = step
            break
    assert stopped == 30 + 10 * lag
    decided = [event for event in seen.events if isinstance(event, ScoreDecided)]
    assert [event.evaluation_step for event in decided] == [0, 10, 20, 30]
    assert [event.step for event in decided] == [s + 10 * lag for s in (0, 10, 20, 30)]


def test_training_waits_for_the_evaluation_whose_turn_it_is_and_counts_it() -> None:
    one = deciding()
    one.note_asked(0)
    assert one.catch_up(0)
    assert one.waited_s == 0
    one.note_asked(10)
    threading.Timer(0.05, lambda: one.arrive(0, answers(0))).start()
    assert one.catch_up(10)
    assert one.waited_s > 0
    assert one.pending == [10]


class Away:
    """A lane whose server is gone."""

    def away_s(self) -> float:
        return 61.0

    def has_room(self) -> bool:
        return False

    def hurry(self) -> None: ...


def test_a_server_that_is_away_too_long_makes_the_evaluation_missing() -> None:
    seen = Seen()
    one = deciding(seen)
    one.spool = Away()  # type: ignore[assignment]
    for step in (0, 10):
        one.make_room(step)
        one.note_asked(step)
        assert one.catch_up(step)
    assert one.rules[0].missing_steps == [0]
    [event] = [event for event in seen.events if isinstance(event, ScoreDecided)]
    assert (event.mean, event.missing, event.num_missing) == (None, "no answer for 60 s", 1)
    one.arrive(0, answers(0))  # too late: it was taken as missing
    one.arrive(10, answers(10))
    one.note_asked(20)
    assert one.catch_up(20)
    assert (one.rules[0].reference_step, one.rules[0].missing_steps) == (10, [0])


def test_a_stop_request_ends_the_wait_and_takes_nothing() -> None:
    one = deciding(should_stop=lambda: True)
    one.note_asked(0)
    one.note_asked(10)
    assert not one.catch_up(10)
    assert (one.pending, one.rules[0].missing_steps) == ([0, 10], [])


def test_the_state_says_nothing_of_what_has_arrived() -> None:
    one, other = deciding(), deciding()
    other.arrive(0, answers(0))
    for each in (one, other):
        each.note_asked(0)
    assert one.state() == other.state()
    again = deciding()
    again.restore(one.state(), kept=[])
    assert again.pending == [0]
    assert again.unasked(10, is_last=False)
    assert not again.unasked(0, is_last=True)


def test_a_best_step_without_a_checkpoint_is_none_any_more() -> None:
    one = deciding()
    for step in (0, 10, 20):
        one.arrive(step, answers(step))
        one.note_asked(step)
        one.catch_up(step)
    assert one.protected_steps == {10, 20}
    kept, lost = deciding(), deciding()
    kept.restore(one.state(), kept=[10, 20])
    lost.restore(one.state(), kept=[20])
    assert (kept.rules[0].best_step, lost.rules[0].best_step) == (10, 0)
    assert lost.rules[0].reference_step == 10
