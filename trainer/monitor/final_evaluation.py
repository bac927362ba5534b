"""The final evaluation of a run: its score, the score by kind of prompt, and the wrong answers."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trainer.monitor.small_files import read_regular_file
from trainer.preview.base import PreviewResult

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
    wrong: tuple[PreviewResult, ...]
    """Answers that do not match golden, prompts without an answer among them, in file order."""
    by_word: tuple[tuple[str, int, int], ...]
    """(first word of the prompt, matched, prompts) where that word tells kinds of prompts apart."""

    @property
    def score_words(self) -> str:
        """Such as `99.0 % (198/200)`."""
        share = 100 * self.matched / max(1, self.num_prompts)
        return f"{share:.1f} % ({self.matched}/{self.num_prompts})"

    @property
    def by_word_words(self) -> str:
        """Such as `first 100 % (40/40), max 95 % (38/40)`; "" where prompts are not of kinds."""
        return ", ".join(
            f"{word} {100 * right / of:.0f} % ({right}/{of})" for word, right, of in self.by_word
        )


def read_final_evaluation(folder: Path, summary: dict[str, Any]) -> FinalEvaluation | None:
    """The final evaluation of a run folder; None where there was none.

    Args:
        summary: of status.json; its counts hold where the file of answers is gone.
    """
    found = summary.get("final_evaluation")
    if not isinstance(found, dict):
        return None
    matched, num_prompts = found.get("matched"), found.get("num_prompts")
    if type(matched) is not int or type(num_prompts) is not int:
        return None
    results = _results(folder / ANSWERS_NAME)
    return FinalEvaluation(
        matched=matched,
        num_prompts=num_prompts,
        wrong=tuple(one for one in results if one.matches is not True),
        by_word=_by_first_word(results),
    )


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
