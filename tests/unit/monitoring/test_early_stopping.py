"""Early stopping counts evaluations without a lower loss, and is not fooled by a NaN."""

from __future__ import annotations

import math

from trainer.monitoring.callbacks import EarlyStopping


def test_a_nan_counts_as_no_lower_loss_and_is_never_the_best() -> None:
    stopping = EarlyStopping(patience=2)
    assert not stopping.update(math.nan, 1)
    assert not stopping.update(3.0, 2)
    assert (stopping.best_loss, stopping.best_step) == (3.0, 2)
    assert not stopping.update(math.nan, 3)
    assert stopping.update(3.0, 4)


def test_min_delta_is_what_a_loss_must_fall_by() -> None:
    stopping = EarlyStopping(patience=1, min_delta=0.5)
    assert not stopping.update(3.0, 1)
    assert stopping.update(2.6, 2)


def test_the_lowest_loss_is_known_without_patience_and_below_min_delta() -> None:
    for patience in (0, 3):
        stopping = EarlyStopping(patience=patience, min_delta=0.5)
        for step, loss in enumerate([3.0, 2.9, math.nan, 2.95, 2.8, 2.85], start=1):
            stopping.update(loss, step)
        assert (stopping.lowest_loss, stopping.lowest_step) == (2.8, 5)
        assert (stopping.best_loss, stopping.best_step) == (3.0, 1)


def test_a_resume_restores_all_that_was_counted() -> None:
    stopping, again = EarlyStopping(patience=2), EarlyStopping(patience=5)
    for step, loss in enumerate([3.0, 2.0, 2.5], start=1):
        stopping.update(loss, step)
    again.restore(stopping.state())
    assert again.state() == stopping.state()
    assert again.patience == 5
