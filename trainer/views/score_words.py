"""Scores in words, the same on the terminal, the page and the report."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.counts import counted
from trainer.monitoring.events import ScoresDone
from trainer.scores.figures import (
    GOLDEN_LOGPROB,
    GOLDEN_PROBABILITY,
    PASS,
    SCORE,
    ScoreDifference,
    ScoreFigure,
)
from trainer.scores.statistics import MIN_PROMPTS

BAR_CHARS = 10

TOO_FEW = "too few prompts"

LINE_CHARS = 150
"""Longer than that, the means of a step are lines of their own."""

SOURCES = {"previews": "previews", "evaluation": "evaluation prompts"}

_ASKED = {
    "previews": ("preview", "previews"),
    "evaluation": ("evaluation prompt", "evaluation prompts"),
}

_LABELS = {
    GOLDEN_PROBABILITY: "golden token probability",
    GOLDEN_LOGPROB: "golden log-probability, nats a token",
}


def label_of(name: str) -> str:
    """What a figure is called, such as `golden token probability`, `number` or `number pass@4`."""
    name, is_pass, k = name.partition(PASS)
    label = _LABELS.get(name, name.removeprefix(SCORE))
    return f"{label} pass@{k}" if is_pass else label


def curve_name(source: str, name: str) -> str:
    """What a curve is called, such as `number, evaluation prompts`."""
    return label_of(name) if source == "previews" else f"{label_of(name)}, {SOURCES[source]}"


def value_words(value: float, *, is_share: bool) -> str:
    """Such as `16.6 %`, or `-2.04` for what is no share."""
    return f"{100 * value:.1f} %" if is_share else f"{value:.4g}"


def change_words(figure: ScoreFigure) -> str:
    """From the first step to this one, such as `0.4 -> 16.6 %`."""
    now = value_words(figure.mean, is_share=figure.is_share)
    if figure.first is None:
        return now
    before = value_words(figure.first.mean, is_share=figure.is_share).removesuffix(" %")
    return f"{before} -> {now}"


def interval_words(figure: ScoreFigure) -> str:
    """Such as `12.1 to 22.0 % at 95 %`, or that there are too few prompts to say so."""
    if figure.num_prompts < MIN_PROMPTS:
        return TOO_FEW
    if figure.low is None or figure.high is None:
        return "nearly all equal, no interval"
    low = value_words(figure.low, is_share=figure.is_share).removesuffix(" %")
    return f"{low} to {value_words(figure.high, is_share=figure.is_share)} at 95 %"


def against_words(difference: ScoreDifference | None) -> str:
    """Such as `clearly above step 0`; "" where nothing can be said."""
    if difference is None or difference.is_clear is None:
        return ""
    if not difference.is_clear:
        return f"no clear difference from step {difference.step}"
    word = "above" if difference.difference > 0 else "below"
    return f"clearly {word} step {difference.step}"


def certainty_words(figure: ScoreFigure) -> str:
    """The interval, and the differences that can be told from chance."""
    parts = [interval_words(figure), against_words(figure.first)]
    best = figure.best
    if best is not None and (figure.first is None or best.step != figure.first.step):
        parts.append(against_words(best))
    return ", ".join(part for part in parts if part)


def bar(share: float) -> str:
    """A share as a bar of BAR_CHARS signs, such as `[##--------]`."""
    full = min(max(round(BAR_CHARS * share), 0), BAR_CHARS)
    return "[" + "#" * full + "-" * (BAR_CHARS - full) + "]"


def score_lines(event: ScoresDone) -> list[str]:
    """Each mean of a step as a line for narrow places."""
    lines = []
    for figure in shown_figures(event.figures):
        sign = f"{bar(figure.mean)} " if figure.is_share else ""
        name = curve_name(event.source, figure.name)
        lines.append(f"{name} {sign}{change_words(figure)} ({certainty_words(figure)})")
    return lines


def scores_words(event: ScoresDone) -> str:
    """The means of a step: one line where that is short, else one line each below a first one.

    Such as `scores at step 40, 4 previews: golden token probability [##--------] 0.4 -> 16.6 %,
    number [###-------] 0.0 -> 25.0 % (too few prompts)`.
    """
    shown = shown_figures(event.figures)
    parts = []
    for figure in shown:
        sign = f"{bar(figure.mean)} " if figure.is_share else ""
        told = "" if figure.num_prompts < MIN_PROMPTS else f" ({certainty_words(figure)})"
        parts.append(f"{label_of(figure.name)} {sign}{change_words(figure)}{told}")
    few = f" ({TOO_FEW})" if all(one.num_prompts < MIN_PROMPTS for one in shown) else ""
    count = max((one.num_prompts for one in shown), default=0)
    asked = counted(count, *_ASKED[event.source])
    title = f"scores at step {event.step}, {asked}"
    line = f"{title}: {', '.join(parts)}{few}"
    return line if len(line) <= LINE_CHARS else "\n  ".join([f"{title}{few}:", *parts])


def figure_rows(events: Sequence[ScoresDone]) -> list[tuple[str, str]]:
    """(label, value) of each figure, for tables."""
    return [
        (
            curve_name(event.source, figure.name),
            f"{change_words(figure)} at step {event.step} ({certainty_words(figure)})",
        )
        for event in events
        for figure in shown_figures(event.figures)
    ]


def shown_figures(figures: Sequence[ScoreFigure]) -> list[ScoreFigure]:
    """Those for people: a log-probability says once more what the probability says, and of pass@k
    they get the smallest and the largest k."""
    names = {one.name for one in figures}
    largest: dict[str, int] = {}
    for name in names:
        verdict, is_pass, k = name.partition(PASS)
        if is_pass and k.isdecimal():
            largest[verdict] = max(largest.get(verdict, 1), int(k))
    hidden = {GOLDEN_LOGPROB} if GOLDEN_PROBABILITY in names else set()
    ends = {f"{verdict}{PASS}{k}" for verdict, most in largest.items() for k in (1, most)}
    return [
        one
        for one in figures
        if one.name not in hidden and (PASS not in one.name or one.name in ends)
    ]
