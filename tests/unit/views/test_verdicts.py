"""What became of each prompt, how many are what, and which to look at first."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.preview.base import PreviewResult
from trainer.views.verdicts import (
    Verdict,
    common_start,
    counts_of,
    in_order,
    level_of,
    verdict_of,
)


def verdict(*matches: bool | None, golden: str | None = "4", **more: object) -> Verdict:
    """Of answers at steps 0, 10, 20 ..."""
    return verdict_of(
        PreviewResult.model_validate(
            {"step": 10 * n, "prompt": "2+2?", "text": "", "golden_answer": golden, "matches": one}
            | {name: values[n] for name, values in more.items()}  # type: ignore[index]
        )
        for n, one in enumerate(matches)
    )


@pytest.mark.parametrize(
    ("matches", "state", "since", "short"),
    [
        ((False, True, False), "lost", 20, "lost at 20"),
        ((False, True, True), "right", 10, "since 10"),
        ((True,), "right", 0, "since 0"),
        ((False, False), "never right", 0, "never right"),
        ((True, False, False, None), "lost", 10, "lost at 10"),
        ((None, None), "no answer", None, "no answer"),
    ],
)
def test_a_prompt_is_what_its_newest_comparison_says(
    matches: tuple[bool | None, ...], state: str, since: int | None, short: str
) -> None:
    found = verdict(*matches)
    assert (found.state, found.since, found.short) == (state, since, short)
    assert found.is_wrong == (state in ("lost", "never right"))


def test_a_prompt_without_golden_is_neither_right_nor_wrong() -> None:
    found = verdict(None, None, golden=None)
    assert (found.state, found.is_wrong) == ("no golden", False)


def test_a_graded_value_goes_from_the_first_to_the_newest_measured_step() -> None:
    found = verdict(False, False, False, golden_probability=[0.004, 0.166, None])
    assert found.change == "0.4 -> 16.6 %"
    assert verdict(False).change == ""
    assert [level_of(one) for one in (None, 0.0, 0.004, 0.166, 1.0)] == [None, 0, 0, 4, 9]


def test_lost_ones_stand_first_the_newest_loss_at_the_top_then_never_right_then_right() -> None:
    prompts = [
        verdict(True, True),  # 0
        verdict(False, False, golden_probability=[0.0, 0.1]),  # 1
        verdict(True, False),  # 2: lost at 10
        verdict(None, golden=None),  # 3
        verdict(False, False, golden_probability=[0.0, 0.4]),  # 4: nearly
        verdict(True, True, False),  # 5: lost at 20
        verdict(None),  # 6
    ]
    assert in_order(prompts) == [5, 2, 4, 1, 6, 0, 3]


@given(st.lists(st.lists(st.sampled_from([True, False, None]), min_size=1, max_size=5)))
def test_every_prompt_is_counted_once_and_ordered_once(rows: list[list[bool | None]]) -> None:
    prompts = [verdict(*row) for row in rows]
    counts = counts_of(prompts)
    assert counts.all == len(prompts)
    assert counts.wrong_now == counts.lost + counts.never_right == sum(p.is_wrong for p in prompts)
    assert sorted(in_order(prompts)) == list(range(len(prompts)))


def test_what_all_names_begin_with_is_left_out_up_to_a_whole_word() -> None:
    names = [f"You are a careful translator. Translate {word}." for word in ("cat", "cow", "dog")]
    assert names[0][common_start(names) :] == "cat."
    assert common_start(["Who are you?", "Who am I?"]) == 0
    assert common_start(names[:1]) == 0
    assert common_start([names[0], names[0]]) < len(names[0])
