"""The learning rate of every step: a closed form of the step and the length of the run alone.

    step   = optimizer steps done before this one: 0 ... total - 1
    warm-up (step < warmup):  peak * (step + 1) / (warmup + 1)
    then, with share = (step - warmup) / (total - warmup):
        linear    peak * (1 - share)
        cosine    peak * (1 + cos(pi * share)) / 2
        constant  peak

So the first step has a positive rate, step `warmup` the peak, and the last one is above 0 too: 0 is
where the step after it would be.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from trainer.config.schema import Hyperparams
from trainer.errors import ConfigError


def warmup_length(warmup_steps: float, total: int) -> int:
    """Steps before the one at the peak rate.

    Args:
        warmup_steps: a whole number, or below 1 a share of all steps, rounded up; a share leaves
            at least one step at the peak, also in a run of one step.
        total: steps of the whole run.
    """
    if warmup_steps >= 1:
        return int(warmup_steps)
    return min(math.ceil(warmup_steps * total), total - 1)


def rate_factor(name: str, step: int, *, warmup: int, total: int) -> float:
    """The share of the peak rate, 0 to 1, at which the step after `step` others is made.

    Args:
        name: `linear`, `cosine` or `constant`.
        step: optimizer steps done; from `total` on what the curve ends in.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    share = min((step - warmup) / max(total - warmup, 1), 1.0)
    if name == "linear":
        return 1 - share
    if name == "cosine":
        return 0.5 * (1 + math.cos(math.pi * share))
    assert name == "constant", name
    return 1.0


class RateSchedule(LambdaLR):
    """Sets the rate of every parameter group; a resume takes back its position only.

    Torch's own keeps the rate it had computed last, so the first step of a run that is made longer
    would be at the rate of the shorter one.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, hyperparams: Hyperparams, total: int):
        """Begin before the first step.

        Args:
            optimizer: each group's own `lr` is its peak.
            hyperparams: lr_scheduler and warmup_steps.
            total: steps of the whole run.
        """
        warmup = warmup_length(hyperparams.warmup_steps, total)
        name = hyperparams.lr_scheduler
        super().__init__(
            optimizer, lambda step: rate_factor(name, step, warmup=warmup, total=total)
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at the position of a checkpoint, at this run's own rates.

        Call it after the optimizer's, which brings the rates of the checkpoint along.
        """
        super().load_state_dict(state_dict)
        rates = [
            peak * factor(self.last_epoch)
            for peak, factor in zip(self.base_lrs, self.lr_lambdas, strict=True)
        ]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self._last_lr = rates


def check_schedule(hyperparams: Hyperparams, total: int, *, start: int = 0) -> None:
    """Refuse a run whose steps could not move a weight.

    Args:
        hyperparams: with learning_rate filled in.
        total: steps of the whole run.
        start: steps that are done already.
    Raises:
        ConfigError: the warm-up is as long as the run, or every rate that is left is 0.
    """
    if hyperparams.warmup_steps >= total:
        raise ConfigError(
            f"hyperparams.warmup_steps={hyperparams.warmup_steps:g} is not below the {total} steps "
            "that these rows and epochs make; lower it or train longer."
        )
    peak = hyperparams.learning_rate or 0.0
    warmup = warmup_length(hyperparams.warmup_steps, total)
    left = range(start, total)
    name = hyperparams.lr_scheduler
    if left and not any(peak * rate_factor(name, n, warmup=warmup, total=total) for n in left):
        raise ConfigError(
            f"hyperparams.learning_rate={peak:g} makes every rate of steps {start + 1} to {total} "
            "0, so that no weight would move; raise it."
        )
