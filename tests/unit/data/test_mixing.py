"""An epoch of several sources has the share of each, whatever seed, process and start."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config.data_section import DataSection
from trainer.data.batches import BLANK, EncodedDataset, PackedDataset
from trainer.data.mixed_order import MixedOrder
from trainer.data.mixing import check_mix, rows_per_epoch, short_names
from trainer.data.rows import Example
from trainer.errors import ConfigError, DataError

SIZES = (40, 100, 260)
SOURCES = np.repeat(np.arange(3), SIZES)
LENGTHS = [(7 * n) % 101 + 5 for n in range(sum(SIZES))]
SHARES = (0.5, 0.3, 0.2)


def order(ends_with: str = "first", **changes: Any) -> MixedOrder:
    options = {"group_size": 8, "seed": 3, **changes}
    return MixedOrder(LENGTHS, SOURCES, SHARES, ends_with=ends_with, **options)


def rows_of(mixed: MixedOrder, epoch: int) -> list[int]:
    mixed.set_epoch(epoch)
    return list(mixed)


@given(
    st.lists(st.tuples(st.integers(1, 10**6), st.floats(0.05, 1)), min_size=2, max_size=6),
    st.sampled_from(["first", "longest"]),
)
def test_every_source_has_its_share_and_one_of_them_ends_the_epoch(
    sources: list[tuple[int, float]], ends_with: str
) -> None:
    sizes, shares = zip(*sources, strict=True)
    counts = rows_per_epoch(sizes, shares, ends_with=ends_with)
    total = sum(counts)
    for count, share in zip(counts, shares, strict=True):
        assert abs(count - total * share / sum(shares)) <= len(counts) / 2 + 0.5
    pairs = list(zip(counts, sizes, strict=True))
    assert any(count == size for count, size in pairs)
    is_right = int.__le__ if ends_with == "first" else int.__ge__
    assert all(is_right(count, size) for count, size in pairs)


@pytest.mark.parametrize("strategy", ["first_exhausted", "all_exhausted"])
def test_an_epoch_ends_where_interleave_datasets_ends_in_the_mean(strategy: str) -> None:
    import datasets

    parts = [datasets.Dataset.from_dict({"source": [n] * size}) for n, size in enumerate(SIZES)]
    lengths = [
        len(datasets.interleave_datasets(parts, list(SHARES), seed=s, stopping_strategy=strategy))  # type: ignore[arg-type]
        for s in range(30)
    ]
    ours = order("first" if strategy == "first_exhausted" else "longest")
    assert len(ours) == pytest.approx(np.mean(lengths), rel=0.1)


@pytest.mark.parametrize("ends_with", ["first", "longest"])
@pytest.mark.parametrize("options", [{}, {"group_by_length": False}, {"shuffle": False}], ids=str)
def test_each_epoch_has_as_many_rows_of_each_source_and_a_new_order(
    ends_with: str, options: dict[str, Any]
) -> None:
    mixed = order(ends_with, **options)
    epochs = [rows_of(mixed, epoch) for epoch in range(4)]
    for rows in epochs:
        assert Counter(SOURCES[rows].tolist()) == dict(enumerate(mixed.counts))
        assert mixed.steps_per_epoch == -(-len(rows) // 8)
    assert all(one != other for one, other in pairwise(epochs))
    assert epochs == [rows_of(order(ends_with, **options), epoch) for epoch in range(4)]
    assert rows_of(order(ends_with, seed=4, **options), 0) != epochs[0]


def test_with_first_the_next_epoch_goes_on_where_the_last_one_stopped() -> None:
    mixed = order("first")
    seen = Counter(row for epoch in range(40) for row in rows_of(mixed, epoch))
    for number in range(3):
        times = [seen[row] for row in np.flatnonzero(number == SOURCES).tolist()]
        assert max(times) - min(times) <= 1, "no row is trained twice more than another"


def test_with_longest_every_epoch_has_every_row_and_the_passes_differ() -> None:
    mixed = order("longest", group_by_length=False)
    rows = rows_of(mixed, 0)
    assert set(rows) == set(range(len(LENGTHS)))
    of_first = [row for row in rows if SOURCES[row] == 0]
    passes = [of_first[start : start + 40] for start in range(0, len(of_first) - 39, 40)]
    assert len(passes) > 3
    for one, other in pairwise(passes):
        assert sorted(one) == sorted(other)
        assert one != other


def test_without_shuffling_each_source_is_read_in_its_order() -> None:
    rows = order("longest", shuffle=False)
    of_second = [row for row in rows if SOURCES[row] == 1]
    assert of_second == [40 + n % 100 for n in range(len(of_second))]


def test_groups_of_like_length_are_made_within_the_mix() -> None:
    plain, grouped = (
        [LENGTHS[row] for row in order("longest", group_by_length=how)] for how in (False, True)
    )

    def padding(lengths: list[int]) -> int:
        groups = [lengths[start : start + 8] for start in range(0, len(lengths), 8)]
        return sum(max(group) * len(group) - sum(group) for group in groups)

    assert sorted(plain) == sorted(grouped)
    assert padding(grouped) < padding(plain) / 3


def test_several_processes_get_blanks_and_no_row_twice() -> None:
    alone, shared = order(), order(multiple_of=16)
    assert len(shared) % 16 == 0
    rows = list(shared)
    assert rows[: len(alone)] == list(alone)
    assert set(rows[len(alone) :]) <= {BLANK}


def test_packs_of_a_mixed_run_are_of_one_source_each() -> None:
    def example(number: int) -> Example:
        ids = [number + 1] * LENGTHS[number]
        return Example(ids, list(ids), "", lambda ids: "", 1, False, True)

    rows = EncodedDataset([example(number) for number in range(len(LENGTHS))])
    packs = PackedDataset(rows.of_sources(SOURCES, is_mixed=True), 300)
    assert sorted(row for pack in packs.packs for row in pack) == list(range(len(LENGTHS)))
    for index, pack in enumerate(packs.packs):
        assert {int(SOURCES[row]) for row in pack} == {int(packs.sources[index])}  # type: ignore[index]
        assert set(packs[index]["sources"].tolist()) == {int(packs.sources[index])}  # type: ignore[index]
    mixed = MixedOrder(
        packs.lengths,
        packs.sources,
        SHARES,
        ends_with="first",
        group_size=2,
        seed=0,  # type: ignore[arg-type]
    )
    assert Counter(packs.sources[list(mixed)].tolist()) == dict(enumerate(mixed.counts))  # type: ignore[index]
    unmixed = PackedDataset(rows.of_sources(SOURCES, is_mixed=False), 300)
    assert unmixed.packs == PackedDataset(rows, 300).packs
    assert unmixed.fingerprint() == PackedDataset(rows, 300).fingerprint() != packs.fingerprint()


def test_where_sources_end_is_in_the_fingerprint_of_a_mixed_run_alone() -> None:
    ids = [1, 2, 3]
    rows = EncodedDataset([Example(ids, ids, "", lambda ids: "", 1, False, True)] * 4)
    one, other = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
    plain = {rows.of_sources(part, is_mixed=False).fingerprint() for part in (one, other)}
    assert plain == {rows.fingerprint()}
    mixed = {rows.of_sources(part, is_mixed=True).fingerprint() for part in (one, other)}
    assert len(mixed) == 2


def test_sources_that_cannot_have_their_share_are_named() -> None:
    options: dict[str, Any] = {"ends_with": "first", "group_size": 1, "seed": 0}
    with pytest.raises(DataError, match=r"b\.jsonl: no row is left to train"):
        MixedOrder([5, 5], np.array([0, 0]), (0.5, 0.5), names=("a.jsonl", "b.jsonl"), **options)
    with pytest.raises(
        DataError, match=r"source 1: its share of 0.001 is less than one row .*mix_epoch=longest"
    ):
        MixedOrder([5, 5], np.array([0, 1]), (0.999, 0.001), **options)
    with pytest.raises(ConfigError, match=r"has 2 numbers, data\.dataset_path has 3 names"):
        check_mix(DataSection(mix_probabilities=(0.5, 0.5)), ["a", "b", "c"])


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (["data/gsm8k.jsonl.gz", "more/alpaca.json"], ("gsm8k", "alpaca")),
        (["one/rows.jsonl", "two/rows.csv"], ("one-rows", "two-rows")),
        (["openai/gsm8k:train", "openai/gsm8k:test"], ("gsm8k-train", "gsm8k-test")),
        (["rows.jsonl", "../rows.jsonl"], ("1-rows", "2-rows")),
        (["a/x y\n.jsonl", ".jsonl"], ("x-y-", ".jsonl")),
        (["rows/a/*.jsonl", "rows/b/*.jsonl.gz"], ("a", "b")),
        (["rows/**/*.jsonl", "rows/part-[0-4].jsonl"], ("rows", "part-0-4")),
        (["*.jsonl", "?.csv"], ("-.jsonl", "-.csv")),
    ],
)
def test_the_name_of_a_source_is_short_and_no_other_ones(
    sources: list[str], names: tuple[str, ...]
) -> None:
    assert short_names(sources) == names
