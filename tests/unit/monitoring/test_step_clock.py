"""The time that is left counts the pauses for previews, evaluations and checkpoints."""

from __future__ import annotations

import pytest

from trainer.monitoring.step_report import StepClock


def test_pauses_between_steps_are_part_of_a_steps_time() -> None:
    clock = StepClock(began=100.0)
    now = 100.0
    for step in range(1, 51):
        now += 1.0
        clock.add(1.0, now)
        if step % 10 == 0:
            now += 5.0  # a preview; known once the next step is done
    now += 1.0
    clock.add(1.0, now)
    assert clock.seconds_per_step == pytest.approx((now - 100.0) / 51)


def test_the_first_step_alone_gives_its_own_time_and_later_ones_outweigh_it() -> None:
    clock = StepClock()
    clock.add(30.0, 30.0)
    assert clock.seconds_per_step == 30.0
    for step in range(300):
        clock.add(1.0, 31.0 + step)
    assert clock.seconds_per_step < 1.2
