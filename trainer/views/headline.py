"""One sentence that says whether the model gets better, the same in every view."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from trainer.counts import counted
from trainer.preview.base import PreviewResult
from trainer.scores.statistics import (
    MIN_PROMPTS,
    SIGNIFICANCE,
    interval_of,
    is_above_all_before,
    paired_trend,
    sign_test,
)
from trainer.views.metrics import EvaluationPoint
from trainer.views.score_words import TOO_FEW
from trainer.views.timeline import FinalEvaluation, PreviewBook
from trainer.views.verdicts import Counts, counts_of

TREND_STEPS = 50
"""The newest preview steps, whose thirds tell a trend."""

RISE_SHARE = 0.02
"""A validation loss by more than this above the lowest one has risen."""

RISING = ", still rising"

Values = dict[str, float]
"""Prompt -> value at one step."""

ValueOf = Callable[[PreviewResult], float | None]


@dataclass(frozen=True)
class Headline:
    """The verdict on a run."""

    main: str
    """Such as `96 of 100 right, from 0 before training`; no full stop."""
    rest: str
    """Further sentences, such as `4 lost, 0 never right. Validation loss 0.467, lowest now.`"""
    short: str
    """For a tab or a list, such as `12/16` or `golden 16.6 %`; "" where nothing is known."""
    band: str
    """Where the share of all such prompts lies, such as `90.2 to 98.4 % at 95 %`; "" where
    nothing can be said."""

    @property
    def sentence(self) -> str:
        """All of it."""
        return f"{self.main}. {self.rest}".strip()


def headline_of(
    previews: PreviewBook,
    evaluations: Sequence[EvaluationPoint],
    final: FinalEvaluation | None = None,
) -> Headline:
    """The verdict on what a run has told so far.

    Args:
        previews: of all steps; the newest is compared with the first one, prompt by prompt.
        evaluations: losses on held-out rows, the oldest first.
        final: of a run that ended with an evaluation.
    """
    losses = [(one.step, one.val_loss) for one in evaluations if math.isfinite(one.val_loss)]
    counts = counts_of(line.judged for line in previews.timelines.values())
    matches, golden = _ends(previews, _match), _ends(previews, _probability)
    main, rest, short, band = "", [], "", ""
    if matches is not None:
        main, short, band = _match_words(previews, matches)
        if counts.wrong_now:
            rest.append(f"{counts.lost} lost, {counts.never_right} never right.")
    if golden is not None:
        words = f"golden token probability {_change(golden)}{_going_on(previews, _probability)}"
        is_first = matches is None or not any(matches.now.values())
        if matches is None:
            main, short = words, f"golden {_percent(golden.now)}"
            band = _band(golden.now)
        elif is_first:
            # Nothing is right yet: the graded measure says whether the model learns.
            main = f"{main}; {words}"
            short = f"{short}, golden {_percent(golden.now)}"
        else:
            rest.append(f"{words[0].upper()}{words[1:]}.")
    validation = validation_words(losses)
    if not main and validation:
        main, validation = _from_first(validation, losses), ""
    if validation:
        rest.append(f"{validation[0].upper()}{validation[1:]}.")
    if final is not None:
        rest.append(f"Final evaluation: {final.score_words} right.")
    if not main:
        main = _nothing_words(previews, counts)
    return Headline(main[0].upper() + main[1:], " ".join(rest), short, band)


def title_words(headline: Headline, name: str, *, step: int, total: int | None, ending: str) -> str:
    """The title of a tab, such as `62 % - 12/16 - gsm`.

    Args:
        name: of the run.
        ending: `completed`, `failed` and the like of a run that is over; "" while it goes on.
    """
    place = ending or (f"{100 * step // total} %" if total else "")
    return " - ".join(part for part in (place, headline.short, name) if part)


def validation_words(losses: Sequence[tuple[int, float]]) -> str:
    """Such as `validation loss 0.467, lowest now`; "" without a loss.

    Args:
        losses: (step, loss), finite, the oldest first.
    """
    if not losses:
        return ""
    step, now = losses[-1]
    lowest_step, lowest = min(losses, key=lambda pair: pair[1])
    words = f"validation loss {now:.3f}"
    if len(losses) == 1:
        return f"{words} at step {step}"
    if lowest_step == step:
        return f"{words}, lowest now"
    if now > lowest * (1 + RISE_SHARE):
        return f"{words}, was lower: {lowest:.3f} at step {lowest_step}"
    return f"{words}, lowest {lowest:.3f} at step {lowest_step}"


def _from_first(words: str, losses: Sequence[tuple[int, float]]) -> str:
    """The words with the first loss among them: alone they must say whether it got better."""
    if len(losses) == 1:
        return words
    step, first = losses[0]
    loss, _, judged = words.partition(", ")
    return f"{loss}, from {first:.3f} at step {step}, {judged}"


# ---- the newest step against the first, over the prompts that both have


@dataclass(frozen=True)
class _Pair:
    """Values of one kind at the newest step, and of the same prompts at the first one."""

    step: int
    first_step: int | None
    """None: there is only one step."""
    now: Values
    before: Values
    """Of prompts that are in `now`; empty where `first_step` is None."""


def _match(result: PreviewResult) -> float | None:
    return None if result.matches is None else float(result.matches)


def _probability(result: PreviewResult) -> float | None:
    return result.golden_probability


def _values(previews: PreviewBook, step: int, value_of: ValueOf) -> Values:
    found = {}
    for key, line in previews.timelines.items():
        result = line.of_step(step)
        value = value_of(result) if result is not None else None
        if value is not None:
            found[key] = value
    return found


def _ends(previews: PreviewBook, value_of: ValueOf) -> _Pair | None:
    """The first and the newest step that have such a value."""
    steps = previews.steps
    newest = next(
        ((step, found) for step in reversed(steps) if (found := _values(previews, step, value_of))),
        None,
    )
    if newest is None:
        return None
    step, now = newest
    for first_step in steps:
        if first_step == step:
            break
        before = _values(previews, first_step, value_of)
        before = {key: value for key, value in before.items() if key in now}
        if before:
            return _Pair(step, first_step, now, before)
    return _Pair(step, None, now, {})


def _match_words(previews: PreviewBook, pair: _Pair) -> tuple[str, str, str]:
    """The words, the short form, and the band."""
    right = round(sum(pair.now.values()))
    words = f"{right} of {len(pair.now)} right"
    is_none_right = right == 0 == sum(pair.before.values())
    if pair.first_step is not None and not is_none_right:
        words += f", from {round(sum(pair.before.values()))}{_since(pair.first_step)}"
        if len(pair.before) < len(pair.now):
            words += f" (of {len(pair.before)})"
        going_on = _going_on(previews, _match) if _is_on_the_way(pair) else ""
        is_rising = going_on == RISING
        words += ("" if is_rising else _at_best(previews, pair)) + _certainty(pair) + going_on
    return words, f"{right}/{len(pair.now)}", _band(pair.now)


def _at_best(previews: PreviewBook, pair: _Pair) -> str:
    """Such as `, 12 at step 180`, where the same prompts were right more often than now."""
    best_step, best = None, round(sum(pair.now.values()))
    for step in previews.steps:
        found = _values(previews, step, _match)
        right = round(sum(found.values()))
        if found.keys() == pair.now.keys() and right > best:
            best_step, best = step, right
    return "" if best_step in (None, pair.first_step) else f", {best} at step {best_step}"


def _certainty(pair: _Pair) -> str:
    """That a difference cannot be told from chance; "" where it can, or where there is none."""
    changes = [pair.now[key] - before for key, before in pair.before.items()]
    gained, lost = sum(one > 0 for one in changes), sum(one < 0 for one in changes)
    if gained == lost or sign_test(gained, lost) < SIGNIFICANCE:
        return ""
    few = len(changes) < MIN_PROMPTS
    return f" ({TOO_FEW} to be sure)" if few else " (no clear difference)"


def _is_on_the_way(pair: _Pair) -> bool:
    return 0 < sum(pair.now.values()) < len(pair.now)


def _going_on(previews: PreviewBook, value_of: ValueOf) -> str:
    """`, still rising` or `, falling now`; "" where no test tells.

    What rises is clearly above all before, and the newest step is the highest.
    """
    steps = previews.steps[-TREND_STEPS:]
    values = {step: _values(previews, step, value_of) for step in steps}
    by_step = {step: found for step, found in values.items() if found}
    if is_above_all_before(by_step) and _is_highest_now(by_step):
        return RISING
    return ", falling now" if paired_trend(by_step) == "falling" else ""


def _is_highest_now(by_step: Mapping[int, Values]) -> bool:
    """Whether no earlier step, over the same prompts, was higher than the newest."""
    newest = by_step[max(by_step)]
    means = [
        statistics.fmean(found.values())
        for found in by_step.values()
        if found.keys() == newest.keys()
    ]
    return max(means) <= statistics.fmean(newest.values())


def _change(pair: _Pair) -> str:
    """Such as `16.6 %, from 0.4 % before training`."""
    if pair.first_step is None:
        return _percent(pair.now)
    now = {key: pair.now[key] for key in pair.before}
    return f"{_percent(now)}, from {_percent(pair.before)}{_since(pair.first_step)}"


def _since(step: int) -> str:
    return " before training" if step == 0 else f" at step {step}"


def _percent(values: Mapping[str, float]) -> str:
    return f"{100 * statistics.fmean(values.values()):.1f} %"


def _band(values: Mapping[str, float]) -> str:
    found = interval_of(list(values.values()))
    return f"{100 * found[0]:.1f} to {100 * found[1]:.1f} % at 95 %" if found else ""


def _nothing_words(previews: PreviewBook, counts: Counts) -> str:
    """What there is instead of a verdict."""
    if not len(previews):
        return "no answers yet"
    if counts.no_golden == counts.all:
        return f"{counted(counts.all, 'prompt')} without golden answers: read what the model says"
    return "no answer could be compared yet"
