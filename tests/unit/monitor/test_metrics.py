"""Columns of metrics, and charts that lose no spike."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.monitor.metrics import ExponentialMean, MetricsTable, pick_points


def table_of(losses: list[float | None]) -> MetricsTable:
    table = MetricsTable()
    for step, loss in enumerate(losses, 1):
        table.add({"type": "StepDone", "step": step, "train_loss": loss})
    return table


@given(
    values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400),
    max_points=st.integers(4, 60),
)
def test_picked_points_are_few_and_keep_the_ends_and_the_extremes(
    values: list[float], max_points: int
) -> None:
    array = np.array(values)
    picked = pick_points(array, max_points)
    assert len(picked) <= max_points
    assert picked[0] == 0
    assert picked[-1] == len(values) - 1
    assert sorted(set(picked)) == list(picked)
    assert array[picked].max() == array.max()
    assert array[picked].min() == array.min()


def test_one_spike_in_100000_steps_is_on_the_chart() -> None:
    losses: list[float | None] = [1.0] * 100_000
    losses[54_321] = 99.0
    points = table_of(losses).series("train_loss", max_points=1000)
    assert len(points) <= 1000
    assert (54_322, 99.0) in points


def test_missing_values_are_left_out() -> None:
    assert table_of([1.0, None, 3.0]).series("train_loss") == [(1, 1.0), (3, 3.0)]


def test_smoothing_is_the_weighted_mean_of_the_past() -> None:
    values = np.array([4.0, 1.0, 7.0])
    weights = np.array([0.25, 0.5, 1.0])
    mean = ExponentialMean(0.5)
    mean.extend(values)
    assert mean.means[-1] == pytest.approx((values * weights).sum() / weights.sum())


def test_smoothing_goes_on_where_it_stopped_and_begins_again_after_a_resume() -> None:
    losses = [5.0, 4.0, None, 3.0, 2.0, 6.0, 1.0]
    growing = table_of(losses[:3])
    growing.series("train_loss", smoothing=0.9)
    for step, loss in enumerate(losses[3:], 4):
        growing.add({"type": "StepDone", "step": step, "train_loss": loss})
    whole = table_of(losses)
    assert growing.series("train_loss", smoothing=0.9) == whole.series("train_loss", smoothing=0.9)
    whole.drop_after(4)
    expected = table_of(losses[:4]).series("train_loss", smoothing=0.9)
    assert whole.series("train_loss", smoothing=0.9) == expected
    assert whole.series("train_loss", smoothing=0.5) != expected


@pytest.mark.parametrize("order", [lambda steps: steps, reversed], ids=["in order", "reversed"])
def test_steps_after_a_resume_are_dropped(order: Callable[[Any], Any]) -> None:
    table = MetricsTable()
    for step in order(range(1, 11)):
        table.add({"type": "StepDone", "step": step, "train_loss": float(step)})
    table.add({"type": "EvaluationDone", "step": 9, "val_loss": 1.0})
    table.drop_after(6)
    assert sorted(table.steps) == [1, 2, 3, 4, 5, 6]
    assert list(table.columns["train_loss"]) == [float(step) for step in table.steps]
    assert table.evaluations == []


def test_what_was_not_finite_is_kept_in_words() -> None:
    table = MetricsTable()
    table.add({"type": "StepDone", "step": 3, "train_loss": None, "non_finite": {"loss": "nan"}})
    assert table.non_finite == {3: "loss nan"}
    assert math.isnan(table.newest("train_loss"))
