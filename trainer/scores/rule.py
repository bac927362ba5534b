"""When a score has clearly risen: the rule by which scores choose the best step and stop a run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from trainer.counts import counted
from trainer.preview.base import PreviewResult
from trainer.scores.figures import GOLDEN_PROBABILITY, SCORE, values_of
from trainer.scores.statistics import MIN_PROMPTS, difference_of


def figure_name(metric: str) -> str:
    """The figure that a metric such as `score.exact` or `score.golden_probability` names."""
    plain = metric.removeprefix(SCORE)
    return GOLDEN_PROBABILITY if plain == GOLDEN_PROBABILITY else SCORE + plain


def values_by_prompt(
    results: Sequence[PreviewResult], metric: str
) -> tuple[dict[str, float], str | None]:
    """The values of a metric by prompt, and in words why they decide nothing; None: they do.

    They decide where every prompt was answered and MIN_PROMPTS of them have a value.
    """
    silent = [one for one in results if not one.ok]
    if silent:
        return {}, f"{len(silent)} of {counted(len(results), 'prompt')} without an answer: " + str(
            silent[0].error_message
        )
    found = {one.prompt_id or one.prompt: values_of(one) for one in results}
    name = figure_name(metric)
    values = {prompt: figures[name] for prompt, figures in found.items() if name in figures}
    if len(values) < MIN_PROMPTS:
        return (
            {},
            f"{len(values)} of {counted(len(results), 'prompt')} with a value, {MIN_PROMPTS} are "
            "needed",
        )
    return values, None


@dataclass(frozen=True)
class Verdict:
    """What one evaluation changed."""

    step: int
    """The step whose weights answered."""
    mean: float | None
    """Mean over the prompts; None where the evaluation decides nothing."""
    against: int | None
    """The step that it was compared with; None: it is the first one."""
    is_best: bool
    """It is clearly above that step, or the first one."""
    missing: str | None = None
    """Why it decides nothing, in words."""


@dataclass
class ScoreRule:
    """Takes evaluations in order of steps; part of what a resume restores.

    The first evaluation, which is that of step 0, is what later ones must rise above. One that is
    clearly above the newest such step takes its place: over the prompts that both have, the paired
    interval at 95 % excludes 0. One that is missing changes nothing and is counted.
    """

    metric: str
    """Such as `score.exact`."""
    patience: int = 0
    """Evaluations without a clear rise after which it is over; 0: never."""
    reference_step: int | None = None
    """The step that last rose clearly; None: nothing was taken."""
    reference: dict[str, float] = field(default_factory=dict)
    """Prompt -> its value there."""
    best_step: int = 0
    """The same step where its weights are kept; 0: none, as those of step 0 are not."""
    num_without: int = 0
    """Evaluations since then."""
    num_taken: int = 0
    missing_steps: list[int] = field(default_factory=list)
    """Steps whose evaluations decided nothing."""

    @property
    def is_over(self) -> bool:
        """Whether it is time to stop."""
        return 0 < self.patience <= self.num_without

    @property
    def best_mean(self) -> float | None:
        """Mean of the score at the step that later ones must rise above."""
        return statistics.fmean(self.reference.values()) if self.reference else None

    def take(self, step: int, values: Mapping[str, float], missing: str | None = None) -> Verdict:
        """Take the evaluation of the next step.

        Args:
            values: prompt -> its value.
            missing: why there are none, in words.
        """
        against = self.reference_step
        common = [prompt for prompt in values if prompt in self.reference]
        if missing is None and against is not None and len(common) < MIN_PROMPTS:
            missing = (
                f"{counted(len(common), 'prompt has', 'prompts have')} a value here and at step "
                f"{against}, "
                f"{MIN_PROMPTS} are needed"
            )
        if missing is not None:
            self.missing_steps.append(step)
            return Verdict(step, None, against, False, missing)
        self.num_taken += 1
        is_best = against is None or _is_clearly_above(
            [values[prompt] for prompt in common], [self.reference[prompt] for prompt in common]
        )
        if is_best:
            self.reference_step, self.reference = step, dict(values)
            self.best_step, self.num_without = step, 0
        else:
            self.num_without += 1
        return Verdict(step, statistics.fmean(values.values()), against, is_best)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it; metric and patience are the config's."""
        given = ("metric", "patience")
        return {name: value for name, value in asdict(self).items() if name not in given}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave."""
        for name, value in state.items():
            setattr(self, name, value)


def _is_clearly_above(now: Sequence[float], before: Sequence[float]) -> bool:
    interval, is_clear = difference_of(now, before)
    return bool(is_clear and interval is not None and interval[0] > 0)
