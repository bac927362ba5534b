"""Foreign text cannot drive a terminal; figures read well."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.monitoring.events import printable
from trainer.preview.base import PreviewResult, PreviewSample
from trainer.views.words import duration_words, final_model_words, left_words, remarks_of


@given(st.text(), st.integers(min_value=1, max_value=60))
def test_printable_text_is_one_short_line_without_controls(text, limit):
    shown = printable(text, limit)
    assert len(shown) <= limit
    assert len(shown.splitlines()) <= 1
    assert all(unicodedata.category(char) not in ("Cc", "Cs", "Zl", "Zp") for char in shown)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x1b[31mred\x9b0m\x7f", r"\x1b[31mred\x9b0m\x7f"),
        ("\N{RIGHT-TO-LEFT OVERRIDE}abc\N{ZERO WIDTH SPACE}", r"\u202eabc\u200b"),
        ("\ud800", r"\ud800"),
        ("[bold]x[/bold] \\", "[bold]x[/bold] \\"),
        (
            "\N{GRINNING FACE}\N{ZERO WIDTH JOINER}\u00e9 \u4f60",
            "\N{GRINNING FACE}\u200d\u00e9 \u4f60",
        ),
    ],
)
def test_what_is_shown_as_an_escape_and_what_is_not(text, shown):
    assert printable(text, 100) == shown


def test_a_long_text_loses_its_middle_and_keeps_both_ends():
    shown = printable("begin " + "y" * 10**6 + " #### 72", 40)
    assert shown.startswith("begin yyy")
    assert shown.endswith("yyy #### 72")
    assert " ... " in shown
    assert len(shown) == 40


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.97, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (185, "3 min"),
        (3599, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (90000, "1 d 1 h"),
        (float("nan"), "?"),
        (float("inf"), "?"),
        (-1, "?"),
    ],
)
def test_durations_in_words(seconds, words):
    assert duration_words(seconds) == words


def test_what_is_left_is_a_round_guess():
    assert left_words(180.4) == "3 min left"
    assert left_words(12.3) == "12 s left"


def test_a_prompt_that_is_trained_on_is_never_shown_as_held_out():
    result = PreviewResult(step=1, prompt="p", text="t", held_out=False, health=("never_stopped",))
    assert remarks_of(result) == "(trained on, never stopped)"


def test_samples_are_counted_where_they_can_be_compared():
    def said(*matches):
        samples = tuple(PreviewSample(text="4", matches=one) for one in matches[1:])
        return PreviewResult(step=1, prompt="?", text="4", matches=matches[0], samples=samples)

    assert remarks_of(said(True)) == ""
    assert remarks_of(said(False, True, True, None)) == "(2 of 3 samples match)"
    assert remarks_of(said(None, None)) == "(2 samples)"


def test_the_last_line_says_whose_weights_the_final_model_has():
    rule = {"metric": "score.exact", "missing_steps": [40]}
    summary = {
        "final_model_step": 20,
        "best": {"by": "score.exact", "step": 20, "value": 0.5},
        "deciding": {"waited_s": 2.0, "rules": [rule]},
    }
    assert final_model_words(summary, 80) == [
        "final model of step 20 (best by score.exact)",
        "waited 2.0 s for scores",
        "1 evaluation that decides missing",
    ]
    assert final_model_words({"final_model_step": 80, "best": None}, 80) == []
