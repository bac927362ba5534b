"""Intervals cover what they promise, and pairs say "clearly" where they may."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from statistics import fmean, stdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.scores.statistics import (
    MIN_PROMPTS,
    difference_of,
    interval_of,
    sign_test,
    student_t,
    wilson,
)

SHARES = (0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95)


def exact_coverage(share: float, count: int) -> float:
    """How often the interval holds the share: a sum over all outcomes, no chance in it."""
    return sum(
        math.comb(count, right) * share**right * (1 - share) ** (count - right)
        for right in range(count + 1)
        if is_in(share, interval_of([1.0] * right + [0.0] * (count - right)))
    )


def is_in(value: float, interval: tuple[float, float] | None) -> bool:
    return interval is not None and interval[0] <= value <= interval[1]


@pytest.mark.parametrize("count", [16, 100])
def test_intervals_of_right_and_wrong_cover_95_percent(count: int) -> None:
    found = [exact_coverage(share, count) for share in SHARES]
    assert 0.93 <= fmean(found) <= 0.97
    assert min(found) >= 0.90


def shares_of_words(mean: float, noise: random.Random) -> float:
    """A score from 0 to 1 with this mean, spread like word overlaps."""
    return noise.betavariate(4 * mean, 4 * (1 - mean))


def mostly_right(mean: float, noise: random.Random) -> float:
    """Right, or half right: many equal values."""
    return 1.0 if noise.random() < 2 * mean - 1 else 0.5


def coverage(draw: Callable[[random.Random], float], mean: float, count: int, runs: int) -> float:
    noise = random.Random(f"{mean} {count}")
    hits = sum(is_in(mean, interval_of([draw(noise) for _ in range(count)])) for _ in range(runs))
    return hits / runs


@pytest.mark.parametrize(
    ("count", "runs"), [(16, 400), (100, 200), pytest.param(16, 20_000, marks=pytest.mark.long)]
)
def test_intervals_of_shares_cover_95_percent(count: int, runs: int) -> None:
    found = [
        coverage(lambda noise, mean=mean: shares_of_words(mean, noise), mean, count, runs)
        for mean in SHARES
    ]
    # Four standard deviations of the simulation itself.
    slack = 4 * math.sqrt(0.95 * 0.05 / runs)
    assert 0.93 - slack / math.sqrt(7) <= fmean(found) <= 0.97 + slack / math.sqrt(7)
    assert min(found) >= 0.90 - slack


@pytest.mark.parametrize(("sum_of_both", "widest"), [(4, 1.2), (20, 1.4), (100, 2.2)])
def test_intervals_of_values_that_are_alike_are_wide_rather_than_short(
    sum_of_both: int, widest: float
) -> None:
    noise = random.Random(sum_of_both)
    ratios = []
    for mean in SHARES:
        for _ in range(20):
            values = [
                noise.betavariate(sum_of_both * mean, sum_of_both * (1 - mean)) for _ in range(16)
            ]
            low, high = interval_of(values) or (0.0, 0.0)
            ratios.append((high - low) / (2 * student_t(15) * stdev(values) / 4))
    assert 1.0 < fmean(ratios) < widest


@pytest.mark.long
@pytest.mark.parametrize("count", [16, 100])
def test_values_that_are_mostly_equal_are_covered_too(count: int) -> None:
    means = (0.6, 0.8, 0.9, 0.95, 0.99)
    found = [
        coverage(lambda noise, mean=mean: mostly_right(mean, noise), mean, count, 20_000)
        for mean in means
    ]
    assert min(found) >= 0.90, dict(zip(means, found, strict=True))


@given(st.lists(st.sampled_from([0.0, 0.5, 0.999, 1.0]), min_size=1, max_size=40))
def test_an_interval_of_shares_has_a_width_and_holds_the_mean(values: list[float]) -> None:
    found = interval_of(values)
    if len(values) < MIN_PROMPTS:
        assert found is None
        return
    assert found is not None
    assert 0 <= found[0] < found[1] <= 1
    assert found[0] - 1e-9 <= fmean(values) <= found[1] + 1e-9


def test_all_right_is_not_certain_and_one_nearly_right_does_not_make_it_so() -> None:
    assert interval_of([1.0] * 16) == pytest.approx((0.8064, 1.0), abs=1e-4)
    low, _ = interval_of([1.0] * 15 + [0.95]) or (1.0, 1.0)
    assert low < 0.82


def test_rewards_that_are_no_shares_have_student_t() -> None:
    values = [float(n) for n in range(12)]
    low, high = interval_of(values) or (0.0, 0.0)
    half = 2.200985 * math.sqrt(13) / math.sqrt(12)  # t of 11 degrees; the variance is 13
    assert (low, high) == pytest.approx((5.5 - half, 5.5 + half), abs=1e-4)
    assert interval_of([7.0] * 20) is None


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(11, 2.200985), (15, 2.131450), (30, 2.042272), (99, 1.984217), (1000, 1.962339)],
)
def test_quantiles_of_student_are_those_of_the_tables(freedom: int, quantile: float) -> None:
    assert student_t(freedom) == pytest.approx(quantile, abs=5e-5)


def test_wilson_is_wilson() -> None:
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998


# ---- pairs


def test_right_and_wrong_are_compared_by_the_exact_test_of_mcnemar() -> None:
    before = [0.0] * 12
    _, is_clear = difference_of([1.0] * 5 + [0.0] * 7, before)
    assert is_clear is False  # five of five: p = 1/16
    interval, is_clear = difference_of([1.0] * 6 + [0.0] * 6, before)
    assert is_clear is True
    assert interval is not None
    assert 0 < interval[0] < 0.5 < interval[1] < 1
    assert sign_test(6, 0) == pytest.approx(1 / 32)


@pytest.mark.parametrize("runs", [300, pytest.param(10_000, marks=pytest.mark.long)])
def test_intervals_of_paired_shares_cover_95_percent(runs: int) -> None:
    """Prompts that were right stay so more often than others become so: pairs depend."""
    for before_right, stays, gains in [(0.3, 0.9, 0.2), (0.8, 0.95, 0.5), (0.05, 0.5, 0.05)]:
        noise = random.Random(f"{before_right}")
        true = before_right * stays + (1 - before_right) * gains - before_right
        hits = 0
        for _ in range(runs):
            before = [float(noise.random() < before_right) for _ in range(50)]
            now = [float(noise.random() < (stays if one else gains)) for one in before]
            hits += is_in(true, difference_of(now, before)[0])
        assert hits / runs >= 0.93 - 4 * math.sqrt(0.95 * 0.05 / runs)


def test_with_few_prompts_nothing_is_said() -> None:
    assert difference_of([1.0] * 11, [0.0] * 11) == (None, None)


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=12, max_size=40))
def test_the_same_answers_are_no_difference(values: list[float]) -> None:
    interval, is_clear = difference_of(values, values)
    assert is_clear is False
    assert interval is not None
    assert interval[0] < 0 < interval[1]


@given(st.lists(st.floats(0, 1), min_size=12, max_size=40), st.floats(-0.5, 0.5))
@settings(max_examples=50)
def test_what_is_above_is_never_clearly_below(values: list[float], shift: float) -> None:
    now = [value + abs(shift) for value in values]
    interval, is_clear = difference_of(now, values)
    assert not (is_clear and interval is not None and interval[1] < 0)


@pytest.mark.parametrize("count", [16, pytest.param(100, marks=pytest.mark.long)])
def test_chance_alone_is_rarely_called_clear(count: int) -> None:
    noise, runs = random.Random(count), 1000
    told = 0
    for _ in range(runs):
        now, before = ([float(noise.random() < 0.6) for _ in range(count)] for _ in range(2))
        told += bool(difference_of(now, before)[1])
    assert told / runs <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / runs)
