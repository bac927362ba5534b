"""Timeline: all answers to one prompt, in the order of the steps, and what became of them."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable
from dataclasses import dataclass

from trainer.monitor.word_diff import Piece, word_diff
from trainer.preview.base import PreviewResult

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

    def add(self, result: PreviewResult) -> None:
        """Take an answer."""
        if result.step not in self._results:
            bisect.insort(self.steps, result.step)
        self._results[result.step] = result

    def drop_after(self, step: int) -> None:
        """Forget the answers above `step`."""
        self.steps = [one for one in self.steps if one <= step]
        self._results = {one: self._results[one] for one in self.steps}

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

    def golden_diff(self, index: int) -> list[Piece] | None:
        """The answer against golden; None without one of them."""
        result = self[index]
        if result.golden_answer is None or not result.ok:
            return None
        return word_diff(result.golden_answer.strip(), result.text.strip())

    def previous_diff(self, index: int) -> list[Piece] | None:
        """The answer against the one before it that is no error; None where there is none."""
        if not self[index].ok:
            return None
        before = next((self[i] for i in range(index - 1, -1, -1) if self[i].ok), None)
        return word_diff(before.text, self[index].text) if before is not None else None

    def verdict(self) -> str:
        """What became of this prompt, such as `first right at step 400, lost at 900`."""
        compared = [(r.step, r.matches) for r in self.results() if r.matches is not None]
        if not compared:
            has_golden = any(r.golden_answer is not None for r in self.results())
            return "no answer yet" if has_golden else "no golden answer to compare with"
        if not any(is_right for _, is_right in compared):
            times = f"{len(compared)} previews" if len(compared) > 1 else "1 preview"
            return f"not right yet, after {times}"
        turns = [
            (step, is_right)
            for index, (step, is_right) in enumerate(compared)
            if (index == 0 and is_right) or (index > 0 and is_right != compared[index - 1][1])
        ]
        return _turn_words(turns)

    def is_lost(self) -> bool:
        """Whether it was right once and is wrong now."""
        compared = [r.matches for r in self.results() if r.matches is not None]
        return bool(compared) and not compared[-1] and any(compared)


def _turn_words(turns: list[tuple[int, bool]]) -> str:
    """Words for the steps at which a prompt became right or wrong; the first one is right.

    A wrong beginning is no turn, so right and wrong alternate from the first entry on.
    """
    gains = [step for step, is_right in turns if is_right]
    losses = [step for step, is_right in turns if not is_right]
    words = f"first right at step {gains[0]}"
    if not losses:
        return f"{words}, right since"
    if len(losses) == 1:
        words += f", lost at {losses[0]}"
        return f"{words}, right again since {gains[1]}" if len(gains) > 1 else words
    if turns[-1][1]:
        return f"{words}, lost {len(losses)} times, right again since {gains[-1]}"
    return f"{words}, lost {len(losses)} times, wrong since {losses[-1]}"


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
    nats = result.golden_logprobs
    if not nats:
        return None
    mean = math.exp(min(sum(nats) / len(nats), 0.0))
    figure = f"{100 * mean:.0f} % a golden token"
    if result.matches:
        return f"says the golden answer ({figure})"
    if mean >= LIKELY:
        return f"knows the golden answer ({figure}), generation goes elsewhere"
    return f"does not know the golden answer yet ({figure})"


def facts_of(result: PreviewResult) -> list[str]:
    """What is to be said of one answer besides its text, the most important first."""
    facts = [] if result.held_out else ["also trained on"]
    facts += [flag.replace("_", " ") for flag in result.health]
    if result.ok:
        facts.append(f"{result.tokens_generated} tokens, {result.tokens_per_sec:,.0f} tokens/s")
    where = f"by {result.backend_type}"
    proof = {
        "in_process": "in the training process",
        "verified": "weights verified",
        "published": "weights published, no canary",
        "unverified": "weights not verified",
    }
    facts.append(f"{where}, {proof[result.weights]}")
    if result.received_step is not None:
        behind = result.received_step - result.step
        facts.append(f"{behind} steps behind" if behind > 0 else "not behind")
    if result.visible_s is not None:
        facts.append(f"seen after {result.visible_s:.1f} s")
    return facts
