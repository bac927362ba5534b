"""Rates: positive at every step, the peak where it is said, and never a run without one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from trainer.config.training_sections import Hyperparams
from trainer.core.optim import RateSchedule, check_schedule, rate_factor, warmup_length
from trainer.core.training import check_weights_moved
from trainer.errors import ConfigError, NonFiniteError

NAMES = ("linear", "cosine", "constant")


def rates(total: int, **hyper: Any) -> list[float]:
    """What an optimizer is told at each step, by stepping it."""
    hyperparams = Hyperparams(learning_rate=1.0, **hyper)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = RateSchedule(optimizer, hyperparams, total)
    found = []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("warmup", "total"),
    [
        (warmup, total)
        for warmup in (0, 1, 3, 0.03, 0.5, 0.99)
        for total in (1, 2, 4, 17)
        if warmup < total
    ],
)
def test_every_step_has_a_positive_rate_and_one_has_the_peak(
    name: str, warmup: float, total: int
) -> None:
    found = rates(total, lr_scheduler=name, warmup_steps=warmup)
    assert min(found) > 0
    assert found.index(max(found)) == warmup_length(warmup, total)
    assert max(found) == 1.0


def test_the_warm_up_rises_in_equal_parts_to_the_peak() -> None:
    assert rates(6, lr_scheduler="constant", warmup_steps=3) == [0.25, 0.5, 0.75, 1, 1, 1]
    assert rates(4, lr_scheduler="linear", warmup_steps=0) == [1, 0.75, 0.5, 0.25]


def test_a_share_is_rounded_up_and_leaves_a_step_at_the_peak() -> None:
    assert [warmup_length(0.03, total) for total in (1, 2, 33, 34, 1000)] == [0, 1, 1, 2, 30]
    assert warmup_length(0.999, 10) == 9
    assert warmup_length(0.0, 10) == 0
    assert warmup_length(7.0, 10) == 7


def test_cosine_is_half_way_in_the_middle() -> None:
    assert rate_factor("cosine", 6, warmup=2, total=10) == pytest.approx(0.5)
    assert rate_factor("cosine", 9, warmup=0, total=10) == pytest.approx(
        (1 + math.cos(0.9 * math.pi)) / 2
    )


@pytest.mark.parametrize(
    ("total", "start", "hyper"),
    [
        (4, 0, {"warmup_steps": 4, "learning_rate": 1e-3}),
        (3, 0, {"warmup_steps": 9, "learning_rate": 1e-3}),
        # Half of the smallest number above 0 is 0: what is left of this run has no rate.
        (2, 1, {"warmup_steps": 0, "lr_scheduler": "linear", "learning_rate": 5e-324}),
        (9, 6, {"warmup_steps": 0, "lr_scheduler": "cosine", "learning_rate": 5e-324}),
    ],
)
def test_a_run_that_cannot_move_a_weight_is_refused(
    total: int, start: int, hyper: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=r"warmup_steps|learning_rate"):
        check_schedule(Hyperparams(**hyper), total, start=start)


def test_a_finished_run_that_is_resumed_has_no_rate_to_look_at() -> None:
    check_schedule(Hyperparams(learning_rate=1e-3), 5, start=5)


def test_fp16_steps_that_were_all_skipped_are_no_completed_run() -> None:
    check_weights_moved(0, 0)
    check_weights_moved(3, 2)
    with pytest.raises(NonFiniteError, match="all 3 steps overflowed"):
        check_weights_moved(3, 3)
