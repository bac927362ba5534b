"""The previews of a run: one time-line per prompt, and the final evaluation at its end."""

from __future__ import annotations

import bisect
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trainer.counts import counted
from trainer.files import read_regular_file
from trainer.monitoring.status_schema import LONG_WINDOW, SHORT_WINDOW, MatchHistory
from trainer.preview.base import PreviewResult, golden_figures, said_nats
from trainer.scores.figures import ScoreFigure
from trainer.views.score_words import change_words, interval_words, label_of, shown_figures
from trainer.views.verdicts import Verdict, verdict_of
from trainer.views.words import MARK_ERROR, MARK_SUPERSEDED, samples_words
from trainer.views.words import mark_of as sign_of

# ---- timeline: all answers to one prompt, in the order of the steps, and what became of them


LIKELY = 0.5
"""From this mean probability a token (geometric) on, the model "knows" a golden answer."""

LEVELS = ((0.9, "sure"), (0.5, "likely"), (0.1, "doubtful"), (0.0, "unlikely"))
"""Probability of a golden token, from which on it gets which word (and colour)."""


@dataclass(frozen=True)
class GoldenToken:
    """One token of the golden answer, as these weights see it."""

    text: str
    probability: float
    level: str
    """`sure`, `likely`, `doubtful` or `unlikely`."""


class Timeline:
    """The answers to one prompt; one per step, the newest where a step was answered twice."""

    def __init__(self, prompt_id: str) -> None:
        """Start with no answer."""
        self.prompt_id = prompt_id
        self.steps: list[int] = []
        self._results: dict[int, PreviewResult] = {}
        self._judged: Verdict | None = None

    def add(self, result: PreviewResult) -> None:
        """Take an answer."""
        if result.step not in self._results:
            bisect.insort(self.steps, result.step)
        self._results[result.step] = result
        self._judged = None

    def drop_after(self, step: int) -> None:
        """Forget the answers above `step`."""
        self.steps = [one for one in self.steps if one <= step]
        self._results = {one: self._results[one] for one in self.steps}
        self._judged = None

    def __len__(self) -> int:
        """How many answers there are."""
        return len(self.steps)

    def __getitem__(self, index: int) -> PreviewResult:
        """The answer at a position, the oldest first."""
        return self._results[self.steps[index]]

    def of_step(self, step: int) -> PreviewResult | None:
        """The answer by the weights of `step`; None where there is none."""
        return self._results.get(step)

    def results(self) -> Iterable[PreviewResult]:
        """All answers, the oldest first."""
        return (self._results[step] for step in self.steps)

    @property
    def prompt(self) -> str:
        """The user's turn."""
        return self[-1].prompt if self.steps else ""

    @property
    def judged(self) -> Verdict:
        """What became of this prompt."""
        if self._judged is None:  # judged anew only when an answer came: pages ask all the time
            self._judged = verdict_of(self.results())
        return self._judged


def golden_tokens(result: PreviewResult) -> list[GoldenToken]:
    """The golden answer's tokens with their probabilities; empty where they were not measured."""
    if result.golden_tokens is None or result.golden_logprobs is None:
        return []
    found = []
    for text, nats in zip(result.golden_tokens, result.golden_logprobs, strict=False):
        probability = math.exp(min(nats, 0.0))
        level = next((word for low, word in LEVELS if probability >= low), LEVELS[-1][1])
        found.append(GoldenToken(text, probability, level))
    return found


def golden_words(result: PreviewResult) -> str | None:
    """Whether the model knows the golden answer; None where that was not measured."""
    if not result.golden_logprobs:
        return None
    nats = said_nats(result.golden_logprobs, result.golden_is_frame)
    mean = math.exp(min(sum(nats) / len(nats), 0.0))
    # The number that stands everywhere else; the verdict is stricter, as one unlikely token is
    # enough for another answer.
    shown = golden_figures(nats)["golden_probability"]
    figure = f"golden tokens {100 * shown:.1f} %"
    if result.matches:
        return f"says the golden answer ({figure})"
    if mean >= LIKELY:
        return f"knows the golden answer ({figure}), generation goes elsewhere"
    return f"does not know the golden answer yet ({figure})"


