"""Split, weights, leaks and prompts by numpy are those of a plain reading of the rules."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config.data_section import DataSection
from trainer.data import sides
from trainer.data.encoded import EncodedRows
from trainer.data.pieces import PLAIN_TEXT
from trainer.data.sources import Source
from trainer.data.spool import Spool


@dataclass(frozen=True)
class Told:
    """A row, by what the rules look at."""

    key: str
    group: str
    prompt: str
    source: int
    is_text: bool
    num_windows: int = 1


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def windows_of(told: list[Told], numbers: list[int]) -> list[int]:
    """The examples of some rows."""
    ends = list(itertools.accumulate(row.num_windows for row in told))
    return [
        example
        for number in numbers
        for example in range(ends[number] - told[number].num_windows, ends[number])
    ]


def rows_of(told: list[Told], num_held_out: int) -> EncodedRows:
    times = [row.num_windows for row in told]
    told = [row for row in told for _ in range(row.num_windows)]

    def hashes(name: str) -> Any:
        return np.asarray([int(digest(getattr(row, name))[:16], 16) for row in told], np.uint64)

    numbers = {
        "lengths": np.ones(len(told), np.int32),
        "keys": hashes("key"),
        "groups": hashes("group"),
        "row": np.repeat(np.arange(len(times), dtype=np.uint32), times),
        "asked": hashes("prompt"),
        "source": np.asarray([row.source for row in told], np.uint16),
        "flags": np.asarray([PLAIN_TEXT * row.is_text for row in told], np.uint8),
    }
    return EncodedRows(len(told) - num_held_out, numbers, Spool)  # type: ignore[arg-type]


ROWS = st.lists(
    st.builds(
        Told,
        key=st.sampled_from("abcdefghijklmnop"),
        group=st.sampled_from("ABCDEFGH"),
        prompt=st.sampled_from("uvwxyz"),
        source=st.integers(0, 1),
        is_text=st.booleans(),
        num_windows=st.just(1),
    ),
    min_size=1,
    max_size=60,
)

IN_WINDOWS = st.tuples(ROWS, st.lists(st.integers(1, 4), min_size=60, max_size=60)).map(
    lambda both: [replace(row, num_windows=n) for row, n in zip(*both, strict=False)]
)
"""The same, where texts can be several examples."""


def plain_split(told: list[Told], share: float) -> tuple[list[int], list[int]]:
    """The rules of docs/data.md, row by row."""
    wanted = round(share * len(told), 6)
    largest = max(wanted / 2, 1)
    by_group = Counter(row.group for row in told)
    units = [digest(row.group if by_group[row.group] <= largest else row.key) for row in told]
    sizes, held, count = Counter(units), set(), 0
    for unit in sorted(sizes):
        if sizes[unit] > largest:
            continue
        if count + sizes[unit] / 2 >= wanted:
            break
        held.add(unit)
        count += sizes[unit]
    validation = [number for number, unit in enumerate(units) if unit in held]
    train = [number for number, unit in enumerate(units) if unit not in held]
    return (
        (train, validation) if min(len(train), len(validation)) > 1 else ([*range(len(told))], [])
    )


@given(ROWS | IN_WINDOWS, st.sampled_from([0.05, 0.2, 0.5, 0.9]))
def test_the_split_is_that_of_its_rules(told: list[Told], share: float) -> None:
    rows = rows_of(told, 0)
    train, validation, _ = sides.split_rows(DataSection(validation_split=share), rows, 1)
    expected = tuple(windows_of(told, side) for side in plain_split(told, share))
    assert (train.tolist(), validation.tolist()) == expected
    assert sides.num_rows(rows, train) == len(plain_split(told, share)[0])


@given(ROWS, st.data())
def test_a_held_out_row_is_told_as_trained_where_its_turns_or_tokens_are(
    told: list[Told], data: st.DataObject
) -> None:
    is_held = [data.draw(st.booleans()) for _ in told]
    validation = [number for number, held in enumerate(is_held) if held]
    train = [number for number, held in enumerate(is_held) if not held]
    groups = {told[number].group for number in train}
    prompts = {told[number].prompt for number in train if not told[number].is_text}
    by_tokens = {
        told[number].group
        for number in validation
        if not told[number].is_text and told[number].prompt in prompts
    }
    found = sides.trained_too(
        rows_of(told, 0), np.asarray(validation, np.int64), np.asarray(train, np.int64)
    )
    assert found.tolist() == [told[n].group in groups | by_tokens for n in validation]


@given(ROWS | IN_WINDOWS, st.sampled_from([(1.0, 0.5), (2.5, 0.25), (0.3, 1.0)]))
def test_weights_repeat_rows_and_take_a_part_by_content(
    told: list[Told], weights: tuple[float, float]
) -> None:
    expected: list[int] = []
    for source, weight in enumerate(weights):
        own = [number for number, row in enumerate(told) if row.source == source]
        part = sorted(own, key=lambda number: (digest(told[number].key), number))
        used = own * int(weight) + sorted(part[: round(weight % 1 * len(own))])
        expected += windows_of(told, used)
    sources = [Source("a", weights[0]), Source("b", weights[1])]
    rows = rows_of(told, 0)
    if not expected:
        with pytest.raises(Exception, match="leaves no training row"):
            sides.weigh_rows(sources, rows, np.arange(len(rows)))
        return
    found, _ = sides.weigh_rows(sources, rows, np.arange(len(rows)))
    assert found.tolist() == expected


@given(ROWS | IN_WINDOWS)
def test_the_prompts_that_many_rows_share_come_first_by_rows_then_by_place(
    told: list[Told],
) -> None:
    section = DataSection(validation_split=0.05)
    largest = max(round(0.05 * len(told), 6) / 2, 1)
    common = Counter(row.group for row in told).most_common()
    sizes, first = sides.shared_prompts(section, rows_of(told, 0))
    expected = [(group, size) for group, size in common if size > largest]
    assert sizes.tolist() == [size for _, size in expected]
    where = [next(n for n, row in enumerate(told) if row.group == group) for group, _ in expected]
    assert first.tolist() == [windows_of(told, [number])[0] for number in where]
