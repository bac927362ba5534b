"""pass@k is what drawing k of the samples gives, and its interval is one over prompts."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest

from trainer.preview.base import PreviewResult, PreviewSample
from trainer.scores.figures import ScoreHistory
from trainer.scores.statistics import interval_of, pass_at


@pytest.mark.parametrize("count", [1, 4, 7])
def test_pass_at_k_is_the_share_of_draws_with_a_right_answer(count: int) -> None:
    for right in range(count + 1):
        answers = [True] * right + [False] * (count - right)
        for k in range(1, count + 1):
            draws = [any(one) for one in combinations(answers, k)]
            assert pass_at(right, count, k) == pytest.approx(sum(draws) / len(draws))


def answered(step: int, prompt: int, values: list[float | None], **more: Any) -> PreviewResult:
    """A prompt whose samples have these values of the score `s`, and match where it is 1."""
    first, *others = values

    def of(value: float | None) -> dict[str, Any]:
        return {"text": "!", "scores": {"s": value}, "matches": value == 1}

    return PreviewResult(
        step=step,
        prompt="?",
        prompt_id=f"p{prompt}",
        samples=tuple(PreviewSample(**of(value)) for value in others),
        **{**of(first), **more},
    )


def figures(results: list[PreviewResult], step: int = 0, **options: Any) -> dict[str, Any]:
    history = ScoreHistory(**options)
    history.add(results)
    return {one.name: one for one in history.figures(step)}


def test_the_mean_and_the_interval_are_over_prompts_not_over_samples() -> None:
    rights = [0, 1, 2, 4, 4, 0, 3, 0, 1, 0, 2, 0]
    results = [
        answered(0, n, [1.0] * right + [0.0] * (4 - right)) for n, right in enumerate(rights)
    ]
    found = figures(results)
    passes = [f"{name}.pass@{k}" for name in ("match", "score.s") for k in (1, 2, 4)]
    assert list(found) == ["score.s", *passes]
    for k in (1, 2, 4):
        values = [pass_at(right, 4, k) for right in rights]
        for name in ("match", "score.s"):
            one = found[f"{name}.pass@{k}"]
            assert (one.mean, one.num_prompts) == (pytest.approx(sum(values) / 12), 12)
            assert (one.low, one.high) == interval_of(values)
    assert found["score.s"].mean == sum(right > 0 for right in rights) / 12  # of sample 0 alone


def test_one_answer_a_prompt_has_no_pass_at_k() -> None:
    assert list(figures([answered(0, 1, [1.0])])) == ["score.s"]


def test_a_prompt_that_lacks_a_sample_is_left_out() -> None:
    whole, short = answered(0, 1, [1.0, 0.0]), answered(0, 2, [1.0, None])
    assert figures([whole, short])["score.s.pass@1"].num_prompts == 1
    lost = whole.samples[0].model_copy(update={"matches": None, "error_message": "no luck"})
    other = whole.model_copy(update={"prompt_id": "p3", "samples": (lost,)})
    assert figures([whole, other])["match.pass@2"].num_prompts == 1


def test_a_share_is_no_verdict_also_at_steps_where_all_are_0_or_1() -> None:
    first, second = answered(0, 1, [1.0, 0.0]), answered(1, 1, [0.5, 0.0])
    assert "score.s.pass@2" in figures([first])
    for step in (0, 1):
        found = figures([first, second], step)
        assert [name for name in found if "pass" in name] == ["match.pass@1", "match.pass@2"]
    assert "score.s.pass@2" not in figures([first], graded={"s"})


def test_steps_are_compared_prompt_by_prompt() -> None:
    results = [answered(0, n, [0.0, 0.0]) for n in range(12)]
    results += [answered(5, n, [1.0, float(n % 2)]) for n in range(12)]
    one = figures(results, 5)["score.s.pass@1"]
    assert (one.mean, one.first.mean, one.first.difference) == (0.75, 0.0, 0.75)
    assert one.first.is_clear
