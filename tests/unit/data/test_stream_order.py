"""The order of streamed rows: each once a pass, within the buffer, from any place on."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.stream_order import SlidingShuffle

SIZES = st.integers(1, 40)


@settings(max_examples=25)
@given(seed=st.integers(0, 99), size=SIZES, num_rows=st.integers(1, 150), epoch=st.integers(0, 2))
def test_a_pass_has_every_row_once_and_no_row_moves_further_than_the_buffer(
    seed: int, size: int, num_rows: int, epoch: int
) -> None:
    order = SlidingShuffle(seed, size).rows(epoch, 0, num_rows, num_rows)
    assert sorted(order.tolist()) == list(range(num_rows))
    # Row r has a key from r to r + size - 1: only rows closer than that can change places with it.
    assert max(abs(order - np.arange(num_rows))) < size


@settings(max_examples=25)
@given(seed=st.integers(0, 99), size=SIZES, cuts=st.lists(st.integers(1, 199), max_size=5))
def test_any_part_of_the_order_is_that_part_of_the_whole(
    seed: int, size: int, cuts: list[int]
) -> None:
    whole = SlidingShuffle(seed, size).rows(0, 0, 200, None)
    borders = [0, *sorted(set(cuts)), 200]
    for begin, end in itertools.pairwise(borders):
        part = SlidingShuffle(seed, size).rows(0, begin, end, None)
        assert part.tolist() == whole[begin:end].tolist()


@settings(max_examples=25)
@given(seed=st.integers(0, 99), size=SIZES, num_rows=st.integers(1, 150))
def test_what_comes_before_the_end_of_a_pass_does_not_depend_on_where_it_is(
    seed: int, size: int, num_rows: int
) -> None:
    """As long as all of it exists: training begins before anybody knows how many rows there are."""
    shuffle = SlidingShuffle(seed, size)
    known = shuffle.rows(0, 0, num_rows, num_rows)
    unknown = shuffle.rows(0, 0, num_rows, None)
    for end in range(1, num_rows + 1):
        if unknown[:end].max() < num_rows:
            assert known[:end].tolist() == unknown[:end].tolist()


@settings(max_examples=25)
@given(seed=st.integers(0, 99), size=SIZES, num_rows=st.integers(1, 150))
def test_no_row_from_a_place_on_is_older_than_said_and_what_is_said_is_not_far_behind(
    seed: int, size: int, num_rows: int
) -> None:
    shuffle = SlidingShuffle(seed, size)
    for rows in (num_rows, None):
        order = shuffle.rows(0, 0, num_rows, rows)
        for place in range(num_rows):
            oldest = shuffle.oldest(0, place, rows)
            assert oldest <= order[place:].min()
            assert oldest > place - 2 * size


@pytest.mark.parametrize("size", [100, 1000])
def test_neighbours_in_the_file_are_far_apart(size: int) -> None:
    order = SlidingShuffle(1, size).rows(0, 0, 10 * size, None)
    distance = np.abs(np.diff(order))
    assert np.median(distance) > size / 5


def test_passes_and_seeds_have_orders_of_their_own() -> None:
    first = SlidingShuffle(1, 20).rows(0, 0, 50, 50).tolist()
    assert first != SlidingShuffle(1, 20).rows(1, 0, 50, 50).tolist()
    assert first != SlidingShuffle(2, 20).rows(0, 0, 50, 50).tolist()
    assert first == SlidingShuffle(1, 20).rows(0, 0, 50, 50).tolist()
