"""What differs, for both sides, in words, with what is equal folded away."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.views.differences import (
    FOLD_CHARS,
    Difference,
    Fold,
    Piece,
    compare,
    folded,
    shown_text,
    split_thought,
    split_words,
    word_diff,
)

TEXTS = st.text("ab 1.,\n\t東の\u0e01\u0e31\u093f", max_size=40)


def marked(pieces: tuple[Piece, ...]) -> list[str]:
    return [piece.text for piece in pieces if piece.kind != "same"]


@given(TEXTS, TEXTS)
def test_a_diff_makes_up_both_texts(reference: str, text: str) -> None:
    pieces = word_diff(reference, text)
    assert "".join(p.text for p in pieces if p.kind != "missing") == text
    assert "".join(p.text for p in pieces if p.kind != "extra") == reference


@given(TEXTS, TEXTS)
def test_both_sides_of_a_comparison_make_up_their_texts(reference: str, text: str) -> None:
    found = compare(reference, text)
    assert "".join(p.text for p in found.reference) == reference
    assert "".join(p.text for p in found.text) == text
    assert found.is_equal == (reference == text)
    assert (found.first is None) == (reference.split() == text.split())


@pytest.mark.timeout(60)  # each word against each would take far longer
def test_a_diff_of_endless_repetition_ends_soon() -> None:
    pieces = word_diff("fo fa " * 4000, "x " + "fo " * 6000)
    assert "".join(p.text for p in pieces if p.kind != "missing") == "x " + "fo " * 6000


@pytest.mark.parametrize(
    ("reference", "text", "missing", "extra", "words"),
    [
        ("for every 5 parts", "for every 7 parts", ["5"], ["7"], "first difference at word 3"),
        ("a b c", "a b c d", [], [" d"], "first difference at word 4"),
        ("人口は約千万人", "人口は約百万人", ["千"], ["百"], "first difference at character 5"),
        ("it costs 1,300", "it costs 2,400", ["1,300"], ["2,400"], "first difference at word 3"),
        ("x", "", ["x"], [], "first difference at word 1"),
        ("same", "same", [], [], "no difference"),
    ],
)
def test_what_differs_is_marked_where_it_stands(
    reference: str, text: str, missing: list[str], extra: list[str], words: str
) -> None:
    found = compare(reference, text)
    assert (marked(found.reference), marked(found.text), found.words) == (missing, extra, words)


def test_a_difference_in_white_space_only_says_so_and_counts_it() -> None:
    found = compare("a\nb\nc\n", "a b c")
    assert found.first is None
    assert found.words == "only white space differs: 3 fewer line breaks, 2 more spaces"
    assert compare("a b", "a b").words == "no difference"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\n" * 32, "(only white space: 32 line breaks)"),
        (" \n\t \u2003", "(only white space: 1 line break, 1 tab, 2 spaces, 1 other sign)"),
        ("", "(nothing)"),
        (" a\n", " a\n"),
    ],
)
def test_an_answer_of_white_space_alone_is_told_in_words(text: str, shown: str) -> None:
    assert shown_text(text) == shown


def test_words_of_scripts_with_marks_and_joined_signs_are_not_cut() -> None:
    assert split_words("हिन्दी में") == ["हिन्दी", " ", "में"]
    assert split_words("👩‍👩‍👧 🇩🇪") == ["👩‍👩‍👧", " ", "🇩🇪"]
    assert split_words("القاهرة، 10") == ["القاهرة", "،", " ", "10"]
    assert split_words("กั東京x") == ["กั", "東", "京", "x"]


def test_thoughts_are_left_out_of_the_comparison() -> None:
    found = compare("4", "<think>\n2 and 2\n</think>\n\n5")
    assert found.text_thought == "<think>\n2 and 2\n</think>\n\n"
    assert (marked(found.reference), marked(found.text)) == (["4"], ["5"])
    assert compare("4", "<think>so</think>4").words == "only the thoughts differ"
    assert split_thought("no <think>x</think>") == ("", "no <think>x</think>")


def long_pair() -> Difference:
    lines = [f"Step {n}: take the number {n} and add it to the total.\n" for n in range(60)]
    lines[40] = "Here is 17.\n"
    other = [*lines]
    other[40] = "Here is 18.\n"
    return compare("".join(lines), "".join(other))


def test_long_equal_stretches_are_folded_and_what_differs_is_not() -> None:
    found = long_pair()
    for side, sign in ((found.reference, "17"), (found.text, "18")):
        parts = folded(side)
        assert "".join(part.text for part in parts) == "".join(piece.text for piece in side)
        assert [part.text for part in parts if isinstance(part, Piece) and part.kind != "same"] == [
            sign
        ]
        assert [type(part) for part in parts].count(Fold) == 2
        shown = sum(len(part.text) for part in parts if isinstance(part, Piece))
        assert shown < FOLD_CHARS
    both = [
        [part.text for part in folded(side) if isinstance(part, Fold)]
        for side in (found.reference, found.text)
    ]
    assert both[0] == both[1]


def test_a_text_without_a_difference_is_not_folded() -> None:
    text = "word " * 400
    assert folded(compare(text, text).text) == [Piece("same", text)]