def facts_of(result: PreviewResult) -> list[str]:
    """What is to be said of one answer besides its text, the most important first."""
    facts = [] if result.held_out else ["also trained on"]
    facts += [flag.replace("_", " ") for flag in result.health]
    if result.samples:
        facts.append(samples_words(result))
    if result.ok:
        facts.append(
            f"{counted(result.tokens_generated, 'token')}, {result.tokens_per_sec:,.0f} tokens/s"
        )
    if result.weights != "in_process":  # of the training process there is nothing to prove
        proof = {
            "verified": "weights verified",
            "published": "weights published, no canary",
            "unverified": "weights not verified",
        }
        facts.append(f"by {result.backend_type}, {proof[result.weights]}")
    if result.received_step is not None and result.received_step > result.step:
        facts.append(f"{counted(result.received_step - result.step, 'step')} behind training")
    if result.visible_s is not None:
        facts.append(f"seen after {result.visible_s:.1f} s")
    return facts


# ---- PreviewBook: the previews of a run as one time-line per prompt


MARK_WORDS = {
    "=": "matches golden",
    "x": "does not match",
    ".": "nothing to compare with",
    MARK_ERROR: "no answer",
    MARK_SUPERSEDED: "superseded by a newer step",
}


class PreviewBook:
    """Answers by prompt, prompts in the order in which they first appeared."""

    def __init__(self) -> None:
        """Start empty."""
        self.timelines: dict[str, Timeline] = {}
        self._num_at: Counter[int] = Counter()
        self.clock = 0
        """Raised at every change; pages ask what changed since."""
        self.changed_at: dict[int, int] = {}
        """Step -> clock when an answer of it came."""
        self.dropped_at = 0
        """Clock when answers were forgotten."""

    def clear(self) -> None:
        """Forget everything."""
        self.timelines.clear()
        self._num_at.clear()
        self._note_drop()

    def _note_drop(self) -> None:
        self.clock += 1
        self.dropped_at = self.clock
        self.changed_at = {step: at for step, at in self.changed_at.items() if step in self._num_at}

    def add(self, result: PreviewResult) -> None:
        """Take one answer; a second one by the same prompt and step replaces the first."""
        key = result.prompt_id or result.prompt
        timeline = self.timelines.setdefault(key, Timeline(key))
        if timeline.of_step(result.step) is None:
            self._num_at[result.step] += 1
        timeline.add(result)
        self.clock += 1
        self.changed_at[result.step] = self.clock

    def drop_after(self, step: int) -> None:
        """Forget the answers above `step`: a resumed run makes them again."""
        if not any(one > step for one in self._num_at):
            return
        for timeline in self.timelines.values():
            timeline.drop_after(step)
        self.timelines = {key: one for key, one in self.timelines.items() if len(one)}
        self._num_at = Counter({one: n for one, n in self._num_at.items() if one <= step})
        self._note_drop()

    def __len__(self) -> int:
        """How many answers there are."""
        return sum(self._num_at.values())

    @property
    def steps(self) -> list[int]:
        """Steps with an answer, in order."""
        return sorted(self._num_at)

    def of_step(self, step: int) -> list[PreviewResult]:
        """The answers by the weights of `step`, in the order of the prompts."""
        found = (timeline.of_step(step) for timeline in self.timelines.values())
        return [result for result in found if result is not None]

    def newest(self) -> list[PreviewResult]:
        """The answers of the newest step."""
        return self.of_step(max(self._num_at)) if self._num_at else []

    def accuracy(self) -> dict[int, tuple[int, int]]:
        """Step -> (answers that match, answers compared); steps with nothing compared are out."""
        found = {}
        for step in self.steps:
            compared = [r.matches for r in self.of_step(step) if r.matches is not None]
            if compared:
                found[step] = (sum(compared), len(compared))
        return found

    def history(self) -> MatchHistory:
        """The newest comparisons, as status.json counts them."""
        history = MatchHistory()
        for step in self.steps[-max(2 * SHORT_WINDOW, LONG_WINDOW) :]:
            history.add(self.of_step(step))
        return history


