"""Golden and generated are cut where they differ."""

from __future__ import annotations

import pytest
from rich.cells import cell_len

from trainer.views.cuts import cut_pair

SAME = "the same words again and again, " * 40


def plain(side: tuple) -> str:
    return "".join(piece.text for piece in side)


@pytest.mark.parametrize("room", [24, 67, 240])
@pytest.mark.parametrize("before", ["", SAME, "\u4f60\u597d" * 300])
@pytest.mark.parametrize("after", ["", f" {SAME}"])
def test_the_first_difference_is_in_the_room_there_is(room, before, after):
    golden, text = cut_pair(f"{before}17{after}", f"{before}18{after}", room, cell_len)
    assert [piece.text for piece in golden if piece.kind == "missing"] == ["17"]
    assert [piece.text for piece in text if piece.kind == "extra"] == ["18"]
    assert plain(golden).replace("17", "18") == plain(text)
    assert cell_len(plain(text)) <= room


def test_a_text_that_ends_early_differs_where_it_ends():
    golden, text = cut_pair(f"{SAME}and the end", SAME, 60)
    assert [piece.text for piece in golden if piece.kind == "missing"] == ["and the end"]
    assert plain(text).startswith("... ")
    assert plain(text) in plain(golden)


def test_what_fits_is_whole_and_control_characters_are_escaped():
    golden, text = cut_pair("a\nb", "a\x1b[31mb", 40)
    assert (plain(golden), plain(text)) == ("a\\nb", "a\\x1b[31mb")


def test_equal_texts_show_their_beginning_and_their_end():
    golden, text = cut_pair(f"{SAME}#### 72", f"{SAME}#### 72", 60)
    assert plain(golden) == plain(text)
    assert plain(text).endswith("#### 72")


def test_thoughts_are_left_out_and_named():
    golden, text = cut_pair("7", f"<think>{SAME}</think>8", 60)
    assert (plain(golden), plain(text)) == ("7", "(thought) 8")


def test_very_long_texts_are_compared_near_their_first_difference():
    golden, text = cut_pair("x " * 200_000 + "17", "x " * 200_000 + "18", 60)
    assert plain(golden).endswith("17")
    assert plain(text).endswith("18")
