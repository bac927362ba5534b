"""The losses of the sources of a run's rows, by step."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.monitoring.loss_names import PREFIXES, losses_of_line

Points = list[tuple[int, float]]


class SourceCurves:
    """Of the steps, or of the evaluations, of a run, in the order of the file."""

    def __init__(self, kind: str) -> None:
        """Start empty.

        Args:
            kind: type of the lines that are taken.
        """
        self.kind = kind
        self.steps: dict[str, array[int]] = {}
        self.losses: dict[str, array[float]] = {}

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self.steps)

    def add(self, row: Mapping[str, Any]) -> None:
        """Take one line of metrics.jsonl; what is not finite is left out."""
        for name, loss in losses_of_line(row).items():
            if isinstance(loss, float | int) and math.isfinite(loss):
                self.steps.setdefault(name, array("q")).append(row["step"])
                self.losses.setdefault(name, array("d")).append(loss)

    def add_all(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take many lines; those of a run with one source cost next to nothing."""
        keys: set[str] = set()
        keys.update(*rows)
        if any(key.startswith(PREFIXES[self.kind]) for key in keys):
            for row in rows:
                self.add(row)

    def drop_after(self, step: int) -> None:
        """Forget the steps above `step`: a resumed run makes them again."""
        for name, steps in list(self.steps.items()):
            kept = [number for number, at in enumerate(steps) if at <= step]
            self.steps[name] = array("q", [steps[number] for number in kept])
            self.losses[name] = array("d", [self.losses[name][number] for number in kept])
            if not kept:
                del self.steps[name], self.losses[name]

    def points(self) -> dict[str, Points]:
        """(step, loss) of each source."""
        return {
            name: list(zip(steps, self.losses[name], strict=True))
            for name, steps in sorted(self.steps.items())
        }

    def smoothed(self, share: float) -> dict[str, Points]:
        """The same as means over windows that are a share of the source's steps wide.

        Args:
            share: as SMOOTHING_SHARE of metrics.py.
        """
        return {name: _means(points, share) for name, points in self.points().items()}

    def newest(self) -> dict[str, float]:
        """The last loss of each source."""
        return {name: losses[-1] for name, losses in sorted(self.losses.items())}


def _means(points: Points, share: float) -> Points:
    half = round(share * len(points) / 2)
    sums = [0.0]
    for _, loss in points:
        sums.append(sums[-1] + loss)
    found = []
    for number, (step, _) in enumerate(points):
        reach = min(half, number, len(points) - 1 - number)
        low, high = number - reach, number + reach + 1
        found.append((step, (sums[high] - sums[low]) / (high - low)))
    return found


def loss_words(losses: Mapping[str, float]) -> str:
    """Such as `gsm8k 1.2345, alpaca 0.9876`."""
    return ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
