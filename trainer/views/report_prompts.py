"""The prompts of a report: a strip of all preview steps, the newest answer, the turning points."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trainer.preview.base import PreviewResult
from trainer.views.cuts import cut_pair, fit
from trainer.views.differences import Fold, Piece, compare, folded, shown_text
from trainer.views.timeline import (
    GoldenToken,
    PreviewBook,
    Timeline,
    facts_of,
    golden_tokens,
    golden_words,
    mark_of,
)
from trainer.views.verdicts import Counts, Verdict, common_start, counts_of, in_order, level_of
from trainer.views.words import MARK_SUPERSEDED
from trainer.views.words import mark_of as sign_of

NUM_OPEN = 3
"""Wrong answers that are shown without a click, the newest losses first."""

MAX_TURNS = 8
"""Turning points of one prompt; what is left out is counted."""

TURN_CHARS = 220
"""Of the answer at a turning point, round its first difference."""

SHOWN_CHARS = 20_000
"""Longest text; files hold all of it."""

GAP_STEPS = 150
"""Up to so many steps there is a gap between the bars of a strip."""

HEIGHT = 20


@dataclass(frozen=True)
class Comparison:
    """A golden answer and a generated one, with what differs, for a template."""

    golden: Sequence[Piece | Fold] | None
    """None without a golden answer."""
    text: Sequence[Piece | Fold]
    words: str
    """Such as `first difference at word 9`; "" without a golden answer."""
    left_out: int
    """Characters of either beyond SHOWN_CHARS."""


@dataclass(frozen=True)
class Turn:
    """A stretch of preview steps with one verdict, and its last answer in short."""

    steps: str
    """Such as `step 40` or `steps 40 to 120`."""
    count: int
    mark: str
    pieces: Sequence[Piece]


@dataclass(frozen=True)
class PromptCard:
    """Everything that the report says of one prompt."""

    number: int
    name: str
    """The prompt without what all prompts begin with."""
    prompt: str
    mark: str
    verdict: Verdict
    strip: Sequence[tuple[str, str]]
    """(class, SVG path data) each, in a box of (number of steps) by HEIGHT."""
    newest: PreviewResult | None
    """None where no step has answered."""
    compared: Comparison | None
    facts: Sequence[str]
    knows: str | None
    tokens: Sequence[GoldenToken]
    samples: Sequence[tuple[str, str]]
    """(mark, text) of the further samples of the newest step."""
    turns: Sequence[Turn]
    num_turns_left_out: int
    is_open: bool


@dataclass(frozen=True)
class PromptCards:
    """All prompts of a run, those to look at first in front."""

    cards: Sequence[PromptCard]
    steps: Sequence[int]
    counts: Counts

    @property
    def words(self) -> str:
        """Such as `4 wrong now (1 lost, 3 never right), 96 right`."""
        counts = self.counts
        parts = []
        if counts.wrong_now:
            kinds = f"{counts.lost} lost, {counts.never_right} never right"
            parts.append(f"{counts.wrong_now} wrong now ({kinds})")
        parts += [f"{counts.right} right"] if counts.compared else []
        parts += [f"{counts.no_answer} without an answer"] if counts.no_answer else []
        parts += [f"{counts.no_golden} without a golden answer"] if counts.no_golden else []
        return ", ".join(parts)


def prompt_cards(book: PreviewBook) -> PromptCards:
    """The prompts of a run with what became of them."""
    lines, steps = list(book.timelines.values()), book.steps
    start = common_start([line.prompt for line in lines])
    judged = [line.judged for line in lines]
    counts = counts_of(judged)
    cards = []
    for place, index in enumerate(in_order(judged)):
        is_of_interest = judged[index].is_wrong or not counts.compared
        cards.append(
            _card(
                lines[index],
                steps,
                number=place + 1,
                start=start,
                is_open=is_of_interest and place < NUM_OPEN,
            )
        )
    return PromptCards(cards, steps, counts)


def _card(
    line: Timeline, steps: Sequence[int], *, number: int, start: int, is_open: bool
) -> PromptCard:
    answers = [one for one in line.results() if not one.is_superseded]
    newest = answers[-1] if answers else None
    turns = _turns(answers)
    shown = turns if len(turns) <= MAX_TURNS else [turns[0], *turns[1 - MAX_TURNS :]]
    return PromptCard(
        number=number,
        name=line.prompt[start:],
        prompt=line.prompt,
        mark=mark_of(newest) if newest is not None else MARK_SUPERSEDED,
        verdict=line.judged,
        strip=strip_of(line, steps),
        newest=newest,
        compared=compared_of(newest) if newest is not None else None,
        facts=facts_of(newest) if newest is not None else (),
        knows=golden_words(newest) if newest is not None else None,
        tokens=golden_tokens(newest) if newest is not None else (),
        samples=_samples(newest) if newest is not None else (),
        turns=shown,
        num_turns_left_out=len(turns) - len(shown),
        is_open=is_open,
    )


def _samples(result: PreviewResult) -> list[tuple[str, str]]:
    return [
        (sign_of(one), shown_text((one.text if one.ok else one.error_message or "")[:SHOWN_CHARS]))
        for one in result.samples
    ]


def compared_of(result: PreviewResult) -> Comparison | None:
    """An answer beside its golden answer; None where there is no answer."""
    if not result.ok:
        return None
    text, golden = result.text[:SHOWN_CHARS], (result.golden_answer or "")[:SHOWN_CHARS]
    left_out = max(len(result.text), len(result.golden_answer or "")) - SHOWN_CHARS
    if result.golden_answer is None:
        return Comparison(None, [Piece("same", shown_text(text))], "", max(0, left_out))
    found = compare(golden, text)
    if not text.strip():
        found = dataclasses.replace(found, text=(Piece("same", shown_text(text)),), text_thought="")
    return Comparison(
        [*_thought(found.reference_thought), *folded(found.reference)],
        [*_thought(found.text_thought), *folded(found.text)],
        found.words,
        max(0, left_out),
    )


def _thought(text: str) -> list[Fold]:
    return [Fold(text)] if text else []


def _turns(answers: Iterable[PreviewResult]) -> list[Turn]:
    """Stretches of one verdict; where nothing is compared, of one answer."""

    def key(one: PreviewResult) -> tuple[str, str]:
        return mark_of(one), one.text if one.matches is None else ""

    found = []
    for (mark, _), group in itertools.groupby(answers, key=key):
        stretch = list(group)
        first, last = stretch[0].step, stretch[-1].step
        steps = f"step {first}" if first == last else f"steps {first} to {last}"
        found.append(Turn(steps, len(stretch), mark, _short(stretch[-1])))
    return found


def _short(result: PreviewResult) -> Sequence[Piece]:
    """An answer on one line, what differs from golden marked."""
    if not result.ok:
        return [Piece("same", fit(result.error_message or "", TURN_CHARS))]
    if result.golden_answer is None:
        return [Piece("same", fit(result.text, TURN_CHARS))]
    return cut_pair(result.golden_answer, result.text, TURN_CHARS)[1]


# ---- the strip: a bar for every preview step, as on the live page


def strip_of(line: Timeline, steps: Sequence[int]) -> list[tuple[str, str]]:
    """Bars of all steps as SVG paths: right is high; wrong is low, by golden token probability."""
    width = 0.85 if len(steps) <= GAP_STEPS else 1.0
    paths: dict[str, list[str]] = {}
    place = 0
    for (kind, height), group in itertools.groupby(steps, key=lambda step: _bar(line, step)):
        count = len(list(group))
        if kind:
            bars = [(place + nth, width) for nth in range(count)]
            for x, wide in bars if width < 1 else [(place, count)]:
                bar = f"M{x} {HEIGHT - height}h{wide}v{height}h-{wide}z"
                paths.setdefault(kind, []).append(bar)
        place += count
    return [(kind, "".join(bars)) for kind, bars in paths.items()]


def _bar(line: Timeline, step: int) -> tuple[str, int]:
    """(class, height) of the answer by the weights of a step; no class where there is none."""
    result = line.of_step(step)
    mark = mark_of(result)
    level = level_of(result.golden_probability) if result is not None else None
    share = 0.5 if level is None else 0.3 + 0.06 * level
    if mark == "=":
        return "good", HEIGHT
    if mark == "x":
        return ("bad" if level is None else f"bad-{level}"), round(HEIGHT * share)
    if mark == ".":
        return "none", round(HEIGHT * share)
    return {"!": "bad", MARK_SUPERSEDED: "none"}.get(mark, ""), 2
