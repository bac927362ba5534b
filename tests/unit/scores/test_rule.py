"""The rule by which scores choose the best step: only a clear rise counts, in order of steps."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.preview.base import PreviewResult
from trainer.scores.rule import ScoreRule, figure_name, values_by_prompt
from trainer.scores.statistics import MIN_PROMPTS, difference_of


def answers(share: float, count: int = 40) -> dict[str, float]:
    """The first prompts right, as many as `share` says."""
    return {f"p{n}": float(n < share * count) for n in range(count)}


def rule_after(*shares: float | None, patience: int = 0) -> ScoreRule:
    """Evaluations of steps 0, 10, 20 ...; None is a missing one."""
    rule = ScoreRule("score.exact", patience)
    for number, share in enumerate(shares):
        if share is None:
            rule.take(10 * number, {}, "nobody answered")
        else:
            rule.take(10 * number, answers(share))
    return rule


def test_only_a_clear_rise_makes_a_step_the_best() -> None:
    rule = rule_after(0.1, 0.15, 0.5, 0.52, 0.55)
    assert (rule.best_step, rule.reference_step, rule.num_without) == (20, 20, 2)


def test_small_rises_add_up_to_a_clear_one() -> None:
    rule = rule_after(0.1, 0.15, 0.2, 0.25, 0.3)
    assert (rule.best_step, rule.num_without) == (30, 1)


def test_it_is_over_after_patience_evaluations_without_a_clear_rise() -> None:
    assert not rule_after(0.1, 0.5, 0.5, patience=2).is_over
    assert rule_after(0.1, 0.5, 0.5, 0.3, patience=2).is_over
    assert not rule_after(0.1, 0.5, 0.5, 0.9, patience=2).is_over
    assert not rule_after(0.1, 0.5, 0.5, 0.3).is_over


def test_what_never_rises_above_step_0_has_no_best_step() -> None:
    rule = rule_after(0.5, 0.4, 0.5, patience=2)
    assert (rule.best_step, rule.reference_step, rule.is_over) == (0, 0, True)


def test_a_missing_evaluation_changes_nothing_but_its_own_count() -> None:
    plain, gap = rule_after(0.1, 0.5, 0.5, patience=2), rule_after(0.1, 0.5, None, 0.5, patience=2)
    assert gap.missing_steps == [20]
    same = ("reference", "best_step", "num_without", "num_taken", "is_over")
    assert [getattr(gap, name) for name in same] == [getattr(plain, name) for name in same]


def test_a_first_evaluation_after_step_0_is_the_best_where_that_of_step_0_is_missing() -> None:
    assert rule_after(None, 0.2).best_step == 10


def test_a_resume_goes_on_with_the_same_rule() -> None:
    before = rule_after(0.1, 0.5, None, 0.5, patience=2)
    again = ScoreRule("score.exact", 3)
    again.restore(before.state())
    assert (again.state(), again.patience) == (before.state(), 3)
    for rule in (before, again):
        rule.take(40, answers(0.9))
    assert again.state() == before.state()


SEQUENCES = st.lists(st.lists(st.integers(0, 1), min_size=20, max_size=20), min_size=1, max_size=8)


@given(SEQUENCES)
def test_each_best_step_is_clearly_above_the_one_before(drawn: list[list[int]]) -> None:
    rule, best = ScoreRule("score.exact", 2), None
    for step, values in enumerate(drawn):
        verdict = rule.take(step, {str(n): float(v) for n, v in enumerate(values)})
        interval, is_clear = (None, None) if best is None else difference_of(values, best)
        is_above = best is None or bool(is_clear and interval and interval[0] > 0)
        assert verdict.is_best is is_above
        best = values if is_above else best
        assert rule.best_step == (step if is_above else rule.best_step)


@given(SEQUENCES, st.data())
def test_missing_evaluations_in_between_never_change_what_is_the_best(
    drawn: list[list[int]], data: st.DataObject
) -> None:
    plain, gaps = ScoreRule("score.exact", 2), ScoreRule("score.exact", 2)
    for number, values in enumerate(drawn):
        by_prompt = {str(n): float(v) for n, v in enumerate(values)}
        if data.draw(st.booleans()):
            gaps.take(10 * number - 5, {}, "nobody answered")
        plain.take(10 * number, by_prompt)
        gaps.take(10 * number, by_prompt)
        assert (gaps.best_step, gaps.num_without) == (plain.best_step, plain.num_without)


def test_noise_around_one_share_seldom_counts_as_a_rise() -> None:
    """Ten evaluations of a model that does not change: at most so many false rises."""
    noise, rises = random.Random(0), 0
    for _ in range(200):
        rule = ScoreRule("score.exact")
        for step in range(11):
            rule.take(step, {str(n): float(noise.random() < 0.5) for n in range(100)})
        rises += rule.best_step > 0
    assert rises < 40  # 2.5 % of the comparisons and less, as the reference rises each time


def result(number: int, value: float | None, **more: object) -> PreviewResult:
    return PreviewResult.model_validate(
        {
            **{"step": 3, "prompt": f"p{number}", "text": "", "golden_answer": None},
            **{"finish_reason": "stop", "backend_type": "local", "prompt_id": f"v-{number}"},
            **{"scores": {"exact": value}, "golden_probability": 0.5, **more},
        }
    )


def test_values_are_by_prompt_and_a_silent_prompt_makes_the_evaluation_missing() -> None:
    rows = [result(n, float(n % 2)) for n in range(MIN_PROMPTS)]
    values, missing = values_by_prompt(rows, "score.exact")
    assert (missing, values["v-1"], len(values)) == (None, 1.0, MIN_PROMPTS)
    assert values_by_prompt(rows, "score.golden_probability")[0]["v-0"] == 0.5
    silent = [*rows, result(99, None, error_message="the server is away")]
    assert values_by_prompt(silent, "score.exact") == (
        {},
        f"1 of {MIN_PROMPTS + 1} prompts without an answer: the server is away",
    )


def test_too_few_values_decide_nothing() -> None:
    rows = [result(n, 1.0 if n else None) for n in range(MIN_PROMPTS)]
    values, missing = values_by_prompt(rows, "score.exact")
    assert values == {}
    assert missing is not None
    assert missing.startswith(f"{MIN_PROMPTS - 1} of {MIN_PROMPTS} prompts with a value")


@pytest.mark.parametrize(
    ("metric", "name"),
    [("score.exact", "score.exact"), ("score.golden_probability", "golden_probability")],
)
def test_a_metric_names_a_figure(metric: str, name: str) -> None:
    assert figure_name(metric) == name
