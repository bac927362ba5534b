"""AdamW on weights whose only copy is bf16: torchao's, which rounds stochastically.

A usual update is smaller than half a bf16 step, and rounding to the nearest value would lose it.
Here it is rounded up or down at random so that its mean is right.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import nn

NUM_STEPS = "num_steps"
"""Key of a parameter group: steps that are done, from which the next one's random numbers come."""

MIN_8BIT_SIZE = 4096
"""Smaller weights keep 32-bit moments, as with bitsandbytes."""


class Bf16AdamW(torch.optim.Optimizer):
    """What this program needs of torchao's AdamW and that one does not do; see `make_bf16_adamw`.

    - Random numbers are a function of seed and step alone, and the global random state is left as
      it was: a resume, a preview or another rank cannot change them. Ranks that round differently
      would train different models.
    - Moments that are not 8-bit are fp32. torchao keeps them in the dtype of the weights, and in
      bf16 the mean of squares never falls: a step takes off 0.1 %, less than half a bf16 step.
    - Rates are plain numbers, as in every other optimizer here.
    """

    seed: int
    block_size: float
    wide: frozenset[int]
    """Ids of parameters whose moments are not 8-bit whatever their size."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Torch's own: torchao's makes a tensor of the rate."""
        param_group.setdefault(NUM_STEPS, 0)
        torch.optim.Optimizer.add_param_group(self, param_group)

    def is_8bit(self, parameter: torch.Tensor) -> bool:
        """Whether the moments of this parameter are 8-bit ones."""
        size = parameter.numel()
        return (
            id(parameter) not in self.wide
            and size >= MIN_8BIT_SIZE
            and size % self.block_size == 0  # never for torchao's AdamW without 8 bits: inf
        )

    def _new_buffer(self, p: torch.Tensor, signed: bool) -> torch.Tensor:
        if self.is_8bit(p):
            made: torch.Tensor = super()._new_buffer(p, signed)  # type: ignore[misc]
            return made
        return torch.zeros_like(p, dtype=torch.float32)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step every parameter that has a gradient.

        Args:
            closure: computes the loss and its gradients anew; called once.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        rates = [group["lr"] for group in groups]
        device = groups[0]["params"][0].device
        # Compiled code needs a C++ compiler on a CPU and half a minute at every start; on a GPU it
        # needs what torch brings along, and saves fp32 copies of the largest weight.
        stance = "default" if device.type == "cuda" else "force_eager"
        try:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = torch.tensor(rate, dtype=torch.float32)
            with (
                random_numbers_of(self.seed, groups[0][NUM_STEPS], device),
                torch.compiler.set_stance(stance),
            ):
                super().step()
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
        for group in groups:
            group[NUM_STEPS] += 1
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Torch's own, and fp32 moments stay fp32: torch casts them to the weights' dtype."""
        super().load_state_dict(state_dict)
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                if value.dtype == torch.float32 and value.shape == parameter.shape:
                    self.state[parameter][key] = value.to(parameter.device)


def make_bf16_adamw(
    kind: type[torch.optim.Optimizer],
    groups: list[dict[str, Any]],
    *,
    wide: Iterable[nn.Parameter],
    seed: int,
    **options: Any,
) -> Bf16AdamW:
    """Build one of torchao's AdamWs with what `Bf16AdamW` adds.

    Args:
        kind: `torchao.optim._AdamW`, or `AdamW8bit` for moments in 8 bits by blocks of 256.
        groups: parameter groups; bf16 parameters are rounded stochastically, fp32 ones not at all.
        wide: parameters whose moments are fp32 all the same.
        seed: of the rounding.
        options: lr, betas, eps.
    """
    optimizer = type("Bf16AdamW", (Bf16AdamW, kind), {})(
        groups, bf16_stochastic_round=True, **options
    )
    optimizer.seed, optimizer.wide = seed, frozenset(map(id, wide))
    return cast(Bf16AdamW, optimizer)


@contextlib.contextmanager
def random_numbers_of(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """Draw from a state that is a function of seed and step, then put the present one back."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index or 0])
    before = [generator.get_state() for generator in generators]
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + 1) % 2**63
    try:
        for generator in generators:
            generator.manual_seed(mixed)
        yield
    finally:
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)
