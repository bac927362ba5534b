"""What a mean over prompts can tell: intervals at 95 %, exact tests of pairs. No packages needed.

Scores of 0 and 1 get Wilson's interval and McNemar's exact test, others Student's t on the mean.
Neither says anything below MIN_PROMPTS.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

from trainer.config.section import MIN_PROMPTS as MIN_PROMPTS

LEVEL = 0.95

SIGNIFICANCE = 1 - LEVEL
"""Something is said where chance alone would show as much in fewer than this share of runs."""

Z = statistics.NormalDist().inv_cdf((1 + LEVEL) / 2)

MIN_INFORMATIVE = 5
"""With fewer values that differ from the most frequent one, t would take one value for certain."""

WIDEST_WEIGHT = 0.5
"""The widest spread that a mean allows counts like so many values beside the spread seen."""

Interval = tuple[float, float]


def wilson(mean: float, count: float, quantile: float = Z) -> Interval:
    """Wilson's interval of a share.

    Args:
        mean: from 0 to 1.
        count: how many answers of 0 or 1 it is the mean of, or as good as.
        quantile: of the normal distribution, or of Student's t.
    """
    square = quantile * quantile
    shrink = 1 + square / count
    middle = (mean + square / (2 * count)) / shrink
    spread = mean * (1 - mean) / count + square / (4 * count * count)
    half = quantile / shrink * math.sqrt(max(spread, 0.0))
    return max(0.0, middle - half), min(1.0, middle + half)


def student_t(freedom: int) -> float:
    """The two-sided quantile of Student's t, for at least MIN_PROMPTS - 1 degrees of freedom.

    Cornish and Fisher's expansion about the normal quantile; from 11 degrees on to 5 digits.
    """
    z = Z
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    shifts = [term / float(freedom) ** power for power, term in enumerate(terms, start=1)]
    return math.fsum([z, *shifts])


def is_binary(values: Sequence[float]) -> bool:
    """Whether every value is right (1) or wrong (0)."""
    return all(value in (0.0, 1.0) for value in values)


def interval_of(values: Sequence[float]) -> Interval | None:
    """Where the mean over all such prompts lies, at 95 %.

    Of values from 0 to 1 that are not all 0 or 1, it is Wilson's interval of so many answers of 0
    or 1 as would give a mean of this spread, with the quantile of t: unlike t itself, it is not
    symmetric near 0 and 1, where values are not either (t covers 86 % of word overlaps with a mean
    of 0.05 on 16 prompts, this 93 %).

    t takes the spread of the values for the spread of all prompts. Where nearly all values are
    equal, it has not been seen yet: there, values from 0 to 1 get Wilson's interval of their mean,
    which holds for the widest spread that such a mean allows. So a column that is all right never
    has an interval of width 0.

    Returns:
        None with fewer than MIN_PROMPTS values, and where values outside of 0 to 1 are nearly all
        equal.
    """
    count = len(values)
    if count < MIN_PROMPTS:
        return None
    mean = statistics.fmean(values)
    is_share = all(0 <= value <= 1 for value in values)
    if is_share and (is_binary(values) or not _is_spread_seen(values)):
        return wilson(mean, count)
    if not _is_spread_seen(values):
        return None
    if not is_share:
        return _t_interval(values)
    widest = mean * (1 - mean)
    weight = count - 1 + WIDEST_WEIGHT
    spread = ((count - 1) * statistics.variance(values) + WIDEST_WEIGHT * widest) / weight
    return wilson(mean, count * max(1.0, widest / spread), student_t(count - 1))


def _is_spread_seen(values: Sequence[float]) -> bool:
    [(_, most)] = Counter(values).most_common(1)
    return len(values) - most >= MIN_INFORMATIVE


def pass_at(right: int, count: int, k: int) -> float:
    """The chance that one of k answers is right, where `right` of `count` are: pass@k, unbiased.

    Of all ways to take k of them, the share with a right one (Chen et al. 2021).

    Args:
        k: from 1 to count.
    """
    return 1 - math.comb(count - right, k) / math.comb(count, k)


# ---- pairs: the same prompts at two steps


def sign_test(gained: int, lost: int) -> float:
    """How likely a split at least as uneven is where gains and losses are equally likely.

    Two-sided and exact, which is McNemar's exact test of paired yes/no answers.
    """
    count = gained + lost
    tail: float = sum(math.comb(count, i) for i in range(min(gained, lost) + 1)) / 2**count
    return min(1.0, 2 * tail)


def paired_trend(
    by_step: Mapping[int, Mapping[str, float]],
) -> Literal["rising", "falling"] | None:
    """The newest third of the steps against the third before, prompt by prompt.

    Args:
        by_step: step -> prompt -> value.
    Returns:
        None where a two-sided sign test over the prompts that changed is not below SIGNIFICANCE
        (with fewer than six prompts never).
    """
    steps = sorted(by_step)
    size = max(1, len(steps) // 3)
    if len(steps) < 2 * size:
        return None
    newest = _means([by_step[step] for step in steps[-size:]])
    before = _means([by_step[step] for step in steps[-2 * size : -size]])
    changes = [newest[prompt] - before[prompt] for prompt in newest.keys() & before.keys()]
    gained, lost = sum(one > 0 for one in changes), sum(one < 0 for one in changes)
    if sign_test(gained, lost) >= SIGNIFICANCE:
        return None
    return "rising" if gained > lost else "falling"


def is_above_all_before(by_step: Mapping[int, Mapping[str, float]]) -> bool:
    """Whether the newest third of the steps is clearly above every as long part before it.

    A rise after a fall, to where the values had been, is none. Clear is what both the sign test
    over prompts and, where there are enough of them, `difference_of` call so.

    Args:
        by_step: step -> prompt -> value.
    """
    steps = sorted(by_step)
    size = max(1, len(steps) // 3)
    newest = _means([by_step[step] for step in steps[-size:]])
    parts = [steps[max(0, end - size) : end] for end in range(len(steps) - size, 0, -size)]
    return bool(parts) and all(
        _is_clearly_above(newest, _means([by_step[step] for step in part])) for part in parts
    )


def _is_clearly_above(now: Mapping[str, float], before: Mapping[str, float]) -> bool:
    pairs = [(now[prompt], before[prompt]) for prompt in now if prompt in before]
    gained = sum(one > other for one, other in pairs)
    lost = sum(one < other for one, other in pairs)
    if gained <= lost or sign_test(gained, lost) >= SIGNIFICANCE:
        return False
    _, is_clear = difference_of([one for one, _ in pairs], [other for _, other in pairs])
    return is_clear is not False and sum(one - other for one, other in pairs) > 0


def _means(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Prompt -> mean of its values."""
    found: dict[str, list[float]] = {}
    for values in steps:
        for prompt, value in values.items():
            found.setdefault(prompt, []).append(value)
    return {prompt: sum(values) / len(values) for prompt, values in found.items()}


