"""What became of each prompt over the steps of a run, in the words of every view."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from trainer.counts import counted
from trainer.preview.base import PreviewResult

State = Literal["lost", "never right", "right", "no golden", "no answer"]
"""`lost`: right before, wrong now. Both `lost` and `never right` are wrong now."""

ORDER: tuple[State, ...] = ("lost", "never right", "no answer", "right", "no golden")
"""Prompts to look at first stand first."""

WRONG: tuple[State, ...] = ("lost", "never right")

LEVELS = 10
"""Shades of a golden token probability."""


@dataclass(frozen=True)
class Verdict:
    """What became of one prompt."""

    state: State
    since: int | None
    """The step since which it is so; None without a comparison."""
    first_right: int | None
    """The first step at which it was right; None: at none."""
    num_compared: int
    """Preview steps at which an answer was compared with golden."""
    probability: float | None
    """Golden token probability at the newest step that has one, from 0 to 1."""
    first_probability: float | None
    """The same at the first step that has one."""
    words: str
    """In a sentence, such as `first right at step 400, lost at 900`."""

    @property
    def is_wrong(self) -> bool:
        """Whether the newest comparison did not match."""
        return self.state in WRONG

    @property
    def short(self) -> str:
        """For a narrow column, such as `lost at 900`, `since 400`, `never right`."""
        if self.state == "lost":
            return f"lost at {self.since}"
        if self.state == "right":
            return f"since {self.since}"
        return self.state

    @property
    def change(self) -> str:
        """Of the golden token probability, such as `0.4 -> 16.6 %`; "" where not measured."""
        if self.probability is None or self.first_probability is None:
            return ""
        return f"{100 * self.first_probability:.1f} -> {100 * self.probability:.1f} %"


def verdict_of(results: Iterable[PreviewResult]) -> Verdict:
    """Judge the answers to one prompt, the oldest first."""
    results = list(results)
    compared = [(one.step, one.matches) for one in results if one.matches is not None]
    known = [one.golden_probability for one in results if one.golden_probability is not None]
    turns = [
        (step, bool(is_right))
        for index, (step, is_right) in enumerate(compared)
        if index == 0 or is_right != compared[index - 1][1]
    ]
    has_golden = any(one.golden_answer is not None for one in results)
    state, since = _state(turns, has_golden=has_golden)
    return Verdict(
        state=state,
        since=since,
        first_right=next((step for step, is_right in turns if is_right), None),
        num_compared=len(compared),
        probability=known[-1] if known else None,
        first_probability=known[0] if known else None,
        words=_words(turns, len(compared), has_golden=has_golden),
    )


def _state(turns: Sequence[tuple[int, bool]], *, has_golden: bool) -> tuple[State, int | None]:
    if not turns:
        return ("no answer" if has_golden else "no golden"), None
    step, is_right = turns[-1]
    if is_right:
        return "right", step
    return ("lost" if len(turns) > 1 else "never right"), step


def _words(turns: Sequence[tuple[int, bool]], num_compared: int, *, has_golden: bool) -> str:
    if not turns:
        return "no answer yet" if has_golden else "no golden answer to compare with"
    gains = [step for step, is_right in turns if is_right]
    if not gains:
        return f"not right yet, after {counted(num_compared, 'preview')}"
    # A wrong beginning is no loss, so right and wrong alternate from the first gain on.
    losses = [step for step, is_right in turns if not is_right and step > gains[0]]
    words = f"first right at step {gains[0]}"
    if not losses:
        return f"{words}, right since"
    if len(losses) == 1:
        words += f", lost at {losses[0]}"
        return f"{words}, right again since {gains[1]}" if len(gains) > 1 else words
    if turns[-1][1]:
        return f"{words}, lost {len(losses)} times, right again since {gains[-1]}"
    return f"{words}, lost {len(losses)} times, wrong since {losses[-1]}"


def in_order(verdicts: Sequence[Verdict]) -> list[int]:
    """Indices of prompts in the order in which one wants to look at them.

    Lost ones, the newest loss first; never right, the least probable golden answer last; then those
    without an answer, right ones and those without a golden answer. Equal ones keep their order.
    """

    def key(index: int) -> tuple[float, float, int]:
        one = verdicts[index]
        rank = {"lost": float(-(one.since or 0)), "never right": -(one.probability or 0.0)}
        return ORDER.index(one.state), rank.get(one.state, 0.0), index

    return sorted(range(len(verdicts)), key=key)


@dataclass(frozen=True)
class Counts:
    """How many prompts are what now; `wrong_now` is `lost` plus `never_right`."""

    right: int
    wrong_now: int
    lost: int
    never_right: int
    no_answer: int
    no_golden: int

    @property
    def compared(self) -> int:
        """Prompts whose newest comparison says right or wrong."""
        return self.right + self.wrong_now

    @property
    def all(self) -> int:
        """All prompts."""
        return self.compared + self.no_answer + self.no_golden


def counts_of(verdicts: Iterable[Verdict]) -> Counts:
    """Count the states."""
    states = [one.state for one in verdicts]
    lost, never = states.count("lost"), states.count("never right")
    return Counts(
        right=states.count("right"),
        wrong_now=lost + never,
        lost=lost,
        never_right=never,
        no_answer=states.count("no answer"),
        no_golden=states.count("no golden"),
    )


def level_of(probability: float | None) -> int | None:
    """The shade of a golden token probability, 0 to LEVELS - 1; None where not measured.

    Of its square root: training begins near 0, where a rise from 0.4 to 16 % must be seen.
    """
    if probability is None:
        return None
    return min(LEVELS - 1, int(LEVELS * math.sqrt(max(0.0, probability))))


def common_start(names: Sequence[str], *, least: int = 12) -> int:
    """How many characters all names begin with and can be left out, up to a word's beginning.

    Args:
        least: a shorter common beginning is left where it is.
    """
    if len(names) < 2:
        return 0
    low, high = min(names), max(names)
    at = next(
        (n for n, (one, other) in enumerate(zip(low, high, strict=False)) if one != other),
        min(len(low), len(high)),
    )
    while at > 0 and not low[at - 1].isspace():
        at -= 1
    return at if at >= least else 0
