"""Means of scores by step, with intervals, and against the first and the best step.

Steps are compared prompt by prompt. What is shown anywhere is one of these figures.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from trainer.preview.base import PreviewResult, said_nats
from trainer.scores.statistics import difference_of, interval_of, is_binary, pass_at

GOLDEN_PROBABILITY = "golden_probability"

GOLDEN_LOGPROB = "golden_logprob"

SCORE = "score."
"""Before the names of `monitoring.scores`."""

MATCH = "match"
"""The profile's comparison with golden, where several samples of each prompt tell of it."""

PASS = ".pass@"
"""Between the name of a verdict and the k of pass@k."""


class FigurePart(BaseModel):
    """What both share: unknown fields are errors, values cannot be changed in place."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ScoreDifference(FigurePart):
    """The mean of one step against that of another one, over the prompts that both have."""

    step: int
    """The other step."""
    mean: float
    """The other step's mean over these prompts."""
    difference: float
    """This step's mean over these prompts minus the other one's."""
    low: float | None
    """Lower end of the difference's interval at 95 %; null where nothing can be said."""
    high: float | None
    """Upper end."""
    is_clear: bool | None
    """Whether chance alone would hardly show as much; null with fewer than 12 prompts."""
    num_prompts: int
    """Prompts that have the score at both steps."""


class ScoreFigure(FigurePart):
    """The mean of one score over the prompts of one step."""

    name: str
    """`golden_probability`, `golden_logprob`, or `score.` and a name of `monitoring.scores`; of
    several samples also `match.pass@K` and `score.NAME.pass@K`."""
    step: int
    """The step whose weights answered."""
    mean: float
    """Mean over the prompts."""
    is_share: bool
    """Whether all values were from 0 to 1, so that the mean reads as a share."""
    low: float | None
    """Lower end of its interval at 95 %; null with fewer than 12 prompts."""
    high: float | None
    """Upper end."""
    num_prompts: int
    """Prompts that have this score."""
    first: ScoreDifference | None
    """Against the first step; null at that step."""
    best: ScoreDifference | None
    """Against the step with the highest mean among the others; null at the first step."""


def values_of(result: PreviewResult) -> dict[str, float]:
    """The figures of one answer by name; what was not measured is not in it."""
    found: dict[str, float] = {}
    if result.golden_probability is not None:
        found[GOLDEN_PROBABILITY] = result.golden_probability
    if result.golden_logprobs:
        found[GOLDEN_LOGPROB] = statistics.fmean(
            said_nats(result.golden_logprobs, result.golden_is_frame)
        )
    scores = {SCORE + name: value for name, value in result.scores.items() if value is not None}
    return {name: v for name, v in (found | scores).items() if math.isfinite(v)}


def verdicts_of(result: PreviewResult) -> dict[str, list[float]]:
    """By name, a value of each sample; what one of them lacks is not in it, nor are shares.

    Of one answer alone nothing is told.
    """
    if not result.samples:
        return {}
    found: dict[str, list[float | bool | None]] = {MATCH: [one.matches for one in result.answers]}
    for name in result.scores:
        found[SCORE + name] = [one.scores.get(name) for one in result.answers]
    return {
        name: [float(value) for value in values if value is not None]
        for name, values in found.items()
        if all(value is not None and math.isfinite(value) for value in values)
    }


def pass_values(name: str, verdicts: Sequence[float]) -> dict[str, float]:
    """pass@k of a prompt for k = 1, 2, 4 and so on, and for all of its samples."""
    count, right = len(verdicts), sum(one == 1.0 for one in verdicts)
    powers = [2**power for power in range(count.bit_length()) if 2**power < count]
    return {f"{name}{PASS}{k}": pass_at(right, count, k) for k in [*powers, count]}


class ScoreHistory:
    """Every score of every prompt by step; a second answer by the same step replaces the first."""

    def __init__(self, graded: Collection[str] = ()) -> None:
        """Start empty.

        Args:
            graded: names of scores that are no verdict, whatever their values. So are those that
                had a value other than 0 and 1; pass@k is of verdicts only.
        """
        self._by_name: dict[str, dict[int, dict[str, float]]] = {}
        self._graded = {SCORE + name for name in graded}

    def add(self, results: Iterable[PreviewResult]) -> None:
        """Take note of results, of one step or of many."""
        for one in results:
            if one.ok:
                values = values_of(one)
                for name, verdicts in verdicts_of(one).items():
                    if not is_binary(verdicts):
                        self._graded.add(name)
                    elif name not in self._graded:
                        values |= pass_values(name, verdicts)
                for name, value in values.items():
                    steps = self._by_name.setdefault(name, {})
                    steps.setdefault(one.step, {})[one.prompt_id or one.prompt] = value

    def figures(self, step: int) -> tuple[ScoreFigure, ...]:
        """The means of a step, in the order in which the scores first appeared."""
        found = []
        for name, steps in self._by_name.items():
            verdict, is_pass, _ = name.partition(PASS)
            if step in steps and not (is_pass and verdict in self._graded):
                found.append(_figure(name, step, steps))
        return tuple(found)


def _figure(name: str, step: int, steps: Mapping[int, Mapping[str, float]]) -> ScoreFigure:
    values = list(steps[step].values())
    interval = interval_of(values) or (None, None)
    first, best = min(steps), _best_step(steps, but=step)
    return ScoreFigure(
        name=name,
        step=step,
        mean=statistics.fmean(values),
        is_share=all(0 <= one <= 1 for prompts in steps.values() for one in prompts.values()),
        low=interval[0],
        high=interval[1],
        num_prompts=len(values),
        first=_difference(step, first, steps) if first != step else None,
        best=_difference(step, best, steps) if best is not None else None,
    )


def _best_step(steps: Mapping[int, Mapping[str, float]], *, but: int) -> int | None:
    """The other step with the highest mean, the earliest of equal ones.

    A step where half of the prompts have no answer is none that others could be measured by.
    """
    most = max(map(len, steps.values()))
    means = {
        step: statistics.fmean(values.values())
        for step, values in steps.items()
        if step != but and 2 * len(values) > most
    }
    return max(means, key=lambda step: (means[step], -step)) if means else None


def _difference(
    step: int, other: int, steps: Mapping[int, Mapping[str, float]]
) -> ScoreDifference | None:
    prompts = [prompt for prompt in steps[step] if prompt in steps[other]]
    if not prompts:
        return None
    now = [steps[step][prompt] for prompt in prompts]
    before = [steps[other][prompt] for prompt in prompts]
    interval, is_clear = difference_of(now, before)
    return ScoreDifference(
        step=other,
        mean=statistics.fmean(before),
        difference=statistics.fmean(now) - statistics.fmean(before),
        low=interval[0] if interval else None,
        high=interval[1] if interval else None,
        is_clear=is_clear,
        num_prompts=len(prompts),
    )
