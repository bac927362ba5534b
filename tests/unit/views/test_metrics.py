"""Columns of metrics, and charts that lose no spike."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.views.metrics import SMOOTHING_SHARE, MetricsTable, pick_points, window_half


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


def test_a_smoothed_curve_is_not_behind_a_loss_that_falls_fast() -> None:
    rng = np.random.default_rng(0)
    losses = [
        float(5.0 * 0.9**step * noise) for step, noise in enumerate(rng.lognormal(0, 0.3, 260))
    ]
    smooth = dict(table_of(losses).smoothed("train_loss", SMOOTHING_SHARE, is_log=True))
    assert list(smooth) == list(range(1, 261))
    for step in (20, 40, 130, 250):
        middle = float(np.median(losses[step - 5 : step + 4]))
        assert middle / 1.5 < smooth[step] < middle * 1.5, step


def test_one_spike_does_not_bend_the_smoothed_curve() -> None:
    losses: list[float | None] = [1.0] * 1000
    losses[500] = 1e6
    smooth = table_of(losses).smoothed("train_loss", SMOOTHING_SHARE)
    assert {value for _, value in smooth} == {1.0}


def test_a_smoothed_curve_looks_as_far_ahead_as_back_and_leaves_out_missing_values() -> None:
    table = table_of([1.0, 2.0, None, 9.0, 4.0, 6.0])
    # Five values with a window of five; three next to the ends, two at them.
    assert table.smoothed("train_loss", 0.8) == [(1, 1.5), (2, 2.0), (4, 4.0), (5, 6.0), (6, 5.0)]


@pytest.mark.parametrize(("num_steps", "is_smooth"), [(40, False), (119, False), (120, True)])
def test_a_short_run_is_shown_as_it_is(num_steps: int, is_smooth: bool) -> None:
    table = table_of([float(step % 2) for step in range(num_steps)])
    raw = table.series("train_loss")
    assert (table.smoothed("train_loss", SMOOTHING_SHARE) != raw) is is_smooth
    assert bool(window_half(num_steps, SMOOTHING_SHARE)) is is_smooth


def test_a_smoothed_curve_has_few_points_however_long_the_run_is() -> None:
    table = table_of([float(step) for step in range(5000)])
    points = table.smoothed("train_loss", SMOOTHING_SHARE, max_points=100)
    assert len(points) == 100
    assert (points[0][0], points[-1][0]) == (1, 5000)


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
