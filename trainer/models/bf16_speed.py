"""How fast a CPU trains in bf16 beside fp32: measured and told, and nothing is decided by it."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

from trainer.models.precision import cpu_has_bf16

PAIRS = 3
"""Times of fp32 and bf16 that take turns."""

MAX_SIZES = (2048, 8192)

MAX_TOKENS, PASS_FLOPS = 2048, 2e10
"""What one forward and backward pass is cut to: tenths of a second on two cores."""


@dataclass(frozen=True)
class Bf16Speed:
    """Speed in bf16 by that in fp32."""

    hidden: int
    inner: int
    """Sizes of the block that was measured."""
    ratios: tuple[float, ...] = ()
    """Of each pair of passes; empty where the CPU only emulates bf16, which takes long."""

    @property
    def words(self) -> str:
        """One line for the user, with what to do."""
        if not self.ratios:
            return "this CPU has no bf16 arithmetic; fp32 is faster"
        low, high = min(self.ratios), max(self.ratios)
        told = (
            f"{median(self.ratios):.2f} times fp32's speed ({low:.2f} to {high:.2f}: an MLP block "
            f"of {self.hidden:,} x {self.inner:,}, forward and backward)"
        )
        if low > 1:
            return f"{told}; faster here, ask for it with --bf16"
        return f"{told}; {'slower here' if high < 1 else 'no clear gain here'}"

    def as_json(self) -> dict[str, Any]:
        """The figures as plain JSON values."""
        return {**dataclasses.asdict(self), "words": self.words}


def measure_bf16(hidden: int, inner: int) -> Bf16Speed:
    """Train one MLP block in both, by turns, as a run does: fp32 weights, autocast for bf16.

    Args:
        hidden, inner: sizes of the block, cut to `MAX_SIZES`. Random states stay as they are.
    """
    hidden, inner = min(hidden, MAX_SIZES[0]), min(inner, MAX_SIZES[1])
    if not cpu_has_bf16():
        return Bf16Speed(hidden, inner)
    tokens = min(MAX_TOKENS, max(64, int(PASS_FLOPS / (12 * hidden * inner))))
    with torch.random.fork_rng(devices=[]):
        block = nn.Sequential(nn.Linear(hidden, inner), nn.SiLU(), nn.Linear(inner, hidden))
        rows = torch.randn(tokens, hidden)

    def seconds(is_bf16: bool) -> float:
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            block(rows).float().sum().backward()
        block.zero_grad()
        return time.perf_counter() - started

    for is_bf16 in (False, True):  # the first pass makes kernels
        seconds(is_bf16)
    pairs = [(seconds(False), seconds(True)) for _ in range(PAIRS)]
    return Bf16Speed(hidden, inner, tuple(round(fp32 / bf16, 3) for fp32, bf16 in pairs))


def block_sizes(model_config: Any) -> tuple[int, int]:
    """Hidden and inner size of a model's MLP, from its transformers config."""
    text = model_config.get_text_config()
    hidden = int(getattr(text, "hidden_size", None) or 1024)
    return hidden, int(getattr(text, "intermediate_size", None) or 4 * hidden)
