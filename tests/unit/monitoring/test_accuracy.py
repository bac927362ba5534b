"""The trend word: the same prompts over preview steps, and silence where nothing can be told."""

from __future__ import annotations

import itertools

import pytest

from trainer.monitoring.status_schema import MatchHistory
from trainer.monitoring.status_writer import TrainingStatusWriter
from trainer.scores.statistics import sign_test


def history_of(previews, *steps: list[bool]) -> MatchHistory:
    history = MatchHistory()
    for step, matches in enumerate(steps):
        history.add(previews(step, matches).results)
    return history


def first(count: int, of: int = 100) -> list[bool]:
    return [index < count for index in range(of)]


def test_other_prompts_of_the_same_step_are_no_past(previews):
    # The wrong ones are the last of each step: the last 20 comparisons are prompts 80 to 99, the
    # 20 before them prompts 60 to 79 of the same step, and all of those are right.
    assert history_of(previews, first(0), first(80)).trend() == "rising"
    assert history_of(previews, first(0), first(80), first(85)).trend() is None  # 5 of 5: p = 1/16
    assert history_of(previews, first(0), first(80), first(86)).trend() == "rising"


def test_prompts_that_are_lost_again_are_falling(previews):
    assert history_of(previews, first(90), first(90), first(70)).trend() == "falling"


@pytest.mark.parametrize(
    "steps",
    [
        [first(50)],
        [first(50), first(50)],
        [first(50), first(50), first(54)],  # four gained: chance does that
        [first(0, of=5), first(5, of=5)],  # five of five prompts are too few
        [first(50), list(reversed(first(50)))],  # as many lost as gained
    ],
)
def test_nothing_is_said_where_a_sign_test_cannot_tell(previews, steps):
    assert history_of(previews, *steps).trend() is None


def test_each_prompt_is_compared_with_itself(previews):
    """One prompt more a step must not look like progress of the others."""
    history = MatchHistory()
    history.add(previews(0, [True] * 10).results)
    history.add(previews(1, [True] * 10 + [False] * 30).results)
    assert history.trend() is None


def test_the_newest_third_is_compared_with_the_third_before(previews):
    steps = [first(0, 12)] * 3 + [first(6, 12)] * 3 + [first(12, 12)] * 3
    assert history_of(previews, *steps).trend() == "rising"
    # What was learned long ago is not news.
    assert history_of(previews, first(0, 12), *[first(12, 12)] * 8).trend() is None


def test_prompts_without_golden_do_not_count(previews):
    history = MatchHistory()
    for step in range(3):
        history.add(previews(step, [None] * 10, golden_answer=None).results)
    assert history.counts(20) is None
    assert history.trend() is None


def test_status_has_the_trend(previews):
    writer = TrainingStatusWriter(None)
    for step, count in enumerate((0, 80, 90)):
        writer.on_event(previews(step, first(count)))
    assert writer.status.accuracy_trend == "rising"


def test_the_sign_test_is_the_share_of_splits_at_least_as_uneven():
    for gained, lost in [(0, 0), (6, 0), (7, 2), (2, 7), (5, 5)]:
        count = gained + lost
        uneven = abs(gained - lost)
        splits = [abs(2 * sum(signs) - count) for signs in itertools.product((0, 1), repeat=count)]
        by_hand = sum(one >= uneven for one in splits) / len(splits)
        assert sign_test(gained, lost) == pytest.approx(by_hand, abs=1e-12)