def mark_of(result: PreviewResult | None) -> str:
    """The sign of an answer; a blank where there is none."""
    return " " if result is None else sign_of(result)


# ---- the final evaluation of a run: its score, the score by kind of prompt, and the wrong answers


ANSWERS_NAME = "final_evaluation.jsonl"

MAX_BYTES = 64 * 2**20
"""A larger file of answers is not read: the page then has the score alone."""

MAX_GROUPS, MIN_IN_GROUP = 12, 3
"""Prompts are grouped by their first word where that makes at most 12 groups of at least 3."""


@dataclass(frozen=True)
class FinalEvaluation:
    """What the weights at the end of a run answered, judged."""

    matched: int
    num_prompts: int
    answers: tuple[PreviewResult, ...]
    """All of them in file order; empty where their file is gone."""
    figures: tuple[ScoreFigure, ...]
    """Means of the scores, and of the probability of golden tokens where it was measured."""
    by_word: tuple[tuple[str, int, int], ...]
    """(first word of the prompt, matched, prompts) where that word tells kinds of prompts apart."""

    @property
    def wrong(self) -> tuple[PreviewResult, ...]:
        """Answers that do not match golden, prompts without an answer among them."""
        return tuple(one for one in self.answers if one.matches is not True)

    @property
    def score_words(self) -> str:
        """Such as `99.0 % (198/200)`."""
        share = 100 * self.matched / max(1, self.num_prompts)
        return f"{share:.1f} % ({self.matched}/{self.num_prompts})"

    @property
    def figure_rows(self) -> list[tuple[str, str]]:
        """(score, its mean and interval) for tables."""
        return [
            (label_of(one.name), f"{change_words(one)} ({interval_words(one)})")
            for one in shown_figures(self.figures)
        ]

    @property
    def by_word_words(self) -> str:
        """Such as `first 100 % (40/40), max 95 % (38/40)`; "" where prompts are not of kinds."""
        return ", ".join(
            f"{word} {100 * right / of:.0f} % ({right}/{of})" for word, right, of in self.by_word
        )


def final_score(summary: Mapping[str, Any]) -> FinalEvaluation | None:
    """The counts and means of a final evaluation, without its answers; None where there was none.

    Args:
        summary: of status.json and RunEnded.
    """
    found = summary.get("final_evaluation")
    if not isinstance(found, dict):
        return None
    matched, num_prompts = found.get("matched"), found.get("num_prompts")
    if type(matched) is not int or type(num_prompts) is not int:
        return None
    figures = _figures(found.get("figures"))
    return FinalEvaluation(matched, num_prompts, answers=(), figures=figures, by_word=())


def read_final_evaluation(folder: Path, summary: dict[str, Any]) -> FinalEvaluation | None:
    """The final evaluation of a run folder; None where there was none.

    Args:
        summary: of status.json; its counts hold where the file of answers is gone.
    """
    score = final_score(summary)
    if score is None:
        return None
    results = _results(folder / ANSWERS_NAME)
    return replace(score, answers=tuple(results), by_word=_by_first_word(results))


def _figures(found: Any) -> tuple[ScoreFigure, ...]:
    try:
        return tuple(ScoreFigure.model_validate(one) for one in found or ())
    except (TypeError, ValidationError):
        return ()  # runs of other versions have none


def _results(path: Path) -> list[PreviewResult]:
    """The answers of a file that may be missing, damaged, or somebody else's."""
    found = []
    for line in (read_regular_file(path, MAX_BYTES) or b"").splitlines():
        try:
            found.append(PreviewResult.model_validate(json.loads(line)))
        except (ValueError, ValidationError, RecursionError):
            continue  # the counts are the summary's; a line that is no answer cannot be shown
    return found


def _by_first_word(results: list[PreviewResult]) -> tuple[tuple[str, int, int], ...]:
    words = [(one.prompt.split() or [""])[0] for one in results]
    asked = Counter(words)
    if not 2 <= len(asked) <= MAX_GROUPS or min(asked.values()) < MIN_IN_GROUP:
        return ()
    right = Counter(word for word, one in zip(words, results, strict=True) if one.matches is True)
    return tuple((word, right[word], asked[word]) for word in sorted(asked))
