"""The one sentence says what paired figures allow, and nothing where there are too few."""

from __future__ import annotations

import pytest

from trainer.preview.base import PreviewResult
from trainer.views.headline import headline_of, title_words, validation_words
from trainer.views.metrics import EvaluationPoint
from trainer.views.timeline import PreviewBook


def book_of(
    right: dict[int, int], num_prompts: int, probability: dict[int, float] | None = None
) -> PreviewBook:
    """So many of the first prompts are right at each step."""
    book = PreviewBook()
    for step, num_right in right.items():
        for number in range(num_prompts):
            chance = (probability or {}).get(step)
            book.add(
                PreviewResult(
                    step=step,
                    prompt=f"prompt {number}",
                    prompt_id=f"validation-{number}",
                    text="",
                    golden_answer="4",
                    matches=number < num_right,
                    golden_probability=chance and chance * (1 + number / 100),
                )
            )
    return book


def losses(*values: float) -> list[EvaluationPoint]:
    return [EvaluationPoint(100 * n, value, 0.3) for n, value in enumerate(values, start=1)]


def test_a_run_that_learned_says_how_many_from_how_many_and_what_is_wrong() -> None:
    book = book_of({0: 0, 50: 100, 100: 96}, 100)
    found = headline_of(book, losses(0.9, 0.467))
    assert found.main == "96 of 100 right, from 0 before training, 100 at step 50"
    assert found.rest == "4 lost, 0 never right. Validation loss 0.467, lowest now."
    assert found.short == "96/100"
    assert found.band == "90.2 to 98.4 % at 95 %"
    assert found.sentence == f"{found.main}. {found.rest}"


def test_a_run_with_nothing_right_is_judged_by_the_probability_of_golden_tokens() -> None:
    steps = {0: 0.004, 10: 0.05, 20: 0.12, 30: 0.16}
    found = headline_of(book_of(dict.fromkeys(steps, 0), 6, steps), [])
    assert found.main == (
        "0 of 6 right; golden token probability 16.4 %, from 0.4 % before training, still rising"
    )
    assert found.rest == "0 lost, 6 never right."
    assert found.short == "0/6, golden 16.4 %"


def test_a_rise_after_a_fall_is_not_still_rising_until_it_is_above_all_before() -> None:
    steps = {0: 0.02, 10: 0.21, 20: 0.093, 30: 0.205}
    back = book_of(dict.fromkeys(steps, 0), 16, steps)
    assert headline_of(back, []).main.endswith("from 2.2 % before training")
    above = {**steps, 30: 0.4}
    assert headline_of(book_of(dict.fromkeys(above, 0), 16, above), []).main.endswith(
        "from 2.2 % before training, still rising"
    )
    right = {0: 0, 10: 12, 20: 2, 30: 12}
    assert headline_of(book_of(right, 16), []).main == "12 of 16 right, from 0 before training"
    lower = {0: 0.02, 10: 0.21, 20: 0.3, 30: 0.1}
    assert ", falling now" in headline_of(book_of(dict.fromkeys(lower, 0), 16, lower), []).main


def test_what_was_higher_at_an_earlier_step_is_not_still_rising() -> None:
    steps = {0: 0, 10: 20, 20: 40, 30: 60, 40: 80, 50: 100, 60: 96}
    assert headline_of(book_of(steps, 100), []).main == (
        "96 of 100 right, from 0 before training, 100 at step 50"
    )
    steps = {0: 0.1, 10: 0.2, 20: 0.3, 30: 0.4, 40: 0.5, 50: 0.6, 60: 0.59}
    none_right = book_of(dict.fromkeys(steps, 0), 16, steps)
    assert headline_of(none_right, []).main.endswith("before training")


def test_a_rise_of_many_small_gains_and_a_few_large_losses_is_none() -> None:
    book = PreviewBook()
    for step in (0, 10):
        for number in range(16):
            change = (0.01 if number < 13 else -0.2) * (1 + number / 10)
            chance = 0.4 + change * (step == 10)
            book.add(
                PreviewResult(
                    step=step,
                    prompt=f"prompt {number}",
                    text="",
                    golden_answer="4",
                    golden_probability=chance,
                )
            )
    assert "rising" not in headline_of(book, []).main


def test_few_prompts_and_small_changes_are_said_to_be_so() -> None:
    assert headline_of(book_of({0: 1, 10: 3}, 4), []).main == (
        "3 of 4 right, from 1 before training (too few prompts to be sure)"
    )
    assert "(no clear difference)" in headline_of(book_of({0: 30, 10: 32}, 50), []).main
    clear = headline_of(book_of({0: 0, 10: 7}, 8), []).main
    assert clear == "7 of 8 right, from 0 before training, still rising"
    assert headline_of(book_of({0: 3, 10: 3}, 4), []).main == "3 of 4 right, from 3 before training"
    assert headline_of(book_of({0: 40, 10: 2}, 50), []).main.startswith(
        "2 of 50 right, from 40 before training, falling now"
    )


def test_only_prompts_of_both_steps_are_compared() -> None:
    book = book_of({10: 2}, 4)
    for one in list(book_of({30: 3}, 5).newest()):
        book.add(one)
    assert headline_of(book, []).main.startswith("3 of 5 right, from 2 at step 10 (of 4)")


def test_without_golden_answers_the_validation_loss_speaks_and_without_it_nothing_is_claimed() -> (
    None
):
    book = PreviewBook()
    assert headline_of(book, []).sentence == "No answers yet."
    book.add(PreviewResult(step=0, prompt="Who are you?", text="I"))
    found = headline_of(book, losses(0.9, 0.467))
    assert found.sentence == "Validation loss 0.467, from 0.900 at step 100, lowest now."
    assert headline_of(book, []).main == "1 prompt without golden answers: read what the model says"
    free = PreviewResult(
        step=9, prompt="Who?", text="I", golden_answer="me", golden_probability=0.166
    )
    book.add(free)
    assert headline_of(book, []).main == "Golden token probability 16.6 %"
    assert headline_of(book, []).short == "golden 16.6 %"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((), ""),
        ((0.5,), "validation loss 0.500 at step 100"),
        ((0.5, 0.4), "validation loss 0.400, lowest now"),
        ((0.4, 0.404), "validation loss 0.404, lowest 0.400 at step 100"),
        ((0.4, 0.5), "validation loss 0.500, was lower: 0.400 at step 100"),
    ],
)
def test_the_validation_loss_is_measured_by_its_lowest(
    values: tuple[float, ...], words: str
) -> None:
    points = [(one.step, one.val_loss) for one in losses(*values)]
    assert validation_words(points) == words


def test_the_title_of_a_tab_is_short() -> None:
    found = headline_of(book_of({0: 0, 10: 12}, 16), [])
    assert title_words(found, "gsm", step=62, total=100, ending="") == "62 % - 12/16 - gsm"
    assert title_words(found, "gsm", step=9, total=None, ending="failed") == "failed - 12/16 - gsm"
    nothing = headline_of(PreviewBook(), [])
    assert title_words(nothing, "gsm", step=0, total=None, ending="") == "gsm"
