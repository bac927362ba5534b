"""How often previews matched their golden answers, and whether that is rising.

The trend compares the same prompts with themselves over preview steps. With many prompts a step,
the last comparisons and those before them are other prompts of the same step and tell nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

from trainer.preview.base import PreviewResult

Trend = Literal["rising", "falling", "flat"]
"""`flat` stands in status files of version 0.1 only: where a test cannot tell, nothing is said."""

SHORT_WINDOW = 20
LONG_WINDOW = 50
SIGNIFICANCE = 0.05
"""A trend is said where chance alone would show as much in fewer than this share of runs."""


class MatchHistory:
    """Comparisons by step; results without one (no golden, error) do not count."""

    def __init__(self) -> None:
        self._by_step: dict[int, dict[str, bool]] = {}
        self._trend: Trend | None = None
        self._is_trend_known = True

    def add(self, results: Iterable[PreviewResult]) -> None:
        """Take note of results; a second answer to a prompt by the same step replaces the first."""
        self._is_trend_known = False
        for one in results:
            if one.matches is not None:
                prompts = self._by_step.setdefault(one.step, {})
                prompts[one.prompt_id or one.prompt] = bool(one.matches)

    def clear(self) -> None:
        """Forget everything; a resumed run tells its past again."""
        self._by_step.clear()
        self._is_trend_known = False

    def counts(self, window: int) -> tuple[int, int] | None:
        """Matches and comparisons among the last `window`; None when there are none."""
        newest: list[bool] = []
        for step in sorted(self._by_step, reverse=True):
            newest += reversed(self._by_step[step].values())
            if len(newest) >= window:
                break
        newest = newest[:window]
        return (sum(newest), len(newest)) if newest else None

    def trend(self) -> Trend | None:
        """The newest third of the preview steps against the third before, prompt by prompt.

        Returns:
            `rising` or `falling` where a two-sided sign test over the prompts that changed is
            below SIGNIFICANCE; None where it cannot tell (with fewer than six prompts never).
        """
        if not self._is_trend_known:  # asked for at every status, changed by previews only
            self._trend, self._is_trend_known = self._find_trend(), True
        return self._trend

    def _find_trend(self) -> Trend | None:
        steps = sorted(self._by_step)
        size = max(1, len(steps) // 3)
        if len(steps) < 2 * size:
            return None
        newest, before = self._shares(steps[-size:]), self._shares(steps[-2 * size : -size])
        changes = [newest[prompt] - before[prompt] for prompt in newest.keys() & before.keys()]
        gained, lost = sum(one > 0 for one in changes), sum(one < 0 for one in changes)
        if sign_test(gained, lost) >= SIGNIFICANCE:
            return None
        return "rising" if gained > lost else "falling"

    def _shares(self, steps: list[int]) -> dict[str, float]:
        """Prompt -> share of its comparisons at these steps that match."""
        found: dict[str, list[bool]] = {}
        for step in steps:
            for prompt, is_match in self._by_step[step].items():
                found.setdefault(prompt, []).append(is_match)
        return {prompt: sum(matches) / len(matches) for prompt, matches in found.items()}


def sign_test(gained: int, lost: int) -> float:
    """How likely a split at least as uneven is where gains and losses are equally likely.

    Two-sided and exact, which is McNemar's exact test of paired yes/no answers.
    """
    count = gained + lost
    tail: float = sum(math.comb(count, i) for i in range(min(gained, lost) + 1)) / 2**count
    return min(1.0, 2 * tail)
