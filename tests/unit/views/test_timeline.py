"""What became of a prompt, and the diffs that show it."""

from __future__ import annotations

import math

import pytest

from trainer.preview.base import PreviewResult
from trainer.views.timeline import (
    Timeline,
    facts_of,
    golden_tokens,
    golden_words,
)


def result_of(step: int, **changes: object) -> PreviewResult:
    values = {"prompt": "2+2?", "text": "4", "golden_answer": "4", "prompt_id": "validation-0"}
    return PreviewResult.model_validate({"step": step, **values, **changes})


def timeline_of(matches: dict[int, bool | None]) -> Timeline:
    timeline = Timeline("validation-0")
    for step, value in matches.items():
        timeline.add(result_of(step, matches=value))
    return timeline


@pytest.mark.parametrize(
    ("matches", "words"),
    [
        ({0: False, 400: True, 900: False}, "first right at step 400, lost at 900"),
        ({0: False, 40: True, 60: True}, "first right at step 40, right since"),
        ({0: True}, "first right at step 0, right since"),
        ({0: False, 20: False}, "not right yet, after 2 previews"),
        (
            {0: True, 20: False, 40: True},
            "first right at step 0, lost at 20, right again since 40",
        ),
        (
            {0: True, 20: False, 40: True, 60: False, 80: False},
            "first right at step 0, lost 2 times, wrong since 60",
        ),
        (
            {0: True, 20: False, 40: True, 60: False, 80: True},
            "first right at step 0, lost 2 times, right again since 80",
        ),
        ({0: None, 20: None}, "no answer yet"),
    ],
)
def test_the_verdict(matches: dict[int, bool | None], words: str) -> None:
    assert timeline_of(matches).judged.words == words


def test_a_prompt_without_golden_has_nothing_to_compare_with() -> None:
    timeline = Timeline("user-0")
    timeline.add(result_of(0, golden_answer=None))
    assert timeline.judged.words == "no golden answer to compare with"


def test_answers_are_in_the_order_of_steps_and_the_newest_of_a_step_counts() -> None:
    timeline = Timeline("validation-0")
    for step, text in [(20, "b"), (0, "a"), (20, "c")]:
        timeline.add(result_of(step, text=text))
    assert [one.text for one in timeline.results()] == ["a", "c"]


def test_golden_tokens_have_their_probability_and_a_word_for_it() -> None:
    result = result_of(
        0, golden_tokens=("4", "2"), golden_logprobs=(math.log(0.95), math.log(0.2)), matches=False
    )
    tokens = golden_tokens(result)
    assert [token.level for token in tokens] == ["sure", "doubtful"]
    assert tokens[1].probability == pytest.approx(0.2)
    assert golden_words(result) == "does not know the golden answer yet (golden tokens 57.5 %)"
    assert golden_tokens(result_of(0)) == []
    assert golden_words(result_of(0)) is None


def test_a_model_that_knows_but_says_otherwise() -> None:
    result = result_of(0, golden_tokens=("4",), golden_logprobs=(-0.2,), matches=False)
    assert golden_words(result) == (
        "knows the golden answer (golden tokens 81.9 %), generation goes elsewhere"
    )


def test_facts_name_flags_backend_proof_and_delay() -> None:
    facts = facts_of(
        result_of(
            40,
            health=("never_stopped",),
            held_out=False,
            backend_type="sidecar",
            weights="verified",
            received_step=43,
            visible_s=1.25,
        )
    )
    assert facts[:2] == ["also trained on", "never stopped"]
    assert facts[-3:] == [
        "by sidecar, weights verified",
        "3 steps behind training",
        "seen after 1.2 s",
    ]
