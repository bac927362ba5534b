"""How often recent previews matched their golden answers, and whether that is rising."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Literal

from trainer.preview.base import PreviewResult

Trend = Literal["rising", "falling", "flat"]

SHORT_WINDOW = 20
LONG_WINDOW = 50
TREND_THRESHOLD = 0.1
"""The trend is flat unless the share of matches moved by more than this between two windows."""


class MatchHistory:
    """The newest comparisons, oldest first; results without one (no golden, error) do not count."""

    def __init__(self) -> None:
        """Start with no comparison."""
        self._matches: deque[bool] = deque(maxlen=max(2 * SHORT_WINDOW, LONG_WINDOW))

    def add(self, results: Iterable[PreviewResult]) -> None:
        """Take note of results in the order in which they were made."""
        self._matches.extend(bool(one.matches) for one in results if one.matches is not None)

    def clear(self) -> None:
        """Forget everything."""
        self._matches.clear()

    def counts(self, window: int) -> tuple[int, int] | None:
        """Matches and comparisons among the last `window`; None when there are none."""
        newest = list(self._matches)[-window:]
        return (sum(newest), len(newest)) if newest else None

    def trend(self) -> Trend | None:
        """The last 20 comparisons against the 20 before; None while there are fewer than 40."""
        matches = list(self._matches)
        if len(matches) < 2 * SHORT_WINDOW:
            return None
        newest = sum(matches[-SHORT_WINDOW:])
        before = sum(matches[-2 * SHORT_WINDOW : -SHORT_WINDOW])
        if abs(newest - before) <= TREND_THRESHOLD * SHORT_WINDOW:
            return "flat"
        return "rising" if newest > before else "falling"