def difference_of(
    now: Sequence[float], before: Sequence[float]
) -> tuple[Interval | None, bool | None]:
    """Where the mean difference of pairs lies, and whether there is one.

    Args:
        now, before: the same prompts in the same order.
    Returns:
        The interval (None: too few prompts, or nothing can be said), and whether the difference is
        clear: of scores of 0 and 1 by McNemar's exact test, of others by the interval. None with
        fewer than MIN_PROMPTS prompts.
    """
    if len(now) < MIN_PROMPTS:
        return None, None
    if is_binary(now) and is_binary(before):
        pairs = list(zip(now, before, strict=True))
        gained, lost = pairs.count((1, 0)), pairs.count((0, 1))
        return _newcombe(pairs), sign_test(gained, lost) < SIGNIFICANCE
    changes = [one - other for one, other in zip(now, before, strict=True)]
    if _is_spread_seen(changes):
        found = _t_interval(changes)
    elif all(0 <= value <= 1 for value in (*now, *before)):
        low, high = wilson((statistics.fmean(changes) + 1) / 2, len(changes))
        found = (2 * low - 1, 2 * high - 1)
    else:
        return None, False
    return found, not found[0] <= 0 <= found[1]


def _t_interval(values: Sequence[float]) -> Interval:
    half = student_t(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values) - half, statistics.fmean(values) + half


def _newcombe(pairs: Sequence[tuple[float, float]]) -> Interval:
    """Newcombe's interval (1998, method 10) of the difference of two paired shares."""
    count = len(pairs)
    both, neither = pairs.count((1, 1)), pairs.count((0, 0))
    gained, lost = pairs.count((1, 0)), pairs.count((0, 1))
    now, before = (both + gained) / count, (both + lost) / count
    low_now, high_now = wilson(now, count)
    low_before, high_before = wilson(before, count)
    product = (both + gained) * (lost + neither) * (both + lost) * (gained + neither)
    agreement = float(both * neither - gained * lost)
    if agreement > 0:
        agreement = max(0.0, agreement - count / 2)
    phi = agreement / math.sqrt(product) if product else 0.0
    down = _joined(now - low_now, high_before - before, phi)
    up = _joined(high_now - now, before - low_before, phi)
    return max(-1.0, now - before - down), min(1.0, now - before + up)


def _joined(one: float, other: float, phi: float) -> float:
    return math.sqrt(max(0.0, one * one - 2 * phi * one * other + other * other))
